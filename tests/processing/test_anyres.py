"""Pictures as tiles: the canvases, counts and pixels of LLaVA 1.6, OneVision and LLaVE."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as pil

from tests.pictures import RED, scene
from visavis.errors import InputError
from visavis.inputs import Image
from visavis.model.config import (
    ConnectorConfig,
    DecoderConfig,
    ImageLayoutConfig,
    ViTConfig,
    VLMConfig,
)
from visavis.model.image_input import ImageGrid
from visavis.model.image_tokens import count_tokens, tokens_per_view
from visavis.processing.anyres import AnyresProcessor, best_grid
from visavis.processing.config import AnyresConfig, ImageProcessorConfig
from visavis.processing.image_processor import grid_of, image_processor, pixels_of

HALF = (0.5, 0.5, 0.5)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
NEXT_PAIRS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


def grids(pairs, tile):
    return tuple((tile * a, tile * b) for a, b in pairs)


def all_pairs(most):
    return [(a, b) for a in range(1, most + 1) for b in range(1, most + 1)]


def processor(tile, pairs, axes="wh", multi_image="tile", mean=HALF, std=HALF):
    tiles = AnyresConfig(grids(pairs, tile), axes, multi_image)
    return ImageProcessorConfig(tile, "squash", mean, std, tiles=tiles)


NEXT = processor(336, NEXT_PAIRS, mean=CLIP[0], std=CLIP[1])
ONEVISION = processor(384, all_pairs(6), multi_image="pad")
LLAVE = processor(384, all_pairs(2), multi_image="pad")


def model(side, max_tiles):
    """A config that counts as a published one does: side² tokens of a view."""
    decoder = DecoderConfig(40, 8, 1, 2, 2, 4, 8, 64)
    tower = ViTConfig(side * 2, 2, 8, 1, 2, 8, "gelu", 1e-6)
    merge = ImageLayoutConfig("spatial", unpad=True, newline=True, max_tiles=max_tiles)
    return VLMConfig(decoder, tower, ConnectorConfig("linear", 8, 8), merge=merge)


# Size; then for each model the canvas in pixels and the tokens.
TABLE = [
    ((100, 100), (336, 672, 1176), (384, 384, 1485), (384, 384, 1485)),
    ((336, 336), (336, 672, 1176), (384, 384, 1485), (384, 384, 1485)),
    ((400, 300), (672, 336, 1368), (768, 384, 1728), (768, 384, 1728)),
    ((640, 480), (672, 672, 2340), (768, 768, 2929), (768, 768, 2929)),
    ((480, 640), (672, 672, 2352), (768, 768, 2943), (768, 768, 2943)),
    ((899, 1024), (672, 672, 2640), (1152, 1152, 6561), (768, 768, 3375)),
    ((1920, 1080), (672, 672, 1948), (1920, 1152, 7269), (768, 768, 2379)),
    ((2000, 500), (1008, 336, 1890), (2304, 768, 7249), (768, 384, 1444)),
]
PUBLISHED = [(NEXT, model(24, 0)), (ONEVISION, model(27, 9)), (LLAVE, model(27, 9))]


@pytest.mark.parametrize(("size", "next_", "onevision", "llave"), TABLE)
def test_canvases_and_token_counts_of_published_models(size, next_, onevision, llave):
    for (config, vlm), (width, height, tokens) in zip(
        PUBLISHED, (next_, onevision, llave), strict=True
    ):
        shape = AnyresProcessor(config).grid(size)
        side = config.size
        assert shape == ImageGrid(rows=height // side, columns=width // side, size=size)
        assert count_tokens(vlm, shape) == tokens


@settings(max_examples=300)
@given(
    st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    st.sampled_from(PUBLISHED),
    st.sampled_from(["wh", "hw"]),
)
def test_every_size_has_tokens(size, published, axes):
    config, vlm = published
    assert config.tiles is not None
    config = replace(config, tiles=replace(config.tiles, axes=axes))
    shape = AnyresProcessor(config).grid(size)
    assert (shape.columns * config.size, shape.rows * config.size) in {
        grid[:: 1 if axes == "wh" else -1] for grid in config.tiles.grids
    }
    assert count_tokens(vlm, shape) >= tokens_per_view(vlm)
    if min(size) >= 50:  # a thinner picture may be all padding between two rows of patches
        assert count_tokens(vlm, shape) > tokens_per_view(vlm)
        low, high = {24: (676, 2928), 27: (784, 8765)}[vlm.tower.grid]
        assert low <= count_tokens(vlm, shape) <= high


# ---- which canvas --------------------------------------------------------------------------------


def original_choice(size, pairs):
    """LLaVA's selection, written out: best fit so far, replaced only by a better one."""
    best, most, least = None, 0, math.inf
    for wide, high in pairs:
        scale = min(wide / size[0], high / size[1])
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        wasted = wide * high - kept
        if kept > most or (kept == most and wasted < least):
            best, most, least = (wide, high), kept, wasted
    return best


SIZES = st.tuples(st.integers(1, 4000), st.integers(1, 4000))


@given(SIZES, st.sampled_from([NEXT, ONEVISION, LLAVE]))
def test_choice_is_the_originals(size, config):
    assert best_grid(size, config.tiles) == original_choice(size, config.tiles.grids)


@pytest.mark.parity
def test_choice_read_as_height_and_width_is_that_of_transformers():
    utils = pytest.importorskip("transformers.image_processing_utils")
    rng = random.Random(0)
    for config in (NEXT, ONEVISION, LLAVE):
        tiles = replace(config.tiles, axes="hw")
        for _ in range(500):
            width, height = rng.randint(1, 2000), rng.randint(1, 2000)
            theirs = utils.select_best_resolution((height, width), list(tiles.grids))
            assert best_grid((width, height), tiles) == theirs[::-1]


def test_the_two_conventions_part_where_canvases_tie():
    hw = replace(NEXT.tiles, axes="hw")
    assert best_grid((100, 100), NEXT.tiles) == (336, 672)
    assert best_grid((100, 100), hw) == (672, 336)
    rng = random.Random(0)
    sizes = [(rng.randint(50, 3000), rng.randint(50, 3000)) for _ in range(5000)]
    others = sum(best_grid(size, NEXT.tiles) != best_grid(size, hw) for size in sizes)
    assert 0 < others < 150
    for config in (ONEVISION, LLAVE):
        swapped = replace(config.tiles, axes="hw")
        assert all(
            best_grid(size, config.tiles) == best_grid(size, swapped) for size in sizes[:500]
        )


# ---- pixels --------------------------------------------------------------------------------------

PICTURES = [
    (97, 61),
    (61, 97),
    (48, 48),
    (30, 20),
    (150, 97),
    (333, 70),
    (70, 333),
    (1, 1),
    (200, 3),
]
SMALL_PAIRS = {"next": NEXT_PAIRS, "onevision": all_pairs(4)}


def grey_levels(pixels, config):
    std, mean = (np.array(v).reshape(3, 1, 1) for v in (config.std, config.mean))
    return (np.asarray(pixels, np.float64) * std + mean) * 255


def assert_same_views(ours, theirs, config):
    assert ours.dtype == np.float32 and ours.shape == theirs.shape
    difference = np.abs(grey_levels(ours, config) - grey_levels(theirs, config))
    assert difference.max() <= 1.001  # one grey level, plus rounding in the undoing


@pytest.mark.parity
@pytest.mark.parametrize("size", PICTURES)
def test_views_equal_llava_next_of_transformers(size):
    transformers = pytest.importorskip("transformers")
    config = processor(48, NEXT_PAIRS, "hw", mean=CLIP[0], std=CLIP[1])
    peer = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 48},
        crop_size={"height": 48, "width": 48},
        image_grid_pinpoints=[list(grid) for grid in config.tiles.grids],
    )
    theirs = peer(scene(*size), return_tensors="np")
    ours, shape = AnyresProcessor(config).pixels(scene(*size), True)
    assert_same_views(ours, theirs["pixel_values"][0], config)
    assert shape.size == tuple(theirs["image_sizes"][0])[::-1]


@pytest.mark.parity
@pytest.mark.parametrize("size", PICTURES)
def test_views_equal_llava_onevision_of_transformers(size):
    transformers = pytest.importorskip("transformers")
    config = processor(48, all_pairs(4), "hw", "pad")
    peer = transformers.LlavaOnevisionImageProcessorPil(
        size={"height": 48, "width": 48},
        image_grid_pinpoints=[list(grid) for grid in config.tiles.grids],
        image_mean=HALF,
        image_std=HALF,
    )
    ours, _ = AnyresProcessor(config).pixels(scene(*size), True)
    theirs = peer(scene(*size), return_tensors="np")["pixel_values"][0]
    assert_same_views(ours, theirs, config)
    ours, shape = AnyresProcessor(config).pixels(scene(*size), False)
    theirs = peer([[scene(*size), scene(9, 9)]], return_tensors="np")["pixel_values"][0]
    assert_same_views(ours, theirs, config)
    assert shape == ImageGrid(size=size)


@pytest.mark.parametrize("size", PICTURES)
@pytest.mark.parametrize("pairs", SMALL_PAIRS.values(), ids=SMALL_PAIRS)
def test_views_equal_the_original_written_out(size, pairs):
    """LLaVA's steps on a PIL image, with (width, height) everywhere."""
    config, picture = processor(48, pairs), scene(*size)
    width, height = original_choice(size, config.tiles.grids)
    across, down = width / size[0], height / size[1]
    if across < down:
        inner = width, min(math.ceil(size[1] * across), height)
    else:
        inner = min(math.ceil(size[0] * down), width), height
    canvas = pil.new("RGB", (width, height), (0, 0, 0))
    canvas.paste(picture.resize(inner), ((width - inner[0]) // 2, (height - inner[1]) // 2))
    views = [picture.resize((48, 48))]
    for top in range(0, height, 48):
        for left in range(0, width, 48):
            views.append(canvas.crop((left, top, left + 48, top + 48)))
    expected = np.stack([np.asarray(view) for view in views]).transpose(0, 3, 1, 2) / 127.5 - 1
    ours, shape = AnyresProcessor(config).pixels(picture, True)
    assert np.abs(ours - expected).max() < 1e-6
    assert shape.views == len(views)


@settings(max_examples=40)
@given(
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.sampled_from(["wh", "hw"]),
    st.sampled_from(["tile", "pad"]),
    st.booleans(),
)
def test_header_and_pixels_give_the_same_shape(size, axes, multi_image, alone):
    config = processor(16, NEXT_PAIRS, axes, multi_image)
    image = Image(pil.new("RGB", size, RED))
    views, shape = pixels_of(image, config, alone)
    assert shape == grid_of(image, config, alone)
    assert views.shape == (shape.views, 3, 16, 16)
    assert image_processor(config).depends_on_image_count == (multi_image == "pad")


@pytest.mark.parametrize("size", [(65_535, 1), (1, 65_535)])
def test_extreme_shapes_stay_small(size):
    views, shape = AnyresProcessor(NEXT).pixels(pil.new("RGB", size, RED), True)
    assert views.shape == (1 + shape.rows * shape.columns, 3, 336, 336)


# ---- config --------------------------------------------------------------------------------------


def test_config_round_trip():
    for config in (NEXT, ONEVISION, replace(NEXT, tiles=replace(NEXT.tiles, axes="hw"))):
        values = config.to_dict()
        assert values["tiles"]["grids"][0] == list(config.tiles.grids[0])
        assert ImageProcessorConfig.from_dict(values) == config


def test_dicts_written_before_there_were_tiles():
    plain = replace(NEXT, tiles=None)
    assert set(plain.to_dict()) == {"size", "resize", "mean", "std", "resample", "crop_fraction"}
    assert ImageProcessorConfig.from_dict(plain.to_dict()) == plain


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"grids": ()}, "grids"),
        ({"grids": ((336,),)}, "grids"),
        ({"grids": ((336, 0),)}, "grids"),
        ({"grids": ((336, 500),)}, "multiples of size 336"),
        ({"axes": "xy"}, "wh or hw"),
        ({"multi_image": "crop"}, "tile or pad"),
    ],
)
def test_wrong_configs(change, says):
    with pytest.raises(InputError, match=says):
        replace(NEXT, tiles=replace(NEXT.tiles, **change))


def test_wrong_dicts():
    values = NEXT.to_dict()
    with pytest.raises(InputError, match="did you mean 'grids'"):
        ImageProcessorConfig.from_dict({**values, "tiles": {"grid": [[1, 1]]}})
    with pytest.raises(InputError, match="only with 'squash'"):
        ImageProcessorConfig.from_dict({**values, "resize": "pad"})
    with pytest.raises(InputError, match="grids"):
        AnyresConfig.from_dict({"grids": "(1x1),...,(6x6)"})
