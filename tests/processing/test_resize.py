"""Sizing pictures as the reference processors do: crop, squash, pad."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as pil

from tests.pictures import RED, scene
from visavis.errors import InputError
from visavis.processing import resize
from visavis.processing.config import ImageProcessorConfig
from visavis.processing.resize import process_image, resize_image

CLIP = ImageProcessorConfig(
    56, "crop", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
)
SIGLIP = ImageProcessorConfig(48, "squash", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
LLAVA = replace(CLIP, resize="pad")
SIZES = [(97, 61), (61, 97), (56, 56), (30, 20), (57, 56), (640, 427), (333, 500), (900, 58)]


def grey_levels(pixels, config):
    """Undo the normalisation: [3, S, S] in 0..255."""
    std, mean = (np.array(v).reshape(3, 1, 1) for v in (config.std, config.mean))
    return (np.asarray(pixels, np.float64) * std + mean) * 255


def assert_same_picture(ours, theirs, config):
    assert ours.dtype == np.float32 and ours.shape == (3, config.size, config.size)
    difference = np.abs(grey_levels(ours, config) - grey_levels(theirs, config))
    assert difference.max() <= 1.001  # one grey level, plus rounding in the undoing


@pytest.mark.parity
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
def test_crop_equals_clip(size, resample):
    transformers = pytest.importorskip("transformers")
    config = replace(CLIP, resample=resample)
    peer = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 56},
        crop_size={"height": 56, "width": 56},
        resample=resize.FILTERS[resample],
    )
    picture = scene(*size)
    theirs = peer(picture, return_tensors="np")["pixel_values"][0]
    assert_same_picture(process_image(picture, config), theirs, config)


@pytest.mark.parity
@pytest.mark.parametrize("size", SIZES)
def test_crop_fraction_is_a_larger_resize(size):
    transformers = pytest.importorskip("transformers")
    config = replace(CLIP, size=50, crop_fraction=0.89)
    peer = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 50, "width": 50}
    )
    picture = scene(*size)
    theirs = peer(picture, return_tensors="np")["pixel_values"][0]
    assert_same_picture(process_image(picture, config), theirs, config)


@pytest.mark.parity
@pytest.mark.parametrize("size", SIZES)
def test_squash_equals_siglip(size):
    transformers = pytest.importorskip("transformers")
    peer = transformers.SiglipImageProcessorPil(size={"height": 48, "width": 48})
    picture = scene(*size)
    theirs = peer(picture, return_tensors="np")["pixel_values"][0]
    assert_same_picture(process_image(picture, SIGLIP), theirs, SIGLIP)


@pytest.mark.parity
@pytest.mark.parametrize("size", SIZES)
def test_pad_equals_llava_of_transformers(size):
    transformers = pytest.importorskip("transformers")
    peer = transformers.models.llava.image_processing_pil_llava.LlavaImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, do_pad=True
    )
    picture = scene(*size)
    theirs = peer(picture, return_tensors="np")["pixel_values"][0]
    assert_same_picture(process_image(picture, LLAVA), theirs, LLAVA)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(16, 256),
    st.integers(16, 256),
    st.integers(1, 96),
    st.sampled_from(["bicubic", "bilinear"]),
)
def test_pad_equals_the_square_formula(width, height, size, resample):
    """Paste on a square of int(mean * 255), offset floor((long - short) / 2), then resize."""
    config = replace(LLAVA, size=size, resample=resample)
    picture, side = scene(width, height), max(width, height)
    square = pil.new("RGB", (side, side), (122, 116, 104))
    square.paste(picture, ((side - width) // 2, (side - height) // 2))
    expected = np.asarray(square.resize((size, size), resize.FILTERS[resample]))
    assert np.array_equal(np.asarray(resize_image(picture, config)), expected)


@pytest.mark.parametrize("config", [CLIP, SIGLIP, LLAVA], ids=lambda config: config.resize)
@pytest.mark.parametrize("size", [(65_535, 1), (1, 65_535), (1, 1)])
def test_extreme_shapes_stay_small(config, size):
    assert process_image(pil.new("RGB", size, RED), config).shape == (3, config.size, config.size)


@pytest.mark.parametrize("size", [(500, 30), (30, 500)])
def test_the_cheap_ways_for_huge_pictures_look_the_same(size, monkeypatch):
    """They may only differ by what Pillow rounds between its two passes."""
    picture = pil.linear_gradient("L").resize(size).convert("RGB")
    exact = [np.asarray(resize_image(picture, config)).astype(int) for config in (CLIP, LLAVA)]
    monkeypatch.setattr(resize, "_EXTREME_ASPECT", 1)
    monkeypatch.setattr(resize, "MAX_PIXELS", 1)
    cheap = [np.asarray(resize_image(picture, config)).astype(int) for config in (CLIP, LLAVA)]
    for one, other in zip(exact, cheap, strict=True):
        assert np.abs(one - other).max() <= 2


def test_config_round_trip_and_errors():
    config = replace(CLIP, crop_fraction=0.875, resample="bilinear")
    assert ImageProcessorConfig.from_dict(config.to_dict()) == config
    with pytest.raises(InputError, match="did you mean 'resample'"):
        ImageProcessorConfig.from_dict({**config.to_dict(), "resampel": "bicubic"})
    with pytest.raises(InputError, match="mean, std missing"):
        ImageProcessorConfig.from_dict({"size": 4, "resize": "pad"})
    with pytest.raises(InputError, match=r"size is 0.*resize is 'stretch'.*std is"):
        ImageProcessorConfig(0, "stretch", (0, 0, 0), (0, 1, 1))
    with pytest.raises(InputError, match="no effect"):
        replace(SIGLIP, crop_fraction=0.9)
