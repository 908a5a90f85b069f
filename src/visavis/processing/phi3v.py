"""Phi-3.5-vision's pictures: a canvas of whole tiles, cut, with a small view of all of it.

    picture ── resize to whole tiles wide ── white above and below, to whole tiles high ──► canvas
    canvas ── normalise ──┬── bicubic, unfiltered ──► base view [3, S, S]
                          └── cut ──► tiles [rows * columns, 3, S, S], row by row

Upright pictures are turned on their side for the first line, and the canvas is turned back. How
many tiles there are follows from the size alone. Knows no model and imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image as pil

from visavis.errors import InputError
from visavis.model.image_input import ImageGrid
from visavis.utils import suggest

if TYPE_CHECKING:
    from visavis.processing.images import ImageProcessorConfig

WHITE = (255, 255, 255)
CROPS = {"vlm2vec-v1": 4}  # what published models were trained with, by profile
HALF_WAY = (-0.09375, 0.59375, 0.59375, -0.09375)  # bicubic weights (a = -0.75) between two pixels


@dataclass(frozen=True)
class Phi3VConfig:
    """How many tiles a picture becomes at most; published: 4 for several pictures, 16 for one."""

    num_crops: int = 16

    def __post_init__(self) -> None:
        number = self.num_crops
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise InputError(f"num_crops is {number!r}, expected a whole number of at least 1")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Phi3VConfig:
        """Return the config of plain JSON values; unknown keys are errors."""
        names = [field.name for field in fields(cls)]
        for key in values:
            if key not in names:
                raise InputError(f"hd config: unknown key {key!r}; {suggest(key, names)}")
        return cls(**values)


def phi3v_grid(size: tuple[int, int], processor: ImageProcessorConfig) -> ImageGrid:
    """Return the tiles of a picture, from its width and height alone."""
    width, height = _resized((max(size), min(size)), processor)
    across, down = width // processor.size, math.ceil(height / processor.size)
    upright = size[0] < size[1]
    return ImageGrid(rows=across, columns=down) if upright else ImageGrid(rows=down, columns=across)


def phi3v_views(image: pil.Image, processor: ImageProcessorConfig) -> tuple[np.ndarray, ImageGrid]:
    """Return the base view and the tiles of a decoded (RGB) picture, float32 [V, 3, S, S]."""
    from visavis.processing.images import normalise

    shape, side = phi3v_grid(image.size, processor), processor.size
    whole = normalise(
        np.asarray(_canvas(image, processor)), processor
    )  # [3, rows * S, columns * S]
    narrow = _shrink(whole, shape.columns)
    base = _shrink(narrow.swapaxes(1, 2), shape.rows).swapaxes(1, 2)
    tiles = whole.reshape(3, shape.rows, side, shape.columns, side).transpose(1, 3, 0, 2, 4)
    return np.concatenate((base[None], tiles.reshape(-1, 3, side, side))), shape


def _resized(size: tuple[int, int], processor: ImageProcessorConfig) -> tuple[int, int]:
    """Return width and height, of a picture no higher than wide, that it is resized to.

    As many tiles wide as the limit allows, however small the picture is.
    """
    assert processor.hd is not None
    ratio = size[0] / size[1]
    limit = processor.hd.num_crops
    across = max(n for n in range(1, limit + 1) if n * math.ceil(n / ratio) <= limit)
    width = across * processor.size
    return width, max(1, int(width / ratio))


def _canvas(image: pil.Image, processor: ImageProcessorConfig) -> pil.Image:
    from visavis.processing.images import FILTERS

    upright = image.width < image.height
    if upright:  # not only the same in other words: resizing rounds between its two directions
        image = image.transpose(pil.Transpose.TRANSPOSE)
    width, height = _resized(image.size, processor)
    full = -(-height // processor.size) * processor.size
    canvas = pil.new("RGB", (width, full), WHITE)
    resized = image.resize((width, height), FILTERS[processor.resample])
    canvas.paste(resized, (0, (full - height) // 2))
    return canvas.transpose(pil.Transpose.TRANSPOSE) if upright else canvas


def _shrink(x: np.ndarray, times: int) -> np.ndarray:
    """Shrink the last axis a whole number of times, as PyTorch's bicubic does without a filter.

    An output pixel's centre falls on the middle one of an odd number of pixels, or half way
    between the middle two of an even number.
    """
    if times % 2:
        return x[..., times // 2 :: times]
    length = x.shape[-1]
    firsts = np.arange(times // 2 - 2, length - 2, times)
    taps = np.stack([x[..., (firsts + tap).clip(0, length - 1)] for tap in range(4)])
    return np.tensordot(np.array(HALF_WAY, np.float32), taps, 1)
