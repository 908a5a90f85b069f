"""A preprocessor_config.json of transformers as our `ImageProcessorConfig`.

CLIP's, SigLIP's and the LLaVAs' processors: resize and centre crop, squash, pad to a square, or
tile. Takes parsed JSON; a step that ours does not do is refused by name. Touches no image.
"""

from __future__ import annotations

import math
from typing import Any

from visavis.checkpoints.transformers.config_reader import Json, count, require, without_nulls
from visavis.errors import CheckpointError
from visavis.model.embedder_config import GemmaTowerConfig, NaFlexConfig
from visavis.processing.config import (
    MAX_PATCHES,
    AnyresConfig,
    GemmaSizes,
    ImageProcessorConfig,
    NaFlexSizes,
)
from visavis.utils import suggest

CLIP: dict[str, Any] = {
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
}
SIGLIP: dict[str, Any] = {
    "size": {"height": 224, "width": 224},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
}
NEXT = CLIP | {
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
}
ONEVISION = CLIP | {
    "size": {"height": 384, "width": 384},
    "crop_size": None,
    "do_center_crop": False,
    "image_grid_pinpoints": [[384 * h, 384 * w] for h in range(1, 7) for w in range(1, 7)],
}
DEFAULTS = {  # what the library's classes do when a file leaves a setting out
    "CLIPImageProcessor": CLIP,
    "LlavaImageProcessor": CLIP,
    "LlavaNextImageProcessor": NEXT,
    "LlavaOnevisionImageProcessor": ONEVISION,
    "SiglipImageProcessor": SIGLIP,
}
# What becomes of several pictures in one prompt.
MULTI_IMAGE: dict[str, Any] = {
    "LlavaNextImageProcessor": "tile",
    "LlavaOnevisionImageProcessor": "pad",
}
OLD_NAMES = {"CLIPFeatureExtractor": "CLIPImageProcessor"}
NAFLEX = "Siglip2ImageProcessor"
NAFLEX_DEFAULTS: dict[str, Any] = {
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 2,
    "patch_size": 16,
    "max_num_patches": 256,
}
GEMMA = "Gemma4ImageProcessor"
GEMMA_DEFAULTS: dict[str, Any] = {
    "do_normalize": False,
    "resample": 3,
    "patch_size": 16,
    "max_soft_tokens": 280,
    "pooling_kernel_size": 3,
}
MAX_TILES = 64  # a side of a canvas; more would be a mistake
FILTERS = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def processor_config(config: Json) -> ImageProcessorConfig:
    """Return how images are sized and normalised.

    Raises:
        CheckpointError: another kind of processor, or a step that ours does not do.
    """
    found = config.get("image_processor_type", config.get("feature_extractor_type"))
    kind = str(found).removesuffix("Fast").removesuffix("Pil")
    kind = OLD_NAMES.get(kind, kind)
    if kind not in DEFAULTS:
        raise CheckpointError(
            f"the image processor is a {found!r}, which is not read here: {suggest(kind, DEFAULTS)}"
        )
    config = DEFAULTS[kind] | without_nulls(config)
    fields = common_fields(config)
    edge, squash = _size(config)
    crop = _square(config, "crop_size") if config.get("do_center_crop") else edge
    if kind in MULTI_IMAGE:  # whose `do_pad` fills up batches
        require("crop_size", crop, crop == edge, f"{edge}, the size of a tile")
        canvases = grids(config["image_grid_pinpoints"], edge)
        tiles = AnyresConfig(canvases, axes="hw", multi_image=MULTI_IMAGE[kind])
        return ImageProcessorConfig(size=edge, resize="squash", tiles=tiles, **fields)
    if config.get("do_pad"):
        require("crop_size", crop, crop == edge, f"{edge}, the size after padding")
        return ImageProcessorConfig(size=edge, resize="pad", **fields)
    if squash:
        require("crop_size", crop, crop == edge, f"{edge}, the size that is resized to")
        return ImageProcessorConfig(size=edge, resize="squash", **fields)
    require("do_center_crop", False, bool(config.get("do_center_crop")), "true with shortest_edge")
    require("crop_size", crop, crop <= edge, f"at most {edge}, the shortest edge")
    fraction = crop / edge
    while math.floor(crop / fraction) < edge:  # rounding must not lose a pixel
        fraction = math.nextafter(fraction, 0)
    return ImageProcessorConfig(size=crop, resize="crop", crop_fraction=fraction, **fields)


def naflex_processor(config: Json, tower: NaFlexConfig) -> ImageProcessorConfig:
    """Return how images become patches of SigLIP 2's tower.

    Raises:
        CheckpointError: another kind of processor, or a step that ours does not do.
    """
    found = config.get("image_processor_type")
    kind = str(found).removesuffix("Fast").removesuffix("Pil")
    require("image_processor_type", found, kind == NAFLEX, f"'{NAFLEX}'")
    config = NAFLEX_DEFAULTS | without_nulls(config)
    patch, most = count(config, "patch_size"), count(config, "max_num_patches")
    require("patch_size", patch, patch == tower.patch_size, f"{tower.patch_size}, the tower's")
    require("max_num_patches", most, most <= MAX_PATCHES, f"at most {MAX_PATCHES}")
    naflex = NaFlexSizes(most)
    return ImageProcessorConfig(patch, "naflex", **common_fields(config), naflex=naflex)


def gemma_processor(config: Json, tower: GemmaTowerConfig) -> ImageProcessorConfig:
    """Return how images become patches of EmbeddingGemma 2's tower, which scales pixels itself.

    Raises:
        CheckpointError: another kind of processor, or a step that ours does not do.
    """
    found = config.get("image_processor_type")
    kind = str(found).removesuffix("Fast").removesuffix("Pil")
    require("image_processor_type", found, kind == GEMMA, f"'{GEMMA}'")
    config = GEMMA_DEFAULTS | without_nulls(config)
    require("do_normalize", config["do_normalize"], config["do_normalize"] is False, "false")
    half = {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    wanted = {"patch_size": tower.patch_size, "pooling_kernel_size": tower.merge}
    for name, expected in wanted.items():
        require(name, config[name], config[name] == expected, f"{expected}, the tower's")
    most = count(config, "max_soft_tokens")
    require("max_soft_tokens", most, most <= MAX_PATCHES, f"at most {MAX_PATCHES}")
    side = tower.patch_size * tower.merge
    longest = most * tower.merge  # patches of an image of one row of tokens
    require("max_soft_tokens", most, longest <= tower.num_positions, "within the positions")
    sizes = GemmaSizes(tower.merge, most)
    return ImageProcessorConfig(side, "gemma", **common_fields(config | half), gemma=sizes)


def common_fields(config: Json) -> dict[str, Any]:
    """Return the fields that all image processors have: normalisation and resize filter.

    Raises:
        CheckpointError: a step that ours does not do.
    """
    for step in ("do_resize", "do_rescale", "do_normalize"):
        require(step, config.get(step), config.get(step, True) is True, "true")
    factor = config.get("rescale_factor", 1 / 255)
    in_unit = isinstance(factor, float) and math.isclose(factor, 1 / 255, rel_tol=1e-6)
    require("rescale_factor", factor, in_unit, "1/255")
    resample = config["resample"]
    known = isinstance(resample, int) and resample in FILTERS
    require("resample", resample, known, "1 (lanczos), 2 (bilinear) or 3 (bicubic)")
    return {
        "mean": _three(config, "image_mean"),
        "std": _three(config, "image_std"),
        "resample": FILTERS[resample],
    }


def grids(pairs: Any, tile: int) -> tuple[tuple[int, int], ...]:
    """Return the canvases that `image_grid_pinpoints` lists.

    Raises:
        CheckpointError: they are no pairs of multiples of the tile.
    """
    allowed = range(tile, MAX_TILES * tile + 1, tile)
    fits = isinstance(pairs, list | tuple) and all(
        isinstance(pair, list | tuple)
        and len(pair) == 2
        and all(type(n) is int and n in allowed for n in pair)
        for pair in pairs
    )
    expected = f"pairs of multiples of {tile}, at most {MAX_TILES} times it"
    require("image_grid_pinpoints", pairs, fits and len(pairs) > 0, expected)
    return tuple((int(first), int(second)) for first, second in pairs)


def _size(config: Json) -> tuple[int, bool]:
    """Return the size that is resized to, and whether both edges become it."""
    size = config["size"]
    if isinstance(size, int):  # files of older versions
        return count(config, "size"), not config.get("do_center_crop", False)
    if isinstance(size, dict) and "shortest_edge" in size:
        return count(size, "shortest_edge"), False
    return _square(config, "size"), True


def _square(config: Json, name: str) -> int:
    value: Any = config.get(name)
    if isinstance(value, int):
        return count(config, name)
    same = isinstance(value, dict) and value.get("height") == value.get("width")
    require(name, value, same, "a square: the same height and width")
    return count(value, "height")


def _three(config: Json, name: str) -> tuple[float, ...]:
    value = config[name]
    numbers = isinstance(value, list) and len(value) == 3
    fits = numbers and all(isinstance(v, int | float) and 0 <= v <= 1 for v in value)
    fits = fits and (name == "image_mean" or 0 not in value)
    require(name, value, fits, "three numbers from 0 to 1, standard deviations above 0")
    return tuple(map(float, value))
