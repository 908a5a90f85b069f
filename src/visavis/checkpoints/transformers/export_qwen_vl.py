"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL as transformers' config.json and files of its processors: the
inverse of `qwen2_vl.py` and `qwen3_vl.py`.

What is written is read again by that file and must come out the same. Makes JSON; writes no file.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from visavis.checkpoints.transformers.export_config import ACTIVATIONS, decoder_json, inexpressible
from visavis.checkpoints.transformers.export_processor import NUMBERS
from visavis.checkpoints.transformers.llava_onevision15 import onevision15_json
from visavis.checkpoints.transformers.qwen2_vl import KIND, KIND_2_5, qwen2_vl_processor
from visavis.checkpoints.transformers.qwen3_vl import KIND as KIND_3
from visavis.checkpoints.transformers.vision_models import vlm_config
from visavis.errors import CheckpointError
from visavis.model.config import Qwen2VLTowerConfig, VLMConfig
from visavis.processing.config import ImageProcessorConfig, VideoConfig

CLASSES = {KIND: "Qwen2VL", KIND_2_5: "Qwen2_5_VL", KIND_3: "Qwen3VL"}
VIDEO_CLASSES = {
    KIND: "Qwen2VLVideoProcessor",
    KIND_2_5: "Qwen2VLVideoProcessor",
    KIND_3: "Qwen3VLVideoProcessor",
}


def qwen_vl_json(config: VLMConfig) -> dict[str, Any]:
    """Return the config.json of a model with a Qwen-VL tower.

    Raises:
        CheckpointError: no class of transformers computes the same; the part is named.
    """
    tower = config.tower
    assert isinstance(tower, Qwen2VLTowerConfig)
    for part, name in ((config.head, "the embedding head"), (config.text_tower, "the text tower")):
        if part is not None:
            raise inexpressible(name, "no class of transformers has such")
    if tower.class_token:
        found = onevision15_json(config, decoder_json(config.decoder))
    else:
        found = _qwen_vl(config, tower)
    try:
        read = vlm_config(found)
    except CheckpointError as error:
        raise inexpressible("the model", str(error)) from error
    if read != config:
        raise inexpressible(f"the vision tower or connector ({config.connector})", "Qwen's differ")
    return found


def _qwen_vl(config: VLMConfig, tower: Qwen2VLTowerConfig) -> dict[str, Any]:
    kind = KIND_3 if tower.position_side else KIND_2_5 if tower.window else KIND
    return {
        "architectures": [f"{CLASSES[kind]}ForConditionalGeneration"],
        "model_type": kind,
        "text_config": {**_text(config), "model_type": f"{kind}_text"},
        "vision_config": {**_vision(tower, config.decoder.width), "model_type": _vision_kind(kind)},
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "tie_word_embeddings": config.decoder.tied_head,
    }


def _text(config: VLMConfig) -> dict[str, Any]:
    """Return the text_config: that of the language model, and how its positions have three axes."""
    decoder = config.decoder
    text = decoder_json(replace(decoder, mrope_sections=(), mrope_interleaved=False))
    del text["architectures"]
    rope = {"rope_type": "default", "mrope_section": list(decoder.mrope_sections)}
    interleaved = {"mrope_interleaved": True} if decoder.mrope_interleaved else {"type": "mrope"}
    return text | {"rope_scaling": rope | interleaved}


def _vision_kind(kind: str) -> str:
    """Return the model_type of a vision_config, which is the whole model's in the older two."""
    return f"{kind}_vision" if kind == KIND_3 else kind


def _vision(tower: Qwen2VLTowerConfig, width: int) -> dict[str, Any]:
    """Return the vision_config.

    Args:
        width: of the decoder.
    """
    found = {
        "depth": tower.num_layers,
        "num_heads": tower.num_heads,
        "in_channels": 3,
        "patch_size": tower.patch_size,
        "spatial_merge_size": tower.merge,
        "temporal_patch_size": tower.temporal_size,
        "hidden_act": ACTIVATIONS[tower.activation],
    }
    if not (tower.window or tower.position_side):
        ratio = tower.ffn_width // tower.width
        return found | {"embed_dim": tower.width, "hidden_size": width, "mlp_ratio": ratio}
    found |= {
        "hidden_size": tower.width,
        "out_hidden_size": width,
        "intermediate_size": tower.ffn_width,
    }
    if tower.position_side:
        return found | {
            "num_position_embeddings": tower.position_side**2,
            "deepstack_visual_indexes": list(tower.deepstack_blocks),
        }
    return found | {
        "window_size": tower.window * tower.patch_size * tower.merge,
        "fullatt_block_indexes": list(tower.full_blocks),
        "tokens_per_second": tower.tokens_per_second,
    }


def qwen_vl_processors(
    config: ImageProcessorConfig, model: VLMConfig, kind: str
) -> dict[str, dict[str, Any]]:
    """Return the files of the processors by their names.

    Args:
        kind: the model_type.

    Raises:
        CheckpointError: the library's processors do not size images so.
    """
    patches = config.patches
    assert patches is not None and isinstance(model.tower, Qwen2VLTowerConfig)
    common: dict[str, Any] = {
        "processor_class": f"{CLASSES[kind]}Processor",
        "image_mean": list(config.mean),
        "image_std": list(config.std),
        "resample": NUMBERS[config.resample],
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "patch_size": patches.patch,
        "merge_size": patches.merge,
        "temporal_patch_size": patches.temporal,
    }
    image = common | {"image_processor_type": "Qwen2VLImageProcessor"} | _size(patches.bounds(0))
    video = (
        common
        | {"video_processor_type": VIDEO_CLASSES[kind]}
        | _size(patches.bounds(patches.temporal))
    )
    if config.video is not None:
        video |= _sampling(config.video)
    read = qwen2_vl_processor(image, video, model.tower)
    if read != _spelled(config):
        raise inexpressible(f"the sizing of pictures ({config})", "Qwen's processors have another")
    whole = {"processor_class": common["processor_class"]}
    return {
        "preprocessor_config.json": image,
        "video_preprocessor_config.json": video,
        "processor_config.json": whole,
    }


def _sampling(config: VideoConfig) -> dict[str, Any]:
    """Return which frames of a video Qwen3-VL's processor is to take."""
    found = {
        "do_sample_frames": True,
        "min_frames": config.min_frames,
        "max_frames": config.max_frames,
    }
    if config.fps is None:
        return found | {"num_frames": config.frames}
    return found | {"fps": int(config.fps) if config.fps.is_integer() else config.fps}


def _size(bounds: tuple[int, int]) -> dict[str, Any]:
    return {"size": {"shortest_edge": bounds[0], "longest_edge": bounds[1]}}


def _spelled(config: ImageProcessorConfig) -> ImageProcessorConfig:
    """Return a config with a video's bounds written out."""
    assert config.patches is not None
    least, most = config.patches.bounds(config.patches.temporal)
    patches = replace(config.patches, video_min_pixels=least, video_max_pixels=most)
    return replace(config, patches=patches)
