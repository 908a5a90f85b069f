"""Settings of published models as folders without weights, for dry runs of recipes that name them.

Each config.json holds what the published one sets beyond its class.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from typing import Any

from visavis.checkpoints import phi3v
from visavis.checkpoints.tinyllava.config import LANGUAGE_MODELS as SMALL
from visavis.checkpoints.tinyllava.config import TOWERS, image_processor
from visavis.checkpoints.transformers.config_reader import Json
from visavis.checkpoints.transformers.vision_models import vit_config
from visavis.train.recipe import Recipe


def _sizes(kind: str, width: int, ffn: int, layers: int, heads: int, kv: int, **more: Any) -> Json:
    return {
        "model_type": kind,
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        **more,
    }


_LONG = {"max_position_embeddings": 32768, "rope_theta": 1e6}
_TIED = {"tie_word_embeddings": True}
_VICUNA: dict[str, Any] = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_MISTRAL: dict[str, Any] = {**_LONG, "sliding_window": None, "rms_norm_eps": 1e-5}
LANGUAGE_MODELS: dict[str, Json] = {
    **SMALL,
    "lmsys/vicuna-7b-v1.5": _sizes("llama", 4096, 11008, 32, 32, 32, **_VICUNA),
    "lmsys/vicuna-13b-v1.5": _sizes("llama", 5120, 13824, 40, 40, 40, **_VICUNA),
    "mistralai/Mistral-7B-Instruct-v0.2": _sizes("mistral", 4096, 14336, 32, 32, 8, **_MISTRAL),
    "meta-llama/Meta-Llama-3-8B-Instruct": _sizes(
        "llama", 4096, 14336, 32, 32, 8, vocab_size=128256, max_position_embeddings=8192
    ),
    "Qwen/Qwen2-1.5B-Instruct": _sizes("qwen2", 1536, 8960, 28, 12, 2, **_LONG, **_TIED),
    "Qwen/Qwen2.5-1.5B-Instruct": _sizes("qwen2", 1536, 8960, 28, 12, 2, **_LONG, **_TIED),
    "Qwen/Qwen2-7B-Instruct": _sizes("qwen2", 3584, 18944, 28, 28, 4, **_LONG, vocab_size=152064),
    "Qwen/Qwen2.5-7B-Instruct": _sizes("qwen2", 3584, 18944, 28, 28, 4, **_LONG, vocab_size=152064),
}


def _original(language_model: str, tower: str, **more: Any) -> Json:
    """LLaVA's own config.json: the language model's settings with others beside."""
    return {
        **LANGUAGE_MODELS[language_model],
        "mm_vision_tower": tower,
        "mm_projector_type": "mlp2x_gelu",
        **more,
    }


def _onevision(language_model: str) -> Json:
    return _original(
        language_model,
        "google/siglip-so400m-patch14-384",
        architectures=["LlavaQwenForCausalLM"],
        image_aspect_ratio="anyres_max_9",
        image_grid_pinpoints="(1x1),...,(6x6)",
        mm_patch_merge_type="spatial_unpad",
    )


def _qwen2_vl(width: int, ffn: int, heads: int, kv: int, **more: Any) -> Json:
    sizes = _sizes("qwen2_vl", width, ffn, 28, heads, kv, **_LONG, **more)
    return {**sizes, "vision_config": {"hidden_size": width}}


def _qwen2_5_vl(width: int, ffn: int, layers: int, heads: int, kv: int, **more: Any) -> Json:
    sizes = _sizes("qwen2_5_vl", width, ffn, layers, heads, kv, **_LONG, **more)
    vision = {"hidden_size": 1280, "out_hidden_size": width, "tokens_per_second": 2}
    return {**sizes, "vision_config": vision}


def _qwen3_vl(width: int, ffn: int, layers: int, heads: int, vision: Json, **more: Any) -> Json:
    text = _sizes("qwen3_vl_text", width, ffn, layers, heads, 8)
    text |= {"max_position_embeddings": 262144, "rope_theta": 5e6}
    whole = {"model_type": "qwen3_vl", "text_config": text}
    return {**whole, "vision_config": {**vision, "out_hidden_size": width}, **more}


def _llava_next(language_model: str, vocab_size: int) -> Json:
    text = {**LANGUAGE_MODELS[language_model], "vocab_size": vocab_size}
    return {"model_type": "llava_next", "text_config": text}


_SMALL_TOWER: Json = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "deepstack_visual_indexes": [5, 11, 17],
}
_CLIP_336 = "openai/clip-vit-large-patch14-336"
_PHI3V: Json = {
    "model_type": "phi3_v",
    "embd_layer": phi3v.EMBEDDER_SETTINGS,
    "img_processor": {"image_dim_out": 1024, "model_name": _CLIP_336},
    "max_position_embeddings": 131072,
    "rope_scaling": {"type": "su", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48},
    "sliding_window": 262144,
}
MODELS: dict[str, Json] = {
    "Qwen/Qwen2-VL-2B-Instruct": _qwen2_vl(1536, 8960, 12, 2, vocab_size=151936, **_TIED),
    "Qwen/Qwen2-VL-7B-Instruct": _qwen2_vl(3584, 18944, 28, 4),
    "Qwen/Qwen2.5-VL-3B-Instruct": _qwen2_5_vl(2048, 11008, 36, 16, 2, vocab_size=151936, **_TIED),
    "Qwen/Qwen2.5-VL-7B-Instruct": _qwen2_5_vl(3584, 18944, 28, 28, 4),
    "Qwen/Qwen3-VL-2B-Instruct": _qwen3_vl(2048, 6144, 28, 16, _SMALL_TOWER, **_TIED),
    "Qwen/Qwen3-VL-4B-Instruct": _qwen3_vl(2560, 9728, 36, 32, _SMALL_TOWER, **_TIED),
    "Qwen/Qwen3-VL-8B-Instruct": _qwen3_vl(4096, 12288, 36, 32, {}),
    "microsoft/Phi-3.5-vision-instruct": _PHI3V,
    "llava-hf/llava-v1.6-mistral-7b-hf": _llava_next("mistralai/Mistral-7B-Instruct-v0.2", 32064),
    "llava-hf/llava-v1.6-vicuna-7b-hf": _llava_next("lmsys/vicuna-7b-v1.5", 32064),
    "liuhaotian/llava-v1.5-7b": _original(
        "lmsys/vicuna-7b-v1.5", _CLIP_336, model_type="llava", image_aspect_ratio="pad"
    ),
    "lmms-lab/llava-onevision-qwen2-0.5b-ov": _onevision("Qwen/Qwen2-0.5B-Instruct"),
    "lmms-lab/llava-onevision-qwen2-7b-ov": _onevision("Qwen/Qwen2-7B-Instruct"),
    "BAAI/Aquila-VL-2B-llava-qwen": _onevision("Qwen/Qwen2.5-1.5B-Instruct"),
}

PROCESSORS: dict[str, Json] = {  # preprocessor_config.json, by model_type
    "qwen2_vl": {"image_processor_type": "Qwen2VLImageProcessor"},
    "qwen2_5_vl": {"image_processor_type": "Qwen2VLImageProcessor"},
    "qwen3_vl": {"image_processor_type": "Qwen2VLImageProcessorFast", "patch_size": 16},
    "phi3_v": {"image_processor_type": "Phi3VImageProcessor", "num_crops": 16},
    "llava_next": {
        "image_processor_type": "LlavaNextImageProcessor",
        "size": {"shortest_edge": 336},
        "crop_size": {"height": 336, "width": 336},
    },
}


def save_settings(folder: Path, name: str) -> Path:
    """Write the settings of a published model below `folder`; return their folder."""
    out = folder / name
    out.mkdir(parents=True, exist_ok=True)
    files = {}
    if name in TOWERS:
        files["config.json"] = TOWERS[name]
        size = vit_config(TOWERS[name]).image_size
        files["preprocessor_config.json"] = image_processor(TOWERS[name], size)
    else:
        known = {PurePath(one).name: config for one, config in (LANGUAGE_MODELS | MODELS).items()}
        config = files["config.json"] = known[PurePath(name).name]
        if settings := PROCESSORS.get(str(config["model_type"])):
            files["preprocessor_config.json"] = settings
    for file, settings in files.items():
        (out / file).write_text(json.dumps(settings), encoding="utf-8")
    return out


def with_local_settings(recipe: Recipe, folder: Path) -> Recipe:
    """Return a recipe whose names of published models are folders with their settings."""
    local = {}
    for part in ("base", "language_model", "vision_tower"):
        name = getattr(recipe.model, part)
        if "/" in name and not Path(name).exists():
            local[part] = str(save_settings(folder, name))
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=local)})
