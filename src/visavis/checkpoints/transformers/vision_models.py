"""Whole models and vision towers of transformers: their config.json as our configs.

Takes parsed JSON: opens no file and imports no transformers. Settings missing from a
file take the library's default; a setting that no part of ours has is an error that names it.
Language models are in `language_models.py`, tensor names in `weights.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from visavis.checkpoints.transformers.config_reader import (
    Json,
    count,
    number,
    require,
    section,
    unknown_type,
    vit_fields,
    without_nulls,
)
from visavis.checkpoints.transformers.idefics3 import KINDS as IDEFICS3
from visavis.checkpoints.transformers.idefics3 import idefics3_config
from visavis.checkpoints.transformers.internvl import KIND as INTERNVL
from visavis.checkpoints.transformers.internvl import ORIGINAL as INTERNVL_CHAT
from visavis.checkpoints.transformers.internvl import internvl_config, refuse_original
from visavis.checkpoints.transformers.language_models import KINDS, decoder_config
from visavis.checkpoints.transformers.llava_onevision15 import KIND as ONEVISION_15
from visavis.checkpoints.transformers.llava_onevision15 import onevision15_config
from visavis.checkpoints.transformers.modernvbert import KIND as MODERNVBERT
from visavis.checkpoints.transformers.modernvbert import modernvbert_config
from visavis.checkpoints.transformers.multi_vector import KINDS as MULTI_VECTOR
from visavis.checkpoints.transformers.multi_vector import multi_vector_parts, with_multi_vectors
from visavis.checkpoints.transformers.qwen2_vl import KIND as QWEN2_VL
from visavis.checkpoints.transformers.qwen2_vl import KIND_2_5 as QWEN2_5_VL
from visavis.checkpoints.transformers.qwen2_vl import qwen2_vl_config
from visavis.checkpoints.transformers.qwen3_vl import KIND as QWEN3_VL
from visavis.checkpoints.transformers.qwen3_vl import qwen3_vl_config
from visavis.model.config import ConnectorConfig, ImageLayoutConfig, ViTConfig, VLMConfig

VIT: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
}
CLIP = VIT | {
    "intermediate_size": 3072,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
SIGLIP = VIT | {
    "intermediate_size": 3072,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
DINOV2 = VIT | {"mlp_ratio": 4, "patch_size": 14, "hidden_act": "gelu", "layer_norm_eps": 1e-6}
REGISTERS = DINOV2 | {"patch_size": 16, "num_register_tokens": 4}
LLAVA_TOWER: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
ONEVISION_TOWER: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
MAX_FEATURE_LAYERS = 16
TOWERS = {
    "clip_vision_model": CLIP,
    "siglip_vision_model": SIGLIP,
    "dinov2": DINOV2,
    "dinov2_with_registers": REGISTERS,
}


@dataclass(frozen=True)
class Llava:
    """A model type made of a vision tower and a language model, and what its files leave out.

    Args:
        text: model type of a text_config that names none.
        vision: settings of a vision_config that names no model type.
        settings: of the whole.
    """

    text: str
    vision: dict[str, Any]
    settings: dict[str, Any]


CLIP_BASED = Llava(
    "llama",
    LLAVA_TOWER,
    {
        "image_token_id": 32000,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    },
)
LLAVAS = {
    "llava": CLIP_BASED,
    "llava_next": CLIP_BASED,
    "llava_onevision": Llava(
        "qwen2",
        ONEVISION_TOWER,
        {
            "image_token_id": 151646,
            "video_token_id": 151647,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_9",
        },
    ),
}

PALIGEMMA = "paligemma"
LLAVAS[PALIGEMMA] = Llava(
    "gemma",
    SIGLIP | {"model_type": "siglip_vision_model"},
    {"image_token_id": 256000, "projection_dim": 2048},
)


def vlm_config(config: Json) -> VLMConfig:
    """Return the model that a config.json describes.

    Raises:
        CheckpointError: another type, or a setting that no part of ours has.
    """
    kind = config.get("model_type")
    if kind in KINDS:
        return VLMConfig(decoder=decoder_config(config))
    if isinstance(kind, str) and kind in READERS:
        return READERS[kind](config)
    if not isinstance(kind, str) or kind not in LLAVAS:
        raise unknown_type(kind, (*KINDS, *LLAVAS, *(k for k in READERS if k != INTERNVL_CHAT)))
    text, vision = parts(config)
    tower, decoder = vit_config(vision), decoder_config(text)
    config = LLAVAS[kind].settings | without_nulls(config)
    layer, select = config["vision_feature_layer"], config["vision_feature_select_strategy"]
    layers = layer if isinstance(layer, list) else [layer]
    there = range(-tower.num_layers - 1, tower.num_layers + 1)
    fits = 0 < len(layers) <= MAX_FEATURE_LAYERS and all(type(n) is int for n in layers)
    fits = fits and all(one in there for one in layers)
    require("vision_feature_layer", layer, fits, f"one or some of {tower.num_layers} layers")
    require("vision_feature_select_strategy", select, select in ("default", "full"), "one of two")
    # "default" drops exactly the first token, whatever the tower is; tiles need a square of them.
    fits = select == "full" or tower.num_prefix_tokens == 1
    require("vision_feature_select_strategy", select, fits, "'full' for this tower")
    fits = select == "default" or tower.num_prefix_tokens == 0 or kind == "llava"
    require("vision_feature_select_strategy", select, fits, "'default' for this tower")
    act = config.get("projector_hidden_act", "gelu")
    require("projector_hidden_act", act, act == "gelu", "'gelu'")
    bias = config.get("multimodal_projector_bias", True)
    require("multimodal_projector_bias", bias, bias is True, "true")
    return VLMConfig(
        decoder=decoder,
        tower=tower,
        connector=ConnectorConfig("mlp", tower.width * len(layers), decoder.width, depth=2),
        image_token_id=_placeholder(config, "image", decoder.vocab_size),
        video_token_id=(
            _placeholder(config, "video", decoder.vocab_size) if "video_token_id" in config else -1
        ),
        select_layer=layer if isinstance(layer, int) else tuple(layer),
        select_feature="patch" if select == "default" else "class_patch",
        merge=_merge(kind, config),
    )


def _paligemma_config(config: Json) -> VLMConfig:
    """Return a PaliGemma, all of whose prompt is its prefix: every token sees every other."""
    text, vision = parts(config)
    both_ways = text.get("use_bidirectional_attention")
    known = both_ways in (None, True)
    require("use_bidirectional_attention", both_ways, known, "true or null")
    decoder = replace(decoder_config(text | {"use_bidirectional_attention": None}), causal=False)
    tower = replace(vit_config(vision), norm_output=True)
    config = LLAVAS[PALIGEMMA].settings | without_nulls(config)
    width = count(config, "projection_dim")
    require("projection_dim", width, width == decoder.width, f"{decoder.width}")
    return VLMConfig(
        decoder=decoder,
        tower=tower,
        connector=ConnectorConfig("linear", tower.width, decoder.width),
        image_token_id=_placeholder(config, "image", decoder.vocab_size),
    )


def _modernvbert_config(config: Json) -> VLMConfig:
    vision = {"model_type": "siglip_vision_model"} | section(config, "vision_config")
    return modernvbert_config(config, vit_config(vision))


def _multi_vector_config(config: Json) -> VLMConfig:
    return with_multi_vectors(config, vlm_config(multi_vector_parts(config)))


READERS: dict[str, Callable[[Json], VLMConfig]] = {  # of model types with a config of their own
    QWEN2_VL: qwen2_vl_config,
    QWEN2_5_VL: qwen2_vl_config,
    QWEN3_VL: qwen3_vl_config,
    **dict.fromkeys(MULTI_VECTOR, _multi_vector_config),
    **dict.fromkeys(IDEFICS3, idefics3_config),
    MODERNVBERT: _modernvbert_config,
    ONEVISION_15: onevision15_config,
    INTERNVL: internvl_config,
    INTERNVL_CHAT: refuse_original,
    PALIGEMMA: _paligemma_config,
}


def _placeholder(config: Json, visual: str, vocab_size: int) -> int:
    """Return the id that stands for an image or a video."""
    name = f"{visual}_token_index"
    found: Any = config.get(name, config[f"{visual}_token_id"])
    in_vocabulary = isinstance(found, int) and 0 <= found < vocab_size
    require(name, found, in_vocabulary, f"0 to {vocab_size - 1}")
    return int(found)


def _merge(kind: str, config: Json) -> ImageLayoutConfig:
    """Return how the library puts an image's views or a video's frames together."""
    if kind == "llava":
        return ImageLayoutConfig()
    if kind == "llava_next":
        return ImageLayoutConfig("spatial", unpad=True, newline=True, round_unpad=True)
    aspect = config["vision_aspect_ratio"]
    found = re.fullmatch("anyres_max_([1-9][0-9]{0,3})", str(aspect))
    require("vision_aspect_ratio", aspect, bool(found), "'anyres_max_' and a number")
    assert found is not None
    return ImageLayoutConfig(
        "spatial",
        unpad=True,
        newline=True,
        round_unpad=True,
        max_tiles=int(found[1]),
        video_pool=2,
    )


def vit_config(config: Json) -> ViTConfig:
    """Return the tower that a vision config.json describes, alone or within a CLIP or SigLIP.

    Raises:
        CheckpointError: another type, or a setting that our tower does not have.
    """
    config = vision_part(config)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in TOWERS:
        raise unknown_type(kind, tuple(TOWERS))
    config = TOWERS[kind] | without_nulls(config)
    fields = vit_fields(config)
    if kind == "clip_vision_model":
        return ViTConfig(**fields, ffn_width=count(config, "intermediate_size"), pre_norm=True)
    if kind == "siglip_vision_model":
        ffn_width = count(config, "intermediate_size")
        return ViTConfig(**fields, ffn_width=ffn_width, class_token=False, patch_bias=True)
    require("qkv_bias", (bias := config.get("qkv_bias", True)), bias is True, "true")
    ffn_width, gated = (
        int(fields["width"] * number(config, "mlp_ratio")),
        config.get("use_swiglu_ffn", False),
    )
    if gated:  # two thirds, in steps of 8, so that three matrices cost what two did
        ffn_width, fields["activation"] = (int(ffn_width * 2 / 3) + 7) // 8 * 8, "silu"
    return ViTConfig(
        **fields,
        ffn_width=ffn_width,
        patch_bias=True,
        layer_scale=True,
        gated_ffn=gated,
        num_registers=config.get("num_register_tokens", 0),
        position_antialias=kind == "dinov2_with_registers",
    )


def parts(config: Json) -> tuple[dict[str, Any], Json]:
    """Return the text and vision configs of a llava, with what they take from the outer one."""
    defaults = LLAVAS[config["model_type"]]
    text = {"model_type": defaults.text} | section(config, "text_config")
    if config.get("tie_word_embeddings"):
        text["tie_word_embeddings"] = True
    vision = without_nulls(section(config, "vision_config"))
    return text, vision if "model_type" in vision else defaults.vision | vision


def vision_part(config: Json) -> Json:
    """Return the vision config of a whole CLIP or SigLIP, or the config itself."""
    kind = config.get("model_type")
    if kind in ("clip", "siglip"):
        vision = without_nulls(section(config, "vision_config"))
        return {"model_type": f"{kind}_vision_model"} | vision
    return config
