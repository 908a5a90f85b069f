"""Pictures of any size and shape as runs of patches (Qwen2-VL).

    any size ── smart resize ──► sides that are multiples of 28 ──► patches [P, 3 * 2 * 14 * 14]

A picture keeps its aspect ratio, within bounds of its area. Patches that become one token stand
together: order [time, row / 2, column / 2, 2, 2], each patch [channel, 2 frames, 14, 14]. A picture
counts as two equal frames; a video of an odd number of frames repeats its last. How many tokens
there will be follows from sizes alone. Knows no model and imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image as pil

from visavis.errors import ImageError, InputError
from visavis.model.image_input import ImageGrid
from visavis.utils import suggest

if TYPE_CHECKING:
    from visavis.processing.images import ImageProcessorConfig

MAX_ASPECT = 200
SMALL = 56  # side of the square that VLM2Vec makes of a picture with a side below one token


@dataclass(frozen=True)
class Qwen2VLConfig:
    """How pictures become patches.

    Args:
        patch: side of a patch in pixels.
        merge: side of the square of patches that become one token.
        temporal: frames in a patch.
        min_pixels, max_pixels: bounds of a picture's area after resizing.
        video_min_pixels, video_max_pixels: the same of each frame; 0: as a picture's.
        extreme: what becomes of a picture more than 200 times as long as wide: an error, or a
            square, as VLM2Vec does, which squashes pictures with a side below one token too.
        square: side of the square that every picture is squashed to first; 0: none.
    """

    patch: int = 14
    merge: int = 2
    temporal: int = 2
    min_pixels: int = 3136
    max_pixels: int = 1003520
    video_min_pixels: int = 0
    video_max_pixels: int = 0
    extreme: Literal["refuse", "square"] = "refuse"
    square: int = 0

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("patch", "merge", "temporal", "min_pixels", "max_pixels"), 1)
        counts |= dict.fromkeys(("video_min_pixels", "video_max_pixels", "square"), 0)
        problems = []
        for name, least in counts.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                problems.append(f"{name} is {value!r}, expected a whole number from {least} on")
        if self.extreme not in ("refuse", "square"):
            problems.append(f"extreme is {self.extreme!r}, expected refuse or square")
        if problems:
            raise InputError(f"patches config: {'; '.join(problems)}")
        for least, most in (self.bounds(video=False), self.bounds(video=True)):
            if least > most:
                raise InputError(
                    f"patches config: at least {least} and at most {most} pixels, expected room "
                    "between the two"
                )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Qwen2VLConfig:
        """Return the config of plain JSON values; unknown keys are errors."""
        names = [field.name for field in fields(cls)]
        for key in values:
            if key not in names:
                raise InputError(f"patches config: unknown key {key!r}; {suggest(key, names)}")
        return cls(**values)

    @property
    def factor(self) -> int:
        """Side in pixels of what becomes one token."""
        return self.patch * self.merge

    def bounds(self, video: bool) -> tuple[int, int]:
        """Return the smallest and largest area of a picture or of a video's frame."""
        least, most = (self.video_min_pixels, self.video_max_pixels) if video else (0, 0)
        return least or self.min_pixels, most or self.max_pixels


# How models size pictures whatever the folder of their base says, by the name of their profile.
_AS_PICTURES = {"video_min_pixels": 0, "video_max_pixels": 0}
SIZES: dict[str, dict[str, Any]] = {
    "vlm2vec-v1": {"square": 1344, **_AS_PICTURES},
    "vlm2vec-v2": {
        "min_pixels": 4 * 28 * 28,
        "max_pixels": 1280 * 28 * 28,
        "extreme": "square",
        **_AS_PICTURES,
    },
}


def image_shape(size: tuple[int, int], config: Qwen2VLConfig) -> ImageGrid:
    """Return the patches of a picture, from its width and height alone.

    Raises:
        ImageError: it is too long and narrow.
    """
    width, height = resized(size, config)
    return ImageGrid(1, height // config.patch, width // config.patch, size)


def video_shape(frames: int, size: tuple[int, int], config: Qwen2VLConfig) -> ImageGrid:
    """Return the patches of a video, from the number of its frames and the size of the first.

    Raises:
        ImageError: it is too long and narrow.
    """
    width, height = resized(size, config, video=True)
    time = -(-frames // config.temporal)
    return ImageGrid(time, height // config.patch, width // config.patch, size, video=True)


def image_patches(
    image: pil.Image, processor: ImageProcessorConfig
) -> tuple[np.ndarray, ImageGrid]:
    """Return the patches of a decoded (RGB) picture, float32 [P, C], and their shape.

    Raises:
        ImageError: it is too long and narrow.
    """
    assert processor.patches is not None
    return _patches([image], processor), image_shape(image.size, processor.patches)


def video_patches(
    frames: Sequence[pil.Image], processor: ImageProcessorConfig
) -> tuple[np.ndarray, ImageGrid]:
    """Return the patches of decoded (RGB) frames, float32 [P, C], and their shape.

    Frames of other sizes than the first are brought to its.

    Raises:
        ImageError: they are too long and narrow.
    """
    config = processor.patches
    assert config is not None
    shape = video_shape(len(frames), frames[0].size, config)
    return _patches(frames, processor, video=True), shape


def resized(size: tuple[int, int], config: Qwen2VLConfig, video: bool = False) -> tuple[int, int]:
    """Return the width and height that a picture is resized to: multiples of `factor`.

    Sides are rounded, halves to even; if the area is then out of bounds, both are scaled and
    rounded towards the inside of them.

    Raises:
        ImageError: it is too long and narrow.
    """
    factor, (least, most) = config.factor, config.bounds(video)
    if config.square:
        size = (config.square, config.square)
    elif config.extreme == "square":
        size = _squared(size, factor, video)
    width, height = size
    if max(size) > MAX_ASPECT * min(size):
        raise ImageError(
            f"a picture of {width} x {height} pixels is too long and narrow, expected an aspect "
            f"ratio of at most {MAX_ASPECT}; cut it into parts"
        )
    rounded = (round(width / factor) * factor, round(height / factor) * factor)
    if rounded[0] * rounded[1] > most:
        scale = math.sqrt(width * height / most)
        down = (math.floor(side / scale / factor) * factor for side in size)
        width, height = (max(factor, side) for side in down)
    elif rounded[0] * rounded[1] < least:
        scale = math.sqrt(least / (width * height))
        width, height = (math.ceil(side * scale / factor) * factor for side in size)
    else:
        width, height = rounded
    return width, height


def _squared(size: tuple[int, int], factor: int, video: bool) -> tuple[int, int]:
    """Return what VLM2Vec takes an extreme picture's size for."""
    if min(size) < factor:
        return (max(factor, *size),) * 2 if video else (SMALL, SMALL)
    return (max(size),) * 2 if max(size) > MAX_ASPECT * min(size) else size


def _patches(
    frames: Sequence[pil.Image], processor: ImageProcessorConfig, video: bool = False
) -> np.ndarray:
    """Resize, normalise and cut frames: float32 [P, 3 * temporal * patch * patch]."""
    from visavis.processing.images import FILTERS, normalise

    config = processor.patches
    assert config is not None
    size = resized(frames[0].size, config, video)
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
