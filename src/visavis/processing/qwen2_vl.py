"""Images of any size and shape as runs of patches (Qwen2-VL, Qwen2.5-VL, Qwen3-VL).

    any size ── smart resize ──► sides that are multiples of 28 ──► patches [P, 3 * 2 * 14 * 14]

An image keeps its aspect ratio, within bounds of its area. Patches that become one token stand
together: order [time, row / 2, column / 2, 2, 2], each patch [channel, 2 frames, 14, 14]. An image
counts as two equal frames; a video of an odd number of frames repeats its last. How many tokens
there will be follows from sizes alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image as pil

from visavis.errors import ImageError
from visavis.model.image_input import ImageGrid
from visavis.processing.config import ImageProcessorConfig, Qwen2VLConfig
from visavis.processing.resize import FILTERS, ImageProcessor, normalise

MAX_ASPECT = 200
SMALL = 56  # side of the square that VLM2Vec makes of a picture with a side below one token


class Qwen2VLProcessor(ImageProcessor):
    """Patches at any resolution, within bounds of the area."""

    needs_size = True

    @property
    def patches(self) -> Qwen2VLConfig:
        """Sizes of the patches and bounds of the area."""
        assert self.config.patches is not None
        return self.config.patches

    def grid(self, size: tuple[int, int], is_only_image: bool = True) -> ImageGrid:
        """Return the patches of an image, from its width and height alone.

        Raises:
            ImageError: it is too long and narrow.
        """
        width, height = resized(size, self.patches)
        patch = self.patches.patch
        return ImageGrid(1, height // patch, width // patch, size)

    def pixels(self, image: pil.Image, is_only_image: bool = True) -> tuple[np.ndarray, ImageGrid]:
        """Return the patches of a decoded (RGB) image, float32 [P, C], and their grid.

        Raises:
            ImageError: it is too long and narrow.
        """
        return _patches([image], self.config), self.grid(image.size)

    def video_grid(self, frames: int, size: tuple[int, int]) -> ImageGrid:
        """Return the patches of a video, from its number of frames and the size of the first.

        Raises:
            ImageError: it is too long and narrow.
        """
        width, height = resized(size, self.patches, frames)
        patch, time = self.patches.patch, -(-frames // self.patches.temporal)
        return ImageGrid(time, height // patch, width // patch, size, video=True)

    def video_pixels(self, frames: Sequence[pil.Image]) -> tuple[np.ndarray, ImageGrid]:
        """Return the patches of decoded (RGB) frames, float32 [P, C], and their grid.

        Frames of other sizes than the first are resized to its size.

        Raises:
            ImageError: they are too long and narrow.
        """
        grid = self.video_grid(len(frames), frames[0].size)
        return _patches(frames, self.config, len(frames)), grid


def resized(size: tuple[int, int], config: Qwen2VLConfig, frames: int = 0) -> tuple[int, int]:
    """Return the width and height that an image is resized to: multiples of `factor`.

    Sides are rounded, halves to even; if the area is then out of bounds, both are scaled and
    rounded towards the inside of them.

    Args:
        frames: of a video; 0: it is an image.

    Raises:
        ImageError: it is too long and narrow.
    """
    factor, (least, most) = config.factor, config.bounds(frames)
    if config.square:
        size = (config.square, config.square)
    elif config.extreme == "square":
        size = _squared(size, factor, bool(frames))
    counted = rounded_frames = 1  # frames whose areas are bounded together
    if frames and config.whole_videos:
        counted = max(frames, config.temporal)
        rounded_frames = round(counted / config.temporal) * config.temporal
        size = _enlarged(size, factor)
    width, height = size
    if max(size) > MAX_ASPECT * min(size):
        raise ImageError(
            f"a picture of {width} x {height} pixels is too long and narrow, expected an aspect "
            f"ratio of at most {MAX_ASPECT}; cut it into parts"
        )
    rounded = (round(width / factor) * factor, round(height / factor) * factor)
    if rounded_frames * rounded[0] * rounded[1] > most:
        scale = math.sqrt(counted * width * height / most)
        down = (math.floor(side / scale / factor) * factor for side in size)
        width, height = (max(factor, side) for side in down)
    elif rounded_frames * rounded[0] * rounded[1] < least:
        scale = math.sqrt(least / (counted * width * height))
        width, height = (math.ceil(side * scale / factor) * factor for side in size)
    else:
        width, height = rounded
    return width, height


def _enlarged(size: tuple[int, int], factor: int) -> tuple[int, int]:
    """Return the size of a frame whose sides are at least one token's, as Qwen3-VL does it."""
    if min(size) >= factor:
        return size
    scale = max(factor / side for side in size)
    width, height = (int(side * scale) for side in size)
    return width, height


def _squared(size: tuple[int, int], factor: int, video: bool) -> tuple[int, int]:
    """Return the size that VLM2Vec uses for an image, square for extreme aspect ratios."""
    if min(size) < factor:
        return (max(factor, *size),) * 2 if video else (SMALL, SMALL)
    return (max(size),) * 2 if max(size) > MAX_ASPECT * min(size) else size


def _patches(
    frames: Sequence[pil.Image], processor: ImageProcessorConfig, num_frames: int = 0
) -> np.ndarray:
    """Resize, normalise and cut frames: float32 [P, 3 * temporal * patch * patch].

    Args:
        num_frames: of a video; 0: it is an image.
    """
    config = processor.patches
    assert config is not None
    size = resized(frames[0].size, config, num_frames)
    resample = FILTERS[processor.resample]
    pixels = [normalise(np.asarray(frame.resize(size, resample)), processor) for frame in frames]
    pixels += [pixels[-1]] * (-len(pixels) % config.temporal)
    merge, patch, (width, height) = config.merge, config.patch, size
    rows, columns = height // config.factor, width // config.factor
    cut = np.stack(pixels).reshape(
        -1, config.temporal, 3, rows, merge, patch, columns, merge, patch
    )
    cut = cut.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return cut.reshape(-1, 3 * config.temporal * patch * patch)
