"""Qwen3-VL of transformers: its config.json as ours. Tensor names and processors are in
`qwen2_vl.py`.

Models of experts and hybrids of the same generation are other models and refused.
"""

from __future__ import annotations

from math import isqrt
from typing import Any

from visavis.checkpoints.transformers.config_reader import (
    Json,
    count,
    require,
    section,
    without_nulls,
)
from visavis.checkpoints.transformers.qwen2_vl import (
    block_numbers,
    tied_head,
    tower_fields,
    whole,
    with_axes,
)
from visavis.model.config import DecoderConfig, Qwen2VLTowerConfig, VLMConfig

KIND = "qwen3_vl"
TEXT: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5e5,
}
VISION: dict[str, Any] = {
    "depth": 27,
    "hidden_size": 1152,
    "out_hidden_size": 3584,
    "hidden_act": "gelu_pytorch_tanh",
    "intermediate_size": 4304,
    "num_heads": 16,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}


def qwen3_vl_config(config: Json) -> VLMConfig:
    """Return the model that a config.json describes.

    Raises:
        CheckpointError: a setting that no part of ours has.
    """
    vision = VISION | without_nulls(section(config, "vision_config"))
    width = count(vision, "out_hidden_size")
    return whole(config, _decoder(config), _tower(vision), "out_hidden_size", width)


def _decoder(config: Json) -> DecoderConfig:
    """Return the language model: a Qwen3 whose positions have three axes, in turn."""
    nested = without_nulls(section(config, "text_config"))
    rope = section(nested, "rope_parameters") or section(nested, "rope_scaling")
    interleaved = rope.get("mrope_interleaved", True)
    require("mrope_interleaved", interleaved, interleaved is True, "true")
    text = TEXT | nested
    text |= {"model_type": "qwen3", "tie_word_embeddings": tied_head(config, nested)}
    return with_axes(text, [24, 20, 20], interleaved=True)


def _tower(vision: Json) -> Qwen2VLTowerConfig:
    shape = tower_fields(vision, "hidden_size")
    positions = count(vision, "num_position_embeddings")
    side = isqrt(positions)
    require("num_position_embeddings", positions, side * side == positions, "a square")
    return Qwen2VLTowerConfig(
        **shape,
        ffn_width=count(vision, "intermediate_size"),
        patch_bias=True,
        position_side=side,
        deepstack_blocks=block_numbers(vision, "deepstack_visual_indexes", shape["num_layers"]),
    )
