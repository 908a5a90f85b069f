"""What TinyLLaVA's config.json names and leaves out: language models, towers, picture sizing.

The original fetches these from the hub; here they are data, by the last part of the name (authors
trained from copies of their own). Holds what each published config.json sets beyond its class.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from visavis.checkpoints.llava.layout import KNOWN_TOWERS
from visavis.checkpoints.transformers.settings import Json
from visavis.errors import CheckpointError


def _openelm(layers: int, width: int, head_dim: int) -> dict[str, Any]:
    return {
        "model_type": "openelm",
        "num_transformer_layers": layers,
        "model_dim": width,
        "head_dim": head_dim,
        "num_gqa_groups": 4,
        "qkv_multipliers": [0.5, 1.0],
        "ffn_multipliers": [0.5, 4.0],
        "normalize_qk_projections": True,
        "share_input_output_layers": True,
    }


def _sizes(kind: str, width: int, ffn: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **more,
    }


_QWEN: dict[str, Any] = {
    "num_key_value_heads": 2,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
}
_QWEN_05B = _sizes("qwen2", 896, 4864, 24, 14, **_QWEN)
_QWEN_3B = _sizes("qwen2", 2048, 11008, 36, 16, **_QWEN)

LANGUAGE_MODELS: dict[str, Json] = {
    "apple/OpenELM-270M": _openelm(16, 1280, 64),
    "apple/OpenELM-270M-Instruct": _openelm(16, 1280, 64),
    "apple/OpenELM-450M": _openelm(20, 1536, 64),
    "apple/OpenELM-450M-Instruct": _openelm(20, 1536, 64),
    "apple/OpenELM-1_1B-Instruct": _openelm(28, 2048, 64),
    "apple/OpenELM-3B-Instruct": _openelm(36, 3072, 128),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _sizes(
        "llama", 2048, 5632, 22, 32, num_key_value_heads=4, rms_norm_eps=1e-5
    ),
    "stabilityai/stablelm-2-zephyr-1_6b": _sizes(
        "stablelm", 2048, 5632, 24, 32, vocab_size=100352, use_qkv_bias=True
    ),
    "Qwen/Qwen2-0.5B": _QWEN_05B | {"max_position_embeddings": 131072},
    "Qwen/Qwen2-0.5B-Instruct": _QWEN_05B,
    "Qwen/Qwen2.5-0.5B": _QWEN_05B,
    "Qwen/Qwen2.5-0.5B-Instruct": _QWEN_05B,
    "Qwen/Qwen2.5-3B": _QWEN_3B,
    "Qwen/Qwen2.5-3B-Instruct": _QWEN_3B,
    "google/gemma-2b-it": _sizes("gemma", 2048, 16384, 18, 8, num_key_value_heads=1),
    "microsoft/phi-2": _sizes("phi", 2560, 10240, 32, 32, partial_rotary_factor=0.4),
}
# Qwen2's chat format depends on which of the two it was; that of other families does not.
QWEN2_TURNS = {
    PurePath(name).name: f"tinyllava_qwen2_{'instruct' if name.endswith('Instruct') else 'base'}"
    for name in LANGUAGE_MODELS
    if LANGUAGE_MODELS[name]["model_type"] == "qwen2"
}

_DINOV2: dict[str, Any] = {"model_type": "dinov2", "image_size": 518}
TOWERS: dict[str, Json] = {
    **{name: vision for name, (vision, _) in KNOWN_TOWERS.items()},
    "openai/clip-vit-base-patch16": {"model_type": "clip_vision_model", "patch_size": 16},
    "facebook/dinov2-base": _DINOV2,
    "facebook/dinov2-large": _DINOV2
    | {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
}
DINOV2_PIXELS = 224  # what its processor cuts out, whatever its positions were learned on


def known(name: str, table: dict[str, Json], what: str, setting: str) -> Json:
    """Return the settings of a published part.

    Args:
        name: on the hub, or a path that ends in the same.
        what: the part, for people.
        setting: where config.json would hold the settings themselves.

    Raises:
        CheckpointError: none is known by that name.
    """
    last = PurePath(name).name
    found = next((table[one] for one in table if PurePath(one).name == last), None)
    if found is None:
        raise CheckpointError(
            f"config.json says of the {what} only that it is {name!r}, expected its settings "
            f"under {setting}, or one of {', '.join(table)}; copy what that model's own "
            f"config.json says into {setting}."
        )
    return found


def image_processor(vision: Json, size: int) -> dict[str, Any]:
    """Return the preprocessor_config.json that towers of a kind are published with.

    Args:
        vision: a vision config.json, `model_type` included.
        size: pixels of its pictures.
    """
    square = {"height": size, "width": size}
    if vision["model_type"] == "siglip_vision_model":
        return {"image_processor_type": "SiglipImageProcessor", "size": square}
    clip = {"image_processor_type": "CLIPImageProcessor", "crop_size": square}
    if vision["model_type"] == "clip_vision_model":
        return {**clip, "size": {"shortest_edge": size}}
    return {
        **clip,
        "size": {"shortest_edge": size * 256 // 224},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
