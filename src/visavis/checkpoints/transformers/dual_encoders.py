"""Configs and tensor names of CLIP, SigLIP, SigLIP 2 and MetaCLIP 2: two towers and no decoder.

    vision_model.*   text_model.*   visual_projection, text_projection (CLIP)
    logit_scale, logit_bias (SigLIP)

SigLIP 2 of one resolution has SigLIP's classes; `siglip2` is the one for any aspect ratio (NaFlex).
"""

from __future__ import annotations

from typing import Any

from visavis.checkpoints.transformers.config_reader import (
    Json,
    activation,
    count,
    num_layers,
    number,
    require,
    section,
    without_nulls,
)
from visavis.checkpoints.transformers.vision_models import CLIP, SIGLIP, vit_config
from visavis.checkpoints.transformers.weights import clip_block_rows, clip_rows
from visavis.checkpoints.weight_mapping import MappingRow, NameTable
from visavis.model.config import HeadConfig, ViTConfig, VLMConfig, no_decoder
from visavis.model.embedder_config import ClipTextConfig, NaFlexConfig

CLIP_TEXT: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
SIGLIP_TEXT: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 64,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
NAFLEX: dict[str, Any] = SIGLIP | {"num_patches": 256}
LEGACY_EOS = 2  # in old files of CLIP: wrong, and read as "the highest id"


def dual_config(config: Json, words: Json) -> VLMConfig:
    """Return the model that a config.json describes.

    Args:
        words: tokenizer_config.json, which says on which side texts are padded.

    Raises:
        CheckpointError: a setting that our towers do not have.
    """
    kind = config["model_type"]
    text, vision = (_part(config, name) for name in ("text", "vision"))
    if kind in ("clip", "metaclip_2"):
        tower: ViTConfig | NaFlexConfig = vit_config({"model_type": "clip_vision_model"} | vision)
        text_tower = _text_tower(CLIP_TEXT | text, kind, "")
        dim = count({"projection_dim": 512} | without_nulls(config), "projection_dim")
        scores: Any = "softmax"
    else:
        require("vision_use_head", False, vision.get("vision_use_head", True) is True, "true")
        side = words.get("padding_side", "right")
        require("padding_side", side, side in ("left", "right"), "'left' or 'right'")
        text_tower = _text_tower(SIGLIP_TEXT | text, kind, side)
        tower = (
            _naflex(vision)
            if kind == "siglip2"
            else vit_config({"model_type": "siglip_vision_model"} | vision)
        )
        dim, scores = tower.width, "sigmoid"
        size = text.get("projection_size", text_tower.width)
        require("projection_size", size, size == dim, f"{dim}, the vision tower's hidden_size")
    if isinstance(tower, ViTConfig):
        pooling: Any = "class" if scores == "softmax" else "attention"
        tower = ViTConfig(**{**vars(tower), "pooling": pooling})
    return VLMConfig(
        decoder=no_decoder(text_tower),
        tower=tower,
        head=HeadConfig((), dim, tower.width, text_tower.width, scores=scores),
        image_token_id=0,
        text_tower=text_tower,
    )


def _part(config: Json, name: str) -> dict[str, Any]:
    """Return the settings of one tower; those of old files' `text_config_dict` and
    `vision_config_dict` win, with defaults in place of what they leave out."""
    found = without_nulls(section(config, f"{name}_config"))
    found.pop("model_type", None)
    if old := without_nulls(section(config, f"{name}_config_dict")):
        defaults = {"text": CLIP_TEXT, "vision": CLIP}[name]
        found |= defaults | {key: value for key, value in old.items() if key != "model_type"}
    return found


def _text_tower(config: Json, kind: str, padded: Any) -> ClipTextConfig:
    width, heads = count(config, "hidden_size"), count(config, "num_attention_heads")
    require("num_attention_heads", heads, width % heads == 0, f"a divisor of {width}")
    fields: dict[str, Any] = {"pooling": "last"}
    if not padded:
        eos = config["eos_token_id"]
        require("eos_token_id", eos, type(eos) is int and eos >= 0, "one token id")
        legacy = kind == "clip" and eos == LEGACY_EOS
        fields = {"pooling": "highest"} if legacy else {"pooling": "eos", "eos_id": eos}
    return ClipTextConfig(
        vocab_size=count(config, "vocab_size"),
        width=width,
        num_layers=num_layers(config),
        num_heads=heads,
        ffn_width=count(config, "intermediate_size"),
        context_length=count(config, "max_position_embeddings"),
        activation=activation(config),
        norm_eps=number(config, "layer_norm_eps"),
        causal=not padded,
        padded=padded,
        **fields,
    )


def _naflex(vision: dict[str, Any]) -> NaFlexConfig:
    config = NAFLEX | vision
    require("num_channels", (n := config.get("num_channels", 3)), n == 3, "3")
    width, heads = count(config, "hidden_size"), count(config, "num_attention_heads")
    require("num_attention_heads", heads, width % heads == 0, f"a divisor of {width}")
    positions = count(config, "num_patches")
    require("num_patches", positions, round(positions**0.5) ** 2 == positions, "a square number")
    return NaFlexConfig(
        patch_size=count(config, "patch_size"),
        num_positions=positions,
        width=width,
        num_layers=num_layers(config),
        num_heads=heads,
        ffn_width=count(config, "intermediate_size"),
        activation=activation(config),
        norm_eps=number(config, "layer_norm_eps"),
    )


def dual_table(config: VLMConfig) -> NameTable:
    """Return the names of a dual encoder's tensors."""
    assert config.head is not None
    sigmoid = config.head.scores == "sigmoid"
    text, pool = "text_model", "vision_model.head"
    rows = [
        *clip_rows("vision_model"),
        MappingRow("tower.pool.probe", (f"{pool}.probe",), unit_axes=2),
        MappingRow("text_tower.embed.weight", (f"{text}.embeddings.token_embedding.weight",)),
        MappingRow("text_tower.positions", (f"{text}.embeddings.position_embedding.weight",)),
        *clip_block_rows("text_tower.blocks.*", f"{text}.encoder.layers.*", "text_width"),
        MappingRow("dual_head.image.weight", ("visual_projection.weight",)),
        MappingRow("dual_head.logit_scale", ("logit_scale",), unit_axes=int(sigmoid)),
        MappingRow("dual_head.logit_bias", ("logit_bias",), unit_axes=1),
    ]
    projection = f"{text}.head" if sigmoid else "text_projection"
    for kind in ("weight", "bias"):
        rows += [
            MappingRow(f"tower.pool.qkv.{kind}", (f"{pool}.attention.in_proj_{kind}",)),
            MappingRow(f"tower.pool.out.{kind}", (f"{pool}.attention.out_proj.{kind}",)),
            MappingRow(f"tower.pool.norm.{kind}", (f"{pool}.layernorm.{kind}",)),
            MappingRow(f"tower.pool.up.{kind}", (f"{pool}.mlp.fc1.{kind}",)),
            MappingRow(f"tower.pool.down.{kind}", (f"{pool}.mlp.fc2.{kind}",)),
            MappingRow(f"text_tower.norm.{kind}", (f"{text}.final_layer_norm.{kind}",)),
            MappingRow(f"dual_head.text.{kind}", (f"{projection}.{kind}",)),
        ]
    ignored = tuple(f"{part}.embeddings.position_ids" for part in ("vision_model", text))
    # modules of the library until 5.x had one model more inside
    aliases = (
        ("text_model.text_model.**", "text_model.**"),
        ("vision_model.vision_model.**", "vision_model.**"),
    )
    return NameTable(tuple(rows), aliases, ignored)
