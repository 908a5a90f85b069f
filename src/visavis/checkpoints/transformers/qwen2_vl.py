"""Qwen2-VL of transformers: its config.json, tensor names and image processor as ours.

Both generations are read: settings of the language model within `text_config` or beside the
vision's, tensors below `visual` and `model` or below `model.visual` and `model.language_model`.
Opens no file. Its windowed successors (Qwen2.5-VL and later) are other models and refused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from visavis.checkpoints.transformers.config_reader import (
    MAX_LAYERS,
    Json,
    activation,
    count,
    number,
    require,
    section,
    without_nulls,
)
from visavis.checkpoints.transformers.language_models import decoder_config, decoder_rows
from visavis.checkpoints.transformers.processor import common_fields
from visavis.checkpoints.weight_mapping import MappingRow, NameTable
from visavis.model.config import ConnectorConfig, DecoderConfig, Qwen2VLTowerConfig, VLMConfig
from visavis.processing.config import ImageProcessorConfig, Qwen2VLConfig

KIND = "qwen2_vl"
CLASS = "Qwen2VLImageProcessor"
TEXT: dict[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "max_window_layers": 80,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
VISION: dict[str, Any] = {
    "depth": 32,
    "embed_dim": 1280,
    "hidden_size": 3584,
    "hidden_act": "quick_gelu",
    "mlp_ratio": 4,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
SETTINGS = {"image_token_id": 151655, "video_token_id": 151656}
PROCESSOR: dict[str, Any] = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}
IMAGE_BOUNDS = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}  # areas, for all that
VIDEO_BOUNDS = {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768}


def qwen2_vl_config(config: Json) -> VLMConfig:
    """Return the model that a config.json describes.

    Raises:
        CheckpointError: a setting that no part of ours has.
    """
    decoder, tower = _decoder(config), _tower(section(config, "vision_config"), config)
    ids = SETTINGS | {name: config[name] for name in SETTINGS if config.get(name) is not None}
    for name, found in ids.items():
        known = isinstance(found, int) and 0 <= found < decoder.vocab_size
        require(name, found, known, f"0 to {decoder.vocab_size - 1}")
    require("vision_config.hidden_size", tower[1], tower[1] == decoder.width, f"{decoder.width}")
    return VLMConfig(
        decoder=decoder,
        tower=tower[0],
        connector=ConnectorConfig(
            "merger", tower[0].width, decoder.width, depth=2, shuffle=tower[0].merge
        ),
        image_token_id=ids["image_token_id"],
        video_token_id=ids["video_token_id"],
    )


def _decoder(config: Json) -> DecoderConfig:
    """Return the language model: a Qwen2 whose positions have three axes."""
    nested = without_nulls(section(config, "text_config"))
    text = TEXT | (nested or without_nulls(config))
    text |= {"model_type": "qwen2", "tie_word_embeddings": _tied(config, nested)}
    rope = section(text, "rope_parameters") or section(text, "rope_scaling")
    kind = rope.get("rope_type", rope.get("type", "default"))
    require("rope_type", kind, kind in ("default", "mrope"), "'mrope'")
    text["rope_parameters"] = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else None
    text["rope_scaling"] = None
    decoder = decoder_config(text)
    sections = rope.get("mrope_section", [16, 24, 24])
    fits = isinstance(sections, list) and len(sections) == 3
    fits = fits and all(isinstance(n, int) and n >= 0 for n in sections)
    half = decoder.head_dim // 2
    require("mrope_section", sections, fits and sum(sections) == half, f"three, {half} in all")
    return replace(decoder, mrope_sections=tuple(sections))


def _tied(config: Json, nested: Json) -> bool:
    """Return whether the head is the embeddings: older files say so within the text's settings."""
    return bool(config.get("tie_word_embeddings") or nested.get("tie_word_embeddings"))


def _tower(vision: Json, config: Json) -> tuple[Qwen2VLTowerConfig, int]:
    """Return the tower, and the width of the tokens that its merger makes."""
    vision = VISION | without_nulls(vision)
    channels = vision.get("in_channels", vision.get("in_chans", 3))
    require("in_channels", channels, channels == 3, "3")
    base = section(vision, "rope_parameters").get("rope_theta", 10000)
    require("vision_config.rope_theta", base, base == 10000, "10000")
    layers, width, heads = (count(vision, name) for name in ("depth", "embed_dim", "num_heads"))
    require("depth", layers, layers <= MAX_LAYERS, f"at most {MAX_LAYERS}")
    fits = width % (4 * heads) == 0
    require("embed_dim", width, fits, f"a multiple of 4 for each of {heads} heads")
    tower = Qwen2VLTowerConfig(
        width=width,
        num_layers=layers,
        num_heads=heads,
        ffn_width=int(width * number(vision, "mlp_ratio")),
        patch_size=count(vision, "patch_size"),
        temporal_size=count(vision, "temporal_patch_size"),
        merge=count(vision, "spatial_merge_size"),
        activation=activation(vision),
    )
    return tower, count(vision, "hidden_size")


def qwen2_vl_table(config: VLMConfig) -> NameTable:
    """Return the names of the tensors."""
    tower = config.tower
    assert isinstance(tower, Qwen2VLTowerConfig)
    axes = (3, tower.temporal_size, tower.patch_size, tower.patch_size)
    rows = [MappingRow("tower.patch.weight", ("visual.patch_embed.proj.weight",), axes=axes)]
    parts = {
        "tower.blocks.*.attn_norm": "visual.blocks.*.norm1",
        "tower.blocks.*.qkv": "visual.blocks.*.attn.qkv",
        "tower.blocks.*.out": "visual.blocks.*.attn.proj",
        "tower.blocks.*.ffn_norm": "visual.blocks.*.norm2",
        "tower.blocks.*.up": "visual.blocks.*.mlp.fc1",
        "tower.blocks.*.down": "visual.blocks.*.mlp.fc2",
        "connector.norm": "visual.merger.ln_q",
        "connector.layers.0": "visual.merger.mlp.0",
        "connector.layers.2": "visual.merger.mlp.2",
    }
    for ours, theirs in parts.items():
        rows += [MappingRow(f"{ours}.{kind}", (f"{theirs}.{kind}",)) for kind in ("weight", "bias")]
    tied = ("lm_head.weight",) if config.decoder.tied_head else ()
    return NameTable(
        rows=(*decoder_rows("qwen2", "", "lm_head"), *rows),
        aliases=(
            ("model.visual.**", "visual.**"),
            ("model.language_model.**", "model.**"),
        ),
        ignored=("**.rotary_emb.inv_freq", "visual.rotary_pos_emb.inv_freq", *tied),
    )


def qwen2_vl_processor(
    image: Json, video: Json | None, tower: Qwen2VLTowerConfig
) -> ImageProcessorConfig:
    """Return how images and videos are sized and normalised.

    Args:
        image: settings of the image processor.
        video: those of the video processor, if a folder has any.

    Raises:
        CheckpointError: they belong to another tower, or a step that ours does not do.
    """
    kind = str(image.get("image_processor_type"))
    require("image_processor_type", kind, kind.startswith(CLASS), f"{CLASS!r}")
    config = PROCESSOR | without_nulls(image)
    sides = {"patch_size": tower.patch_size, "temporal_patch_size": tower.temporal_size}
    for name, expected in (sides | {"merge_size": tower.merge}).items():
        require(name, config[name], config[name] == expected, f"{expected}, as the vision tower")
    least, most = _bounds(image, IMAGE_BOUNDS)
    if video is None:  # files of 2024: their pictures' bounds, within those for frames
        video_least, video_most = least, max(least, min(most, VIDEO_BOUNDS["longest_edge"]))
    else:
        video_least, video_most = _bounds(video, VIDEO_BOUNDS)
    patches = Qwen2VLConfig(
        patch=tower.patch_size,
        merge=tower.merge,
        temporal=tower.temporal_size,
        min_pixels=least,
        max_pixels=most,
        video_min_pixels=video_least,
        video_max_pixels=video_most,
    )
    return ImageProcessorConfig(patches.factor, "patches", **common_fields(config), patches=patches)


def _bounds(config: Json, defaults: Json) -> tuple[int, int]:
    """Return the smallest and largest area: under their own names, or within `size`."""
    size = dict(defaults) | without_nulls(section(config, "size"))
    named = {"shortest_edge": config.get("min_pixels"), "longest_edge": config.get("max_pixels")}
    size |= without_nulls(named)
    least, most = count(size, "shortest_edge"), count(size, "longest_edge")
    require("max_pixels", most, least <= most, f"at least {least}, the smallest area")
    return least, most
