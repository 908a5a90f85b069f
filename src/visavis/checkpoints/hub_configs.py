"""Shapes of published models by their names on the hub, for plans made where their files are not.

Nothing is loaded by these: a model that is there says itself what it is (`describe.py`). Holds what
each config.json sets beyond its class; TinyLLaVA's and LLaVA's own tables are used where they have
the part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

from visavis.checkpoints import phi3v as phi3v
from visavis.checkpoints.llava import config as llava
from visavis.checkpoints.tinyllava.config import LANGUAGE_MODELS as SMALL
from visavis.checkpoints.tinyllava.config import TOWERS, image_processor
from visavis.checkpoints.transformers.config_reader import Json
from visavis.checkpoints.transformers.language_models import decoder_config
from visavis.checkpoints.transformers.processor import processor_config
from visavis.checkpoints.transformers.qwen2_vl import CLASS, qwen2_vl_processor
from visavis.checkpoints.transformers.vision_models import vit_config, vlm_config
from visavis.model.config import DecoderConfig, Qwen2VLTowerConfig, ViTConfig, VLMConfig
from visavis.processing.images import ImageProcessorConfig


@dataclass(frozen=True)
class Outline:
    """A model without its numbers."""

    config: VLMConfig
    processor: ImageProcessorConfig | None = None


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


def _llava_next(language_model: str, vocab_size: int) -> Json:
    text = {**LANGUAGE_MODELS[language_model], "vocab_size": vocab_size}
    return {"model_type": "llava_next", "text_config": text}


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


def outline(name: str) -> Outline | None:
    """Return a model's shape, None if it is not known."""
    if (text := _find(LANGUAGE_MODELS, name)) is not None:
        return Outline(VLMConfig(decoder=decoder_config(text)))
    config = _find(MODELS, name)
    if config is None:
        return None
    readers: dict[str, Callable[[Json], Outline]] = {
        "qwen2_vl": _read_qwen2_vl,
        "phi3_v": _read_phi3v,
        "llava_next": _read_llava_next,
    }
    return readers.get(str(config["model_type"]), _read_original)(config)


def language_model(name: str) -> DecoderConfig | None:
    """Return a language model's shape, that of a whole model's too."""
    found = outline(name)
    return None if found is None else found.config.decoder


def tower(name: str) -> tuple[ViTConfig, ImageProcessorConfig] | None:
    """Return the shape of a vision tower, and how its pictures are sized."""
    config = _find(TOWERS, name)
    if config is None:
        return None
    found = vit_config(config)
    return found, processor_config(image_processor(config, found.image_size))


def _find(table: dict[str, Json], name: str) -> Json | None:
    """Return what a table says of a name on the hub, whoever's copy it is."""
    last = PurePath(name).name.partition("@")[0]
    return next((table[one] for one in table if PurePath(one).name == last), None)


def _read_qwen2_vl(config: Json) -> Outline:
    found = vlm_config(config)
    assert isinstance(found.tower, Qwen2VLTowerConfig)
    settings = {"image_processor_type": CLASS}
    return Outline(found, qwen2_vl_processor(settings, None, found.tower))


def _read_phi3v(config: Json) -> Outline:
    return Outline(phi3v.vlm_config(config), phi3v.image_processor(config, {"num_crops": 16}))


def _read_llava_next(config: Json) -> Outline:
    settings = {
        "image_processor_type": "LlavaNextImageProcessor",
        "size": {"shortest_edge": 336},
        "crop_size": {"height": 336, "width": 336},
    }
    return Outline(vlm_config(config), processor_config(settings))


def _read_original(config: Json) -> Outline:
    known = llava.known_tower(config)
    assert known is not None
    vision, settings = known
    found = llava.vlm_config(config, llava.text_config(config), vision)
    processor = processor_config(settings)
    tiles = llava.tiles_config(config, processor.size)
    return Outline(found, replace(processor, resize="squash" if tiles else "pad", tiles=tiles))
