"""LLaVA's original layout (1.0 to OneVision): its config.json as our config, its tensors as ours.

One config.json holds the language model's settings and `mm_…` ones; tensors are called
`model.layers…`, `model.mm_projector…`, `model.vision_tower.vision_tower.vision_model…`. Takes
parsed JSON and opens no file (see `load.py`).
"""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import PurePath
from typing import Any

from visavis.checkpoints.transformers.config_reader import Json, require, without_nulls
from visavis.checkpoints.transformers.language_models import decoder_config, decoder_rows
from visavis.checkpoints.transformers.processor import MAX_TILES, grids
from visavis.checkpoints.transformers.vision_models import CLIP, LLAVA_TOWER, SIGLIP, vit_config
from visavis.checkpoints.transformers.weights import tower_table
from visavis.checkpoints.weight_mapping import MappingRow, NameTable
from visavis.errors import CheckpointError
from visavis.model.config import ConnectorConfig, ImageLayoutConfig, VLMConfig
from visavis.processing.config import AnyresConfig

TOWER_PREFIX = "model.vision_tower.vision_tower."
# What the original classes build on. Their model_type is often just "llava", so classes go first.
CLASSES = {
    "LlavaLlamaForCausalLM": "llama",
    "LlavaMistralForCausalLM": "mistral",
    "LlavaQwenForCausalLM": "qwen2",
    "LlavaGemmaForCausalLM": "gemma",
}
TYPES = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
    "llava_gemma": "gemma",
}
# Chat formats that follow from the language model. LLaVA of Llama was trained with several; which,
# no file says, except that its recipes since 1.5 were only ever Vicuna's, Yi's and Llama 3's.
TURNS = {"mistral": "mistral_instruct", "qwen2": "qwen_1_5", "gemma": "gemma_instruct"}
LLAMA_TURNS = {32000: "vicuna_v1", 64000: "chatml_direct", 128256: "llava_llama_3"}  # by vocabulary
MAX_ADDED = 128  # tokens that fine-tuning adds to a vocabulary, padding included

# Towers that checkpoints name and do not bring: (config.json, preprocessor_config.json).
_L14 = LLAVA_TOWER | {"hidden_act": CLIP["hidden_act"]}
_SO400M = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "hidden_act": SIGLIP["hidden_act"],
}


def _clip_processor(size: int) -> dict[str, Any]:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
    }


KNOWN_TOWERS: dict[str, tuple[Json, Json]] = {
    "openai/clip-vit-large-patch14": (_L14 | {"image_size": 224}, _clip_processor(224)),
    "openai/clip-vit-large-patch14-336": (_L14, _clip_processor(336)),
    "google/siglip-so400m-patch14-384": (
        _SO400M,
        {
            "image_processor_type": "SiglipImageProcessor",
            "size": {"height": 384, "width": 384},
        },
    ),
}


def known_tower(config: Json) -> tuple[Json, Json] | None:
    """Return the configs of the tower that a checkpoint names, wherever its author kept it."""
    name = PurePath(str(config["mm_vision_tower"])).name
    return next((KNOWN_TOWERS[one] for one in KNOWN_TOWERS if PurePath(one).name == name), None)


def is_llava(config: Json) -> bool:
    """Return whether a config.json is one of this layout."""
    return "mm_vision_tower" in config


def text_config(config: Json) -> dict[str, Any]:
    """Return the language model's config within the whole one.

    Raises:
        CheckpointError: it is none that we read.
    """
    classes = config.get("architectures")
    named = classes[0] if isinstance(classes, list) and classes else None
    kind = config.get("model_type")
    found = CLASSES.get(str(named)) if named else TYPES.get(str(kind))
    if found is None:
        raise CheckpointError(
            f"config.json has model_type {kind!r} and architectures {classes!r}; in LLaVA's "
            f"original layout {', '.join(CLASSES)} are read, use a checkpoint of one of these."
        )
    return {**config, "model_type": found}


def vlm_config(config: Json, text: Json, vision: Json) -> VLMConfig:
    """Return the model that the three configs describe.

    Args:
        config: the checkpoint's, for its `mm_…` settings.
        text: the language model's.
        vision: the vision tower's.

    Raises:
        CheckpointError: a setting that no part of ours has.
    """
    decoder, tower = decoder_config(text), vit_config(vision)
    given = without_nulls(config)
    for name, plain in (
        ("mm_resampler_type", None),
        ("use_mm_proj", True),
        ("s2", False),
        ("add_faster_video", False),
    ):
        value = given.get(name, plain)
        require(name, value, value == plain, f"{plain!r} or no such setting")
    merge = _merge(given)
    width = given.get("mm_hidden_size", tower.width)
    require("mm_hidden_size", width, width == tower.width, f"the vision tower's {tower.width}")
    layer: Any = given.get("mm_vision_select_layer", -2)
    feature = "patch"
    if tower.class_token:
        feature = given.get("mm_vision_select_feature", "patch")
        known = feature in ("patch", "cls_patch")
        require("mm_vision_select_feature", feature, known, "'patch' or 'cls_patch'")
        square = feature == "patch" or merge.kind == "flat"
        require("mm_vision_select_feature", feature, square, "'patch' with tiles")
        one = isinstance(layer, int) and -tower.num_layers - 1 <= layer <= tower.num_layers
        require("mm_vision_select_layer", layer, one, f"one number of {tower.num_layers} layers")
    else:  # SigLIP: its last block is cut off, and the setting is not looked at
        require("num_hidden_layers", tower.num_layers, tower.num_layers > 1, "at least 2")
        tower, layer = replace(tower, num_layers=tower.num_layers - 1), -1
    kind = given.get("mm_projector_type", "linear")
    mlp = re.fullmatch("mlp([1-9])x_gelu", str(kind))
    require("mm_projector_type", kind, kind == "linear" or bool(mlp), "'linear' or 'mlpNx_gelu'")
    return VLMConfig(
        decoder=decoder,
        tower=tower,
        connector=ConnectorConfig(
            "mlp" if mlp else "linear",
            tower.width,
            decoder.width,
            depth=int(mlp[1]) if mlp else 1,
        ),
        image_token_id=0,  # this layout has no placeholder token; images are found by position
        select_layer=layer,
        select_feature="patch" if feature == "patch" else "class_patch",
        merge=merge,
    )


def _merge(config: Json) -> ImageLayoutConfig:
    """Return how an image's views or a video's frames are put together."""
    kind = config.get("mm_patch_merge_type", "flat")
    known = kind in ("flat", "spatial", "spatial_unpad")
    require("mm_patch_merge_type", kind, known, "'flat', 'spatial' or 'spatial_unpad'")
    mode: Any = config.get("mm_spatial_pool_mode", "bilinear")
    modes = ("bilinear", "average", "max")
    require("mm_spatial_pool_mode", mode, mode in modes, f"one of {', '.join(modes)}")
    if kind == "flat":
        most_tiles(config)
        if "mm_spatial_pool_mode" not in config:
            return ImageLayoutConfig()
        feature = config.get("mm_vision_select_feature", "patch")
        require("mm_vision_select_feature", feature, feature == "patch", "'patch' to pool frames")
        return ImageLayoutConfig(video_pool=2, video_pool_mode=mode)
    newline = kind == "spatial_unpad"  # the learned vector exists with it only
    place: Any = config.get("mm_newline_position", "one_token")
    places = ("one_token", "grid", "frame", "no_token")
    require("mm_newline_position", place, place in places, f"one of {', '.join(places)}")
    needs = newline or place in ("one_token", "no_token")
    require("mm_newline_position", place, needs, "'one_token' or 'no_token' without unpadding")
    return ImageLayoutConfig(
        "spatial",
        unpad=newline,
        newline=newline,
        max_tiles=(most_tiles(config) or 0) if newline else 0,
        video_newline=place if newline else "no_token",
        video_pool=2,  # whatever mm_spatial_pool_stride says: it is not looked at
        video_pool_mode=mode,
    )


def most_tiles(config: Json) -> int | None:
    """Return the N of anyres_max_N, 0 for plain anyres, None if images are not tiled."""
    aspect = config.get("image_aspect_ratio") or "square"
    found = re.fullmatch("anyres(_max_([1-9][0-9]{0,3}))?", str(aspect))
    expected = "'square', 'pad', 'anyres' or 'anyres_max_N'"
    require("image_aspect_ratio", aspect, bool(found) or aspect in ("square", "pad"), expected)
    return int(found[2] or 0) if found else None


def tiles_config(config: Json, tile: int) -> AnyresConfig | None:
    """Return how images are tiled, if they are.

    Args:
        tile: pixels of a tile's side.
    """
    most = most_tiles(config)
    if most is None:
        return None
    # NeXT, from where anyres_max_N comes, was trained on several pictures padded, not tiled.
    canvases = grids(_pairs(config, tile), tile)
    return AnyresConfig(canvases, axes="wh", multi_image="pad" if most else "tile")


def _pairs(config: Json, tile: int) -> Any:
    """Return the pairs of width and height that `image_grid_pinpoints` lists.

    The field is a list, the text of a list, or "(1x1),...,(6x6)" for all grids in that range.
    """
    name, found = "image_grid_pinpoints", config.get("image_grid_pinpoints")
    if not isinstance(found, str):
        return found
    if ends := re.findall(r"\(([0-9]{1,3})x([0-9]{1,3})\)", found):
        (left, top), (right, bottom) = (map(int, ends[at]) for at in (0, -1))
        fits = right <= MAX_TILES and bottom <= MAX_TILES
        require(name, found, fits, f"at most ({MAX_TILES}x{MAX_TILES})")
        return [
            (tile * wide, tile * high)
            for wide in range(left, right + 1)
            for high in range(top, bottom + 1)
        ]
    try:
        return ast.literal_eval(found)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return found


def name_table(text: Json, vision: Json, ours: VLMConfig) -> NameTable:
    """Return the names of the layout's tensors."""
    assert ours.connector is not None and ours.tower is not None
    tower = tower_table(vision, TOWER_PREFIX)
    places = {n: f"{n}." for n in range(0, 2 * ours.connector.depth, 2)}  # ours: theirs
    if ours.connector.kind == "linear":
        places = {0: ""}
    connector = [
        MappingRow(f"connector.layers.{place}.{tensor}", (f"model.mm_projector.{theirs}{tensor}",))
        for place, theirs in places.items()
        for tensor in ("weight", "bias")
    ]
    newline = MappingRow("image_newline", ("model.image_newline",))
    ignored = ["**.rotary_emb.inv_freq", *tower.ignored]
    if ours.decoder.tied_head:
        ignored.append("lm_head.weight")
    if not vit_config(vision).class_token:
        num_layers = vit_config(vision).num_layers
        ignored.append(f"{TOWER_PREFIX}vision_model.encoder.layers.{num_layers - 1}.**")
    return NameTable(
        rows=(*decoder_rows(text["model_type"], "", "lm_head"), *connector, newline, *tower.rows),
        aliases=tower.aliases,
        ignored=tuple(ignored),
    )


def turns_of(config: Json, text: Json) -> str:
    """Return the name of the chat format that the config settles, empty if it does not."""
    if text["model_type"] != "llama":
        return TURNS.get(text["model_type"], "")
    merge = config.get("mm_patch_merge_type") or "flat"
    recipe = (config.get("mm_projector_type"), config.get("image_aspect_ratio"), merge)
    if recipe == ("mlp2x_gelu", "pad", "flat"):
        return "vicuna_v1"
    if recipe != ("mlp2x_gelu", "anyres", "spatial_unpad"):
        return ""
    size = text.get("vocab_size", 32000)
    return next((LLAMA_TURNS[n] for n in LLAMA_TURNS if n <= size < n + MAX_ADDED), "")


def is_llave(config: Json) -> bool:
    """Return whether a checkpoint was trained to embed, with LLaVE's loss."""
    return "alpha" in config and "logit_scale" in config


def tells_times(config: Json) -> bool:
    """Return whether a checkpoint was trained with the times of a video's frames in words."""
    return bool(config.get("add_time_instruction"))


def image_tokens(config: Json) -> tuple[str, str]:
    """Return the special tokens around each image's own."""
    return ("<im_start>", "<im_end>") if config.get("mm_use_im_start_end") else ("", "")
