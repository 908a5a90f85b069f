"""Idefics3's and SmolVLM's images: square tiles, and then a view of the whole.

    image ── longer side to `longest_edge`, sides even ── sides to whole tiles ──► canvas
    canvas ──┬── cut ──► tiles [rows * columns, 3, S, S], row by row
             └── squash ──► whole [3, S, S], the last view

A canvas of one tile is that view alone. Small images are enlarged. How many tiles there are follows
from the size alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image as pil

from visavis.errors import InputError
from visavis.model.image_input import ImageGrid
from visavis.processing.config import SplitConfig, VideoConfig
from visavis.processing.resize import FILTERS, ImageProcessor, normalise

Size = tuple[int, int]  # width, height


class Idefics3Processor(ImageProcessor):
    """Tiles and a view of the whole, at the end."""

    needs_size = True

    @property
    def split(self) -> SplitConfig:
        """How images are cut."""
        assert self.config.split is not None
        return self.config.split

    @property
    def video(self) -> VideoConfig:
        """Which frames of a video are taken.

        Raises:
            InputError: the model takes no videos.
        """
        if not self.split.video_edge:
            raise InputError("this model takes no videos, only images: pass some frames as images")
        return self.config.video or VideoConfig()

    def grid(self, size: Size, is_only_image: bool = True) -> ImageGrid:
        """Return the tiles of an image, from its width and height alone."""
        if not self.split.cut:
            return ImageGrid()
        width, height = canvas(longest(size, self.split.longest_edge), self.config.size)
        rows, columns = height // self.config.size, width // self.config.size
        return ImageGrid(rows=rows, columns=columns) if rows * columns > 1 else ImageGrid()

    def pixels(self, image: pil.Image, is_only_image: bool = True) -> tuple[np.ndarray, ImageGrid]:
        """Return the tiles of a decoded (RGB) image and its whole, float32 [V, 3, S, S]."""
        grid, side = self.grid(image.size), self.config.size
        resample = FILTERS[self.config.resample]
        image = image.resize(longest(image.size, self.split.longest_edge), resample)
        if grid.rows:
            image = image.resize((grid.columns * side, grid.rows * side), resample)
        whole = normalise(np.asarray(image.resize((side, side), resample)), self.config)[None]
        if not grid.rows:
            return whole, grid
        cut = normalise(np.asarray(image), self.config)
        tiles = cut.reshape(3, grid.rows, side, grid.columns, side).transpose(1, 3, 0, 2, 4)
        return np.concatenate((tiles.reshape(-1, 3, side, side), whole)), grid

    def video_pixels(self, frames: Sequence[pil.Image]) -> tuple[np.ndarray, ImageGrid]:
        """Return a square view of each of the decoded (RGB) frames, and their grid."""
        side, resample = self.config.size, FILTERS[self.config.resample]
        views = [
            frame.resize(longest(frame.size, self.split.video_edge), resample).resize(
                (side, side), resample
            )
            for frame in frames
        ]
        pixels = np.stack([normalise(np.asarray(view), self.config) for view in views])
        return pixels, ImageGrid(len(frames), video=True)


def longest(size: Size, edge: int) -> Size:
    """Return the size whose longer side is `edge` and whose shorter one is even."""
    width, height = size
    ratio = width / height
    if width >= height:
        shorter = int(edge / ratio)
        return edge, max(1, shorter + shorter % 2)
    shorter = int(edge * ratio)
    return max(1, shorter + shorter % 2), edge


def canvas(size: Size, tile: int) -> Size:
    """Return the size in whole tiles that an image is squashed to."""
    width, height = size
    ratio = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        return width, max(1, math.ceil(int(width / ratio) / tile)) * tile
    height = math.ceil(height / tile) * tile
    return max(1, math.ceil(int(height * ratio) / tile)) * tile, height
