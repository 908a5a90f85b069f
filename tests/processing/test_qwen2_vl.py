"""Smart resize and patches: against transformers' own processor, and what it lacks against the
formula."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)

from visavis.errors import ImageError, InputError
from visavis.processing.config import QWEN2_VL_SIZES as SIZES_OF
from visavis.processing.config import ImageProcessorConfig, Qwen2VLConfig
from visavis.processing.qwen2_vl import Qwen2VLProcessor, resized

CLIP: dict[str, Any] = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
SIZES = [(56, 56), (20, 30), (10, 1000), (14, 14), (42, 70), (200, 1), (13, 2600), (640, 480)]
BOUNDS = [(3136, 1003520), (3136, 12845056), (784, 30000), (60000, 90000)]


def processor(**settings: Any) -> ImageProcessorConfig:
    return ImageProcessorConfig(28, "patches", **CLIP, patches=Qwen2VLConfig(**settings))


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("size", SIZES)
def test_pictures_equal_transformers(size: tuple[int, int], bounds: tuple[int, int]) -> None:
    least, most = bounds
    peer = Qwen2VLImageProcessorPil(size={"shortest_edge": least, "longest_edge": most})
    theirs = peer(images=[noise(size)], return_tensors="np")
    config = processor(min_pixels=least, max_pixels=most)
    ours, shape = Qwen2VLProcessor(config).pixels(noise(size))
    assert (1, shape.rows, shape.columns) == tuple(theirs["image_grid_thw"][0])
    assert ours.dtype == np.float32 and ours.shape == theirs["pixel_values"].shape
    one_level = 1 / 255 / max(CLIP["std"])
    assert abs(ours - theirs["pixel_values"]).max() < one_level / 1000
    assert Qwen2VLProcessor(config).grid(size) == shape


def test_sizes_equal_transformers() -> None:
    config = Qwen2VLConfig()
    for width, height in np.random.default_rng(1).integers(1, 4000, (3000, 2)).tolist():
        if max(width, height) <= 200 * min(width, height):
            assert resized((width, height), config)[::-1] == smart_resize(height, width)


def test_extreme_pictures() -> None:
    with pytest.raises(ImageError, match="2010 x 10 pixels is too long and narrow"):
        resized((2010, 10), Qwen2VLConfig())
    square = Qwen2VLConfig(extreme="square")
    assert resized((6000, 29), square) == (980, 980)
    assert resized((2010, 10), square) == resized((27, 500), square) == (56, 56)
    assert resized((27, 500), square, frames=2) == (504, 504)
    assert resized((640, 480), square) == resized((640, 480), Qwen2VLConfig())


def test_published_sizes() -> None:
    """Of VLM2Vec: a square of 1344 pixels, 2304 tokens; at most 1280 tokens, also a frame."""
    base = Qwen2VLConfig(max_pixels=12845056, video_max_pixels=602112)
    first = replace(base, **SIZES_OF["vlm2vec-v1"])
    grid = Qwen2VLProcessor(ImageProcessorConfig(28, "patches", **CLIP, patches=first)).grid(
        (10, 4000)
    )
    assert grid.rows == grid.columns == 96
    second = replace(base, **SIZES_OF["vlm2vec-v2"])
    for video in (False, True):
        width, height = resized((4000, 3000), second, video)
        assert 1200 < width * height / 28**2 <= 1280


def test_a_video_is_pairs_of_frames() -> None:
    """Each pair equals the picture's patches with its second frame replaced; odd ends repeat."""
    config = processor()
    frames = [noise((64, 60), seed) for seed in range(3)]
    ours, shape = Qwen2VLProcessor(config).video_pixels(frames)
    assert (shape.frames, shape.rows, shape.columns, shape.video) == (2, 4, 4, True)
    singles = [Qwen2VLProcessor(config).pixels(frame)[0].reshape(16, 3, 2, -1) for frame in frames]
    first, second = ours.reshape(2, 16, 3, 2, -1)
    assert np.array_equal(first[:, :, 0], singles[0][:, :, 0])
    assert np.array_equal(first[:, :, 1], singles[1][:, :, 0])
    assert np.array_equal(second, singles[2])
    assert Qwen2VLProcessor(config).video_grid(3, (64, 60)) == shape


def test_a_videos_frames_have_bounds_of_their_own() -> None:
    config = processor(video_min_pixels=784, video_max_pixels=3136)
    frames = [noise((640, 480)), noise((320, 250))]  # the first says what size
    _, shape = Qwen2VLProcessor(config).video_pixels(frames)
    assert (shape.rows, shape.columns) == (2, 4)
    assert Qwen2VLProcessor(config).pixels(frames[0])[1].rows == 34


def test_settings() -> None:
    config = processor(extreme="square", video_max_pixels=5000)
    assert ImageProcessorConfig.from_dict(config.to_dict()) == config
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"patch": 0}, "patch is 0, expected a whole number from 1 on"),
        ({"min_pixels": 9, "max_pixels": 8}, "at least 9 and at most 8 pixels"),
        ({"extreme": "crop"}, "expected refuse or square"),
    ]
    for settings, message in wrong:
        with pytest.raises(InputError, match=message):
            Qwen2VLConfig(**settings)
    with pytest.raises(InputError, match="unknown key 'pach'"):
        Qwen2VLConfig.from_dict({"pach": 3})
    with pytest.raises(InputError, match="size is 32, but a token 28 pixels"):
        ImageProcessorConfig(32, "patches", **CLIP, patches=Qwen2VLConfig())
    with pytest.raises(InputError, match="resize='squash', but patches are Qwen2VLConfig"):
        ImageProcessorConfig(28, "squash", **CLIP, patches=Qwen2VLConfig())
    with pytest.raises(InputError, match="resize='patches', but patches are None"):
        ImageProcessorConfig(28, "patches", **CLIP)
