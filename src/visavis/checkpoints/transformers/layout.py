"""Checkpoints in the layout of Hugging Face transformers: its tensors as ours, and back.

Language models, CLIP, SigLIP and DINOv2 vision towers, and the LLaVAs made of them. Takes parsed
JSON and tensors by name: opens no file (see `folder.py`) and imports no transformers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from visavis.checkpoints.names import Convert, NameTable, Row, Sizes, to_ours, to_theirs
from visavis.checkpoints.transformers.config import parts, vit_config, vlm_config
from visavis.checkpoints.transformers.names import decoder_rows, tower_table
from visavis.checkpoints.transformers.qwen2_vl import qwen2_vl_table
from visavis.checkpoints.transformers.settings import Json
from visavis.errors import CheckpointError
from visavis.model.config import MixtureConfig, Qwen2VLTowerConfig, ViTConfig, VLMConfig
from visavis.model.vlm import VLM


def read(
    config: Json,
    tensors: Mapping[str, Tensor],
    *,
    where: str,
    convert: Convert = lambda _, tensor: tensor,
) -> dict[str, Tensor]:
    """Return the state of `VLM(vlm_config(config))` from tensors in transformers' layout.

    Args:
        convert: see `to_ours`.

    Raises:
        CheckpointError: tensors are missing, unexpected or of another shape.
    """
    ours = vlm_config(config)
    return read_as(ours, vlm_table(config, ours), tensors, where=where, convert=convert)


def read_as(
    ours: VLMConfig,
    table: NameTable,
    tensors: Mapping[str, Tensor],
    *,
    where: str,
    convert: Convert = lambda _, tensor: tensor,
) -> dict[str, Tensor]:
    """Return the state of `VLM(ours)` from tensors whose names a table knows.

    Raises:
        CheckpointError: tensors are missing, unexpected or of another shape.
    """
    with torch.device("meta"):
        expected = _shapes(VLM(ours).state_dict())
    if ours.decoder.tied_head:
        del expected["decoder.head.weight"]
    state = to_ours(tensors, table, expected, _vlm_sizes(ours), where=where, convert=convert)
    if ours.decoder.tied_head:
        embeddings = state["decoder.head.weight"] = state["decoder.embed.weight"]
        for name in ("lm_head.weight", "language_model.lm_head.weight"):
            if name not in tensors:
                continue
            if not torch.equal(tensors[name].to(embeddings.dtype), embeddings):
                raise CheckpointError(
                    f"{where} holds a {name} of its own, but config.json ties it to the "
                    "embeddings; one of the two is wrong: set tie_word_embeddings to false to "
                    "use the head that is there"
                )
    return state


def write(config: Json, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors in transformers' layout (the hub's names): the inverse of `read`."""
    ours = vlm_config(config)
    return write_as(ours, vlm_table(config, ours), state)


def write_as(ours: VLMConfig, table: NameTable, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by the names of a table: the inverse of `read_as`."""
    kept = dict(state)
    if ours.decoder.tied_head:
        kept.pop("decoder.head.weight", None)
    return to_theirs(kept, table, _vlm_sizes(ours))


def read_tower(config: Json, tensors: Mapping[str, Tensor], *, where: str) -> dict[str, Tensor]:
    """Return the state of `ViT(vit_config(config))` from a vision or CLIP-like checkpoint.

    Raises:
        CheckpointError: tensors are missing, unexpected or of another shape.
    """
    from visavis.model.towers.vit import ViT

    ours = vit_config(config)
    with torch.device("meta"):
        expected = _shapes(ViT(ours).state_dict(prefix="tower."))
    state = to_ours(tensors, tower_table(config), expected, _tower_sizes(ours), where=where)
    return {name.removeprefix("tower."): tensor for name, tensor in state.items()}


def write_tower(config: Json, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors in transformers' layout: the inverse of `read_tower`."""
    named = {f"tower.{name}": tensor for name, tensor in state.items()}
    return to_theirs(named, tower_table(config), _tower_sizes(vit_config(config)))


def vlm_table(config: Json, ours: VLMConfig) -> NameTable:
    """Return the names of a whole language model, llava or Qwen2-VL."""
    if isinstance(ours.tower, Qwen2VLTowerConfig):
        return qwen2_vl_table(ours)
    prefix = "" if ours.tower is None else "language_model."
    head = f"{prefix}lm_head"
    # A buffer that old files carry; and a tied head is the embeddings once more.
    ignored = ("**.rotary_emb.inv_freq", *([f"{head}.weight"] if ours.decoder.tied_head else []))
    if ours.tower is None:
        return NameTable(decoder_rows(config["model_type"], prefix, head), ignored=ignored)
    text, vision = parts(config)
    tower = tower_table(vision, "vision_tower.")
    connector = [
        Row(f"connector.layers.{ours_at}.{kind}", (f"multi_modal_projector.{theirs}.{kind}",))
        for ours_at, theirs in ((0, "linear_1"), (2, "linear_2"))
        for kind in ("weight", "bias")
    ]
    newer = (
        ("lm_head.weight", f"{head}.weight"),
        ("model.language_model.**", "language_model.model.**"),
        ("model.multi_modal_projector.**", "multi_modal_projector.**"),
        ("model.vision_tower.**", "vision_tower.**"),
        ("model.image_newline", "image_newline"),
    )
    newline = Row("image_newline", ("image_newline",))
    return NameTable(
        rows=(*decoder_rows(text["model_type"], prefix, head), *connector, newline, *tower.rows),
        aliases=(*newer, *tower.aliases),
        ignored=(*ignored, *tower.ignored),
    )


def _vlm_sizes(config: VLMConfig) -> Sizes:
    decoder = config.decoder
    vit = config.tower.second if isinstance(config.tower, MixtureConfig) else config.tower
    tower = _tower_sizes(vit) if isinstance(vit, ViTConfig) else None

    def sizes(layer: int) -> Mapping[str, int]:
        return {
            "q": decoder.per_layer(decoder.num_heads, layer) * decoder.head_dim,
            "kv": decoder.per_layer(decoder.num_kv_heads, layer) * decoder.head_dim,
            "ffn": decoder.per_layer(decoder.ffn_width, layer),
            **(tower(layer) if tower else {}),
        }

    return sizes


def _tower_sizes(config: ViTConfig) -> Sizes:
    return lambda _: {"width": config.width, "gate": config.ffn_width}


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
