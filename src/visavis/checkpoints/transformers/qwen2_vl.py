"""Qwen2-VL and Qwen2.5-VL of transformers: their config.json, tensor names and image processor as
ours.

Both generations are read: settings of the language model within `text_config` or beside the
vision's, tensors below `visual` and `model` or below `model.visual` and `model.language_model`.
Opens no file.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
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
from visavis.processing.config import ImageProcessorConfig, Qwen2VLConfig, VideoConfig

KIND, KIND_2_5 = "qwen2_vl", "qwen2_5_vl"
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
VISION_2_5: dict[str, Any] = {
    "depth": 32,
    "hidden_size": 3584,
    "out_hidden_size": 3584,
    "hidden_act": "silu",
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "tokens_per_second": 4,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
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
WHOLE_VIDEO_BOUNDS = {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768}
VIDEO_SAMPLING: dict[str, Any] = {
    "do_sample_frames": True,
    "fps": 2,
    "min_frames": 4,
    "max_frames": 768,
}


def qwen2_vl_config(config: Json) -> VLMConfig:
    """Return the model that a config.json describes.

    Raises:
        CheckpointError: a setting that no part of ours has.
    """
    vision = section(config, "vision_config")
    windowed = config["model_type"] == KIND_2_5
    tower, width = _windowed_tower(vision) if windowed else _tower(vision)
    return whole(
        config, _decoder(config), tower, "out_hidden_size" if windowed else "hidden_size", width
    )


def whole(
    config: Json, decoder: DecoderConfig, tower: Qwen2VLTowerConfig, name: str, width: int
) -> VLMConfig:
    """Return the model of a decoder and a tower.

    Args:
        name, width: the setting that says how wide the merger's tokens are, and what it says.

    Raises:
        CheckpointError: the parts do not belong together.
    """
    ids = SETTINGS | {name: config[name] for name in SETTINGS if config.get(name) is not None}
    for key, found in ids.items():
        known = isinstance(found, int) and 0 <= found < decoder.vocab_size
        require(key, found, known, f"0 to {decoder.vocab_size - 1}")
    require(f"vision_config.{name}", width, width == decoder.width, f"{decoder.width}")
    more = len(tower.deepstack_blocks)
    fits = more <= decoder.num_layers
    require("deepstack_visual_indexes", more, fits, f"at most {decoder.num_layers} of them")
    connector = ConnectorConfig(
        "merger",
        tower.width,
        decoder.width,
        depth=2,
        shuffle=tower.merge,
        rms_norm=tower.norm == "rms",
        deepstack=more,
    )
    return VLMConfig(
        decoder=decoder,
        tower=tower,
        connector=connector,
        image_token_id=ids["image_token_id"],
        video_token_id=ids["video_token_id"],
    )


def _decoder(config: Json) -> DecoderConfig:
    """Return the language model: a Qwen2 whose positions have three axes."""
    nested = without_nulls(section(config, "text_config"))
    text = TEXT | (nested or without_nulls(config))
    text |= {"model_type": "qwen2", "tie_word_embeddings": tied_head(config, nested)}
    return with_axes(text, [16, 24, 24])


def with_axes(text: Json, usual: list[int], interleaved: bool = False) -> DecoderConfig:
    """Return the decoder of a language model's settings, with positions on three axes.

    Args:
        usual: frequencies of each axis where the settings do not say.
    """
    rope = section(text, "rope_parameters") or section(text, "rope_scaling")
    kind = rope.get("rope_type", rope.get("type", "default"))
    require("rope_type", kind, kind in ("default", "mrope"), "'mrope'")
    theta = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else None
    decoder = decoder_config(dict(text) | {"rope_parameters": theta, "rope_scaling": None})
    sections = rope.get("mrope_section", usual)
    fits = isinstance(sections, list) and len(sections) == 3
    fits = fits and all(isinstance(n, int) and n >= 0 for n in sections)
    half = decoder.head_dim // 2
    require("mrope_section", sections, fits and sum(sections) == half, f"three, {half} in all")
    return replace(decoder, mrope_sections=tuple(sections), mrope_interleaved=interleaved)


def tied_head(config: Json, nested: Json) -> bool:
    """Return whether the head is the embeddings: older files say so within the text's settings."""
    return bool(config.get("tie_word_embeddings") or nested.get("tie_word_embeddings"))


def _tower(vision: Json) -> tuple[Qwen2VLTowerConfig, int]:
    """Return Qwen2-VL's tower, and the width of the tokens that its merger makes."""
    vision = VISION | without_nulls(vision)
    shape = tower_fields(vision, "embed_dim")
    ffn_width = int(shape["width"] * number(vision, "mlp_ratio"))
    return Qwen2VLTowerConfig(**shape, ffn_width=ffn_width), count(vision, "hidden_size")


def _windowed_tower(vision: Json) -> tuple[Qwen2VLTowerConfig, int]:
    """Return Qwen2.5-VL's tower, and the width of the tokens that its merger makes."""
    vision = VISION_2_5 | without_nulls(vision)
    shape = tower_fields(vision, "hidden_size")
    factor, pixels = shape["patch_size"] * shape["merge"], count(vision, "window_size")
    require("window_size", pixels, pixels >= factor, f"at least {factor}, the pixels of a token")
    tower = Qwen2VLTowerConfig(
        **shape,
        ffn_width=count(vision, "intermediate_size"),
        norm="rms",
        gated_ffn=True,
        window=pixels // factor,
        full_blocks=block_numbers(vision, "fullatt_block_indexes", shape["num_layers"]),
        tokens_per_second=count(vision, "tokens_per_second"),
    )
    return tower, count(vision, "out_hidden_size")


def tower_fields(vision: Json, width_name: str) -> dict[str, Any]:
    """Return the fields of a tower that all generations have.

    Args:
        vision: its settings, defaults filled in.
        width_name: the setting of its width.
    """
    channels = vision.get("in_channels", vision.get("in_chans", 3))
    require("in_channels", channels, channels == 3, "3")
    base = section(vision, "rope_parameters").get("rope_theta", 10000)
    require("vision_config.rope_theta", base, base == 10000, "10000")
    layers, width, heads = (count(vision, name) for name in ("depth", width_name, "num_heads"))
    require("depth", layers, layers <= MAX_LAYERS, f"at most {MAX_LAYERS}")
    fits = width % (4 * heads) == 0
    require(width_name, width, fits, f"a multiple of 4 for each of {heads} heads")
    return {
        "width": width,
        "num_layers": layers,
        "num_heads": heads,
        "patch_size": count(vision, "patch_size"),
        "temporal_size": count(vision, "temporal_patch_size"),
        "merge": count(vision, "spatial_merge_size"),
        "activation": activation(vision),
    }


def block_numbers(vision: Json, name: str, layers: int) -> tuple[int, ...]:
    """Return a setting that lists blocks of the tower, ascending."""
    found = vision[name]
    listed = isinstance(found, list) and all(type(n) is int and 0 <= n < layers for n in found)
    rising = listed and all(one < other for one, other in pairwise(found))
    require(name, found, rising, f"numbers of the {layers} blocks from 0 on, each once, ascending")
    return tuple(found)


def qwen2_vl_table(config: VLMConfig) -> NameTable:
    """Return the names of the tensors of Qwen2-VL, Qwen2.5-VL or Qwen3-VL."""
    tower = config.tower
    assert isinstance(tower, Qwen2VLTowerConfig)
    axes = (3, tower.temporal_size, tower.patch_size, tower.patch_size)
    third = bool(tower.position_side)  # Qwen3-VL
    visual, body = ("model.visual", "model.language_model") if third else ("visual", "model")
    rows = [
        MappingRow("tower.patch.weight", (f"{visual}.patch_embed.proj.weight",), axes=axes),
        MappingRow("tower.patch.bias", (f"{visual}.patch_embed.proj.bias",)),
        MappingRow("tower.positions", (f"{visual}.pos_embed.weight",)),
    ]
    up, down = ("linear_fc1", "linear_fc2") if third else ("fc1", "fc2")
    norm, first, second = (
        ("norm", "linear_fc1", "linear_fc2") if third else ("ln_q", "mlp.0", "mlp.2")
    )
    block, more = f"{visual}.blocks.*", f"{visual}.deepstack_merger_list.*"
    parts = {
        "tower.blocks.*.attn_norm": f"{block}.norm1",
        "tower.blocks.*.qkv": f"{block}.attn.qkv",
        "tower.blocks.*.out": f"{block}.attn.proj",
        "tower.blocks.*.ffn_norm": f"{block}.norm2",
        "tower.blocks.*.up": f"{block}.mlp.{up}",
        "tower.blocks.*.down": f"{block}.mlp.{'down_proj' if tower.gated_ffn else down}",
        "connector.norm": f"{visual}.merger.{norm}",
        "connector.layers.0": f"{visual}.merger.{first}",
        "connector.layers.2": f"{visual}.merger.{second}",
        "connector.deepstack.*.norm": f"{more}.norm",
        "connector.deepstack.*.layers.0": f"{more}.linear_fc1",
        "connector.deepstack.*.layers.2": f"{more}.linear_fc2",
    }
    if tower.gated_ffn:
        del parts["tower.blocks.*.up"]
    for ours, theirs in parts.items():
        rows += [MappingRow(f"{ours}.{kind}", (f"{theirs}.{kind}",)) for kind in ("weight", "bias")]
    if tower.gated_ffn:
        for kind in ("weight", "bias"):
            both = tuple(f"{block}.mlp.{part}_proj.{kind}" for part in ("gate", "up"))
            rows.append(MappingRow(f"tower.blocks.*.up.{kind}", both, ("gate", "gate")))
    tied = ("lm_head.weight",) if config.decoder.tied_head else ()
    newer = ("model.visual.**", "model.language_model.**")
    others = ("visual.**", "language_model.**" if third else "model.**")
    return NameTable(
        rows=(*decoder_rows("qwen2", "", "lm_head", body=body), *rows),
        # Qwen3-VL's other names are those of an embedder that was saved without its head.
        aliases=(*((one, one) for one in newer), *zip(others, newer, strict=True))
        if third
        else tuple(zip(newer, others, strict=True)),
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
    third = bool(tower.position_side)  # Qwen3-VL
    for name in (*sides, "merge_size", "image_mean", "image_std") if video else ():
        found = video.get(name) if video else None
        require(name, found, found in (None, config[name]), f"{config[name]}, as of images")
    if third:
        video_least, video_most = _bounds(video or {}, WHOLE_VIDEO_BOUNDS)
    elif video is None:  # files of 2024: their pictures' bounds, within those for frames
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
        whole_videos=third,
    )
    return ImageProcessorConfig(
        patches.factor,
        "patches",
        **common_fields(config),
        patches=patches,
        video=_sampling(video or {}) if third else None,
    )


def _sampling(video: Json) -> VideoConfig:
    """Return which frames of a video Qwen3-VL's processor takes."""
    settings = VIDEO_SAMPLING | without_nulls(video)
    require(
        "do_sample_frames", settings["do_sample_frames"], bool(settings["do_sample_frames"]), "true"
    )
    least, most = count(settings, "min_frames"), count(settings, "max_frames")
    require("min_frames", least, least <= most, f"at most {most}, max_frames")
    if "num_frames" in settings:
        fixed = count(settings, "num_frames")
        require("num_frames", fixed, fixed <= most, f"at most {most}, max_frames")
        return VideoConfig(fixed, None, most, least, "qwen3-vl")
    return VideoConfig(min(32, most), number(settings, "fps"), most, least, "qwen3-vl")


def _bounds(config: Json, defaults: Json) -> tuple[int, int]:
    """Return the smallest and largest area: under their own names, or within `size`."""
    size = dict(defaults) | without_nulls(section(config, "size"))
    named = {"shortest_edge": config.get("min_pixels"), "longest_edge": config.get("max_pixels")}
    size |= without_nulls(named)
    least, most = count(size, "shortest_edge"), count(size, "longest_edge")
    require("max_pixels", most, least <= most, f"at least {least}, the smallest area")
    return least, most
