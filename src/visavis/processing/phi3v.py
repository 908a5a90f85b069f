"""Phi-3.5-vision's images: a canvas of whole tiles, cut, with a small view of all of it.

    image ── resize to whole tiles wide ── white above and below, to whole tiles high ──► canvas
    canvas ── normalise ──┬── bicubic, unfiltered ──► base view [3, S, S]
                          └── cut ──► tiles [rows * columns, 3, S, S], row by row

Upright images are turned on their side for the first line, and the canvas is turned back. How
many tiles there are follows from the size alone.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image as pil

from visavis.errors import InputError
from visavis.model.image_input import ImageGrid
from visavis.processing.config import ImageProcessorConfig, VideoConfig
from visavis.processing.resize import FILTERS, ImageProcessor, normalise

WHITE = (255, 255, 255)
HALF_WAY = (-0.09375, 0.59375, 0.59375, -0.09375)  # bicubic weights (a = -0.75) between two pixels


class Phi3VProcessor(ImageProcessor):
    """A canvas of whole tiles and a small view of all of it; no videos."""

    needs_size = True

    @property
    def video(self) -> VideoConfig:
        """Refuse videos.

        Raises:
            InputError: always.
        """
        raise InputError("this model takes no videos, only pictures: pass some frames as images")

    def grid(self, size: tuple[int, int], is_only_image: bool = True) -> ImageGrid:
        """Return the tiles of an image, from its width and height alone."""
        width, height = _resized((max(size), min(size)), self.config)
        across, down = width // self.config.size, math.ceil(height / self.config.size)
        upright = size[0] < size[1]
        rows, columns = (across, down) if upright else (down, across)
        return ImageGrid(rows=rows, columns=columns)

    def pixels(self, image: pil.Image, is_only_image: bool = True) -> tuple[np.ndarray, ImageGrid]:
        """Return the base view and the tiles of a decoded (RGB) image, float32 [V, 3, S, S]."""
        grid, side = self.grid(image.size), self.config.size
        canvas = np.asarray(_canvas(image, self.config))
        whole = normalise(canvas, self.config)  # [3, rows * S, columns * S]
        narrow = _shrink(whole, grid.columns)
        base = _shrink(narrow.swapaxes(1, 2), grid.rows).swapaxes(1, 2)
        tiles = whole.reshape(3, grid.rows, side, grid.columns, side).transpose(1, 3, 0, 2, 4)
        return np.concatenate((base[None], tiles.reshape(-1, 3, side, side))), grid


def _resized(size: tuple[int, int], processor: ImageProcessorConfig) -> tuple[int, int]:
    """Return width and height, of an image no higher than wide, that it is resized to.

    As many tiles wide as the limit allows, however small the image is.
    """
    assert processor.hd is not None
    ratio = size[0] / size[1]
    limit = processor.hd.num_crops
    across = max(n for n in range(1, limit + 1) if n * math.ceil(n / ratio) <= limit)
    width = across * processor.size
    return width, max(1, int(width / ratio))


def _canvas(image: pil.Image, processor: ImageProcessorConfig) -> pil.Image:
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
