"""Tensor names of transformers: rows of every language model and vision tower we read.

Both generations of names are read: that of the files on the hub and that of modules since 4.52;
the hub's is written. Configs are read in `language_models.py` and `vision_models.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from visavis.checkpoints.transformers.config_reader import Json, section
from visavis.checkpoints.transformers.idefics3 import KINDS as IDEFICS3
from visavis.checkpoints.transformers.internvl import KIND as INTERNVL
from visavis.checkpoints.transformers.internvl import internvl_table
from visavis.checkpoints.transformers.language_models import decoder_rows
from visavis.checkpoints.transformers.llava_onevision15 import KIND as ONEVISION_15
from visavis.checkpoints.transformers.llava_onevision15 import onevision15_table
from visavis.checkpoints.transformers.modernvbert import KIND as MODERNVBERT
from visavis.checkpoints.transformers.modernvbert import modernvbert_rows
from visavis.checkpoints.transformers.multi_vector import multi_vector_parts, multi_vector_table
from visavis.checkpoints.transformers.qwen2_vl import qwen2_vl_table
from visavis.checkpoints.transformers.vision_models import (
    PALIGEMMA,
    parts,
    vision_part,
    vit_config,
    vlm_config,
)
from visavis.checkpoints.weight_mapping import (
    Convert,
    MappingRow,
    NameTable,
    Sizes,
    to_ours,
    to_theirs,
)
from visavis.errors import CheckpointError
from visavis.model.config import MixtureConfig, Qwen2VLTowerConfig, ViTConfig, VLMConfig
from visavis.model.embedder_config import GemmaEncoderConfig, GemmaTowerConfig, NaFlexConfig
from visavis.model.vlm import VLM


def clip_rows(model: str) -> tuple[MappingRow, ...]:
    """Rows of a CLIP or SigLIP vision tower."""
    embeddings = f"{model}.embeddings"
    rows = [
        MappingRow("tower.class_token", (f"{embeddings}.class_embedding",)),
        MappingRow("tower.positions", (f"{embeddings}.position_embedding.weight",)),
    ]
    for kind in ("weight", "bias"):
        rows += [
            MappingRow(f"tower.patch.{kind}", (f"{embeddings}.patch_embedding.{kind}",)),
            MappingRow(f"tower.pre_norm.{kind}", (f"{model}.pre_layrnorm.{kind}",)),  # sic
            MappingRow(f"tower.post_norm.{kind}", (f"{model}.post_layernorm.{kind}",)),
        ]
    return (*rows, *clip_block_rows("tower.blocks.*", f"{model}.encoder.layers.*", "width"))


def clip_block_rows(ours: str, theirs: str, width: str) -> list[MappingRow]:
    """Rows of the blocks of a CLIP or SigLIP tower, vision or text.

    Args:
        width: the name in `Sizes` of the rows of each of q, k and v.
    """
    rows = []
    for kind in ("weight", "bias"):
        qkv = tuple(f"{theirs}.self_attn.{part}_proj.{kind}" for part in "qkv")
        rows += [
            MappingRow(f"{ours}.attn_norm.{kind}", (f"{theirs}.layer_norm1.{kind}",)),
            MappingRow(f"{ours}.qkv.{kind}", qkv, (width, width, width)),
            MappingRow(f"{ours}.out.{kind}", (f"{theirs}.self_attn.out_proj.{kind}",)),
            MappingRow(f"{ours}.ffn_norm.{kind}", (f"{theirs}.layer_norm2.{kind}",)),
            MappingRow(f"{ours}.up.{kind}", (f"{theirs}.mlp.fc1.{kind}",)),
            MappingRow(f"{ours}.down.{kind}", (f"{theirs}.mlp.fc2.{kind}",)),
        ]
    return rows


def _dinov2_rows(prefix: str) -> tuple[MappingRow, ...]:
    """Rows of a DINOv2, with plain or gated feed-forward; `prefix` ends in a dot or is empty."""
    embeddings = f"{prefix}embeddings"
    ours, theirs = "tower.blocks.*", f"{prefix}encoder.layer.*"
    rows = [
        MappingRow("tower.class_token", (f"{embeddings}.cls_token",), unit_axes=2),
        MappingRow("tower.registers", (f"{embeddings}.register_tokens",), unit_axes=1),
        MappingRow("tower.positions", (f"{embeddings}.position_embeddings",), unit_axes=1),
        MappingRow(f"{ours}.attn_scale", (f"{theirs}.layer_scale1.lambda1",)),
        MappingRow(f"{ours}.ffn_scale", (f"{theirs}.layer_scale2.lambda1",)),
    ]
    for kind in ("weight", "bias"):
        attention, mlp = f"{theirs}.attention", f"{theirs}.mlp"
        qkv = tuple(f"{attention}.attention.{part}.{kind}" for part in ("query", "key", "value"))
        rows += [
            MappingRow(
                f"tower.patch.{kind}", (f"{embeddings}.patch_embeddings.projection.{kind}",)
            ),
            MappingRow(f"tower.post_norm.{kind}", (f"{prefix}layernorm.{kind}",)),
            MappingRow(f"{ours}.attn_norm.{kind}", (f"{theirs}.norm1.{kind}",)),
            MappingRow(f"{ours}.qkv.{kind}", qkv, ("width", "width", "width")),
            MappingRow(f"{ours}.out.{kind}", (f"{attention}.output.dense.{kind}",)),
            MappingRow(f"{ours}.ffn_norm.{kind}", (f"{theirs}.norm2.{kind}",)),
            MappingRow(f"{ours}.up.{kind}", (f"{mlp}.fc1.{kind}",)),
            MappingRow(f"{ours}.down.{kind}", (f"{mlp}.fc2.{kind}",)),
        ]
    return tuple(rows)


def _gated(rows: tuple[MappingRow, ...], prefix: str) -> tuple[MappingRow, ...]:
    """Give a DINOv2 the names of its gated feed-forward: the hub's, then those of 5.x modules."""
    theirs = f"{prefix}encoder.layer.*.mlp"
    kept = [row for row in rows if ".up." not in row.ours and ".down." not in row.ours]
    for kind in ("weight", "bias"):
        apart = (f"{theirs}.gate_proj.{kind}", f"{theirs}.up_proj.{kind}")
        kept += [
            MappingRow(f"tower.blocks.*.up.{kind}", (f"{theirs}.weights_in.{kind}",)),
            MappingRow(f"tower.blocks.*.up.{kind}", apart, ("gate", "gate")),
            MappingRow(f"tower.blocks.*.down.{kind}", (f"{theirs}.weights_out.{kind}",)),
        ]
    return tuple(kept)


DINOV2_ALIASES = (
    ("**.attention.q_proj.*", "**.attention.attention.query.*"),
    ("**.attention.k_proj.*", "**.attention.attention.key.*"),
    ("**.attention.v_proj.*", "**.attention.attention.value.*"),
    ("**.attention.o_proj.*", "**.attention.output.dense.*"),
    ("**.mlp.down_proj.*", "**.mlp.weights_out.*"),
)
CLIP_PARTS = ("embeddings", "encoder", "pre_layrnorm", "post_layernorm", "head")


def tower_table(config: Json, prefix: str = "") -> NameTable:
    """Return the names of a vision tower; `prefix` ends in a dot or is empty."""
    config = vision_part(config)
    if config["model_type"].startswith("dinov2"):
        rows = _dinov2_rows(prefix)
        if config.get("use_swiglu_ffn"):
            rows = _gated(rows, prefix)
        aliases = tuple((prefix + name, prefix + target) for name, target in DINOV2_ALIASES)
        return NameTable(rows, aliases, ignored=(f"{prefix}embeddings.mask_token",))
    model = f"{prefix}vision_model"
    other_half = () if prefix else ("text_model.**", "*_projection.weight", "logit_*")
    return NameTable(
        rows=clip_rows(model),
        aliases=tuple((f"{prefix}{part}.**", f"{model}.{part}.**") for part in CLIP_PARTS),
        # SigLIP's attention pooling, and a buffer that old files carry.
        ignored=(f"{model}.head.**", f"{model}.embeddings.position_ids", *other_half),
    )


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
        state["decoder.head.weight"] = state["decoder.embed.weight"]
        for name in ("lm_head.weight", "language_model.lm_head.weight"):
            if name not in tensors:
                continue
            embeddings = tensors[_name_of("decoder.embed.weight", tensors, table)]
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
    from visavis.model.vision.vit import ViT

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
    """Return the names of a whole model."""
    if ours.multi_vector_dim:
        inner = vlm_table(multi_vector_parts(config), replace(ours, multi_vector_dim=0))
        return multi_vector_table(config, inner)
    if config["model_type"] == ONEVISION_15:
        return onevision15_table(ours)
    if isinstance(ours.tower, Qwen2VLTowerConfig):
        return qwen2_vl_table(ours)
    if config["model_type"] in IDEFICS3:
        return _idefics3_table(config, ours)
    if config["model_type"] == INTERNVL:
        return internvl_table(config, ours)
    if config["model_type"] == MODERNVBERT:
        siglip = {"model_type": "siglip_vision_model"} | section(config, "vision_config")
        tower = tower_table(siglip, "vision_model.")
        return NameTable((*modernvbert_rows(), *tower.rows), tower.aliases, tower.ignored)
    prefix = "" if ours.tower is None else "language_model."
    head = f"{prefix}lm_head"
    # A buffer that old files carry; and a tied head is the embeddings once more.
    ignored = ("**.rotary_emb.inv_freq", *([f"{head}.weight"] if ours.decoder.tied_head else []))
    if ours.tower is None:
        return NameTable(decoder_rows(config["model_type"], prefix, head), ignored=ignored)
    text, vision = parts(config)
    tower = tower_table(vision, "vision_tower.")
    layers = ("linear",) if config["model_type"] == PALIGEMMA else ("linear_1", "linear_2")
    connector = [
        MappingRow(
            f"connector.layers.{2 * place}.{kind}", (f"multi_modal_projector.{theirs}.{kind}",)
        )
        for place, theirs in enumerate(layers)
        for kind in ("weight", "bias")
    ]
    newer = (
        ("lm_head.weight", f"{head}.weight"),
        ("model.language_model.**", "language_model.model.**"),
        ("model.multi_modal_projector.**", "multi_modal_projector.**"),
        ("model.vision_tower.**", "vision_tower.**"),
        ("model.image_newline", "image_newline"),
    )
    newline = MappingRow("image_newline", ("image_newline",))
    return NameTable(
        rows=(*decoder_rows(text["model_type"], prefix, head), *connector, newline, *tower.rows),
        aliases=(*newer, *tower.aliases),
        ignored=(*ignored, *tower.ignored),
    )


def _idefics3_table(config: Json, ours: VLMConfig) -> NameTable:
    """Return the names of an Idefics3 or SmolVLM."""
    kind = section(config, "text_config").get("model_type", "llama")
    fold = MappingRow(
        "connector.layers.0.weight", ("model.connector.modality_projection.proj.weight",)
    )
    text = decoder_rows(kind, "", "lm_head", body="model.text_model")
    ignored = ("lm_head.weight",) if ours.decoder.tied_head else ()
    return NameTable(
        rows=(*text, fold, *clip_rows("model.vision_model")),
        ignored=("**.rotary_emb.inv_freq", *ignored),
    )


def _name_of(ours: str, tensors: Mapping[str, Tensor], table: NameTable) -> str:
    """Return the name under which a tensor of ours is stored."""
    found = {name: table.part_of(table.canonical(name)) for name in tensors}
    return next(name for name, part in found.items() if part and part[0].ours == ours)


def _vlm_sizes(config: VLMConfig) -> Sizes:
    decoder = config.decoder
    vit = config.tower.second if isinstance(config.tower, MixtureConfig) else config.tower
    tower = (
        _tower_sizes(vit)
        if isinstance(vit, ViTConfig | NaFlexConfig | Qwen2VLTowerConfig)
        else None
    )

    def sizes(layer: int) -> Mapping[str, int]:
        return {
            "q": decoder.per_layer(decoder.num_heads, layer) * decoder.head_dim,
            "kv": decoder.per_layer(decoder.num_kv_heads, layer) * decoder.head_dim,
            "ffn": decoder.per_layer(decoder.ffn_width, layer),
            **(tower(layer) if tower else {}),
            **_text_sizes(config, layer),
        }

    return sizes


def _text_sizes(config: VLMConfig, layer: int) -> dict[str, int]:
    text, vision = config.text_tower, config.tower
    found = {"text_width": text.width} if text else {}
    if isinstance(text, GemmaEncoderConfig):
        at = min(layer, text.num_layers - 1)  # the tower may have more
        head = text.head_dims[at]
        found |= {"text_q": text.num_heads * head, "text_kv": text.kv_heads[at] * head}
        found["text_ffn"] = text.ffn_width
    if isinstance(vision, GemmaTowerConfig):
        each = vision.num_heads * vision.head_dim
        found |= {"width_q": each, "width_kv": each, "gate": vision.ffn_width}
    return found


def _tower_sizes(config: ViTConfig | NaFlexConfig | Qwen2VLTowerConfig) -> Sizes:
    return lambda _: {"width": config.width, "gate": config.ffn_width}


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
