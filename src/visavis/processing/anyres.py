"""An image as a view of the whole and tiles of it (LLaVA 1.6's "anyres").

    image ── squash ──────────────────────────────────► base view [S, S]
       └─ choose a canvas ── resize, centre on black ── cut ──► tiles [S, S], row by row

Which canvas is chosen follows from the image's size alone, so its tokens can be counted before
its pixels are read.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import Any

import numpy as np
from PIL import Image as pil

from visavis.model.image_input import ImageGrid
from visavis.processing.config import AnyresConfig
from visavis.processing.resize import FILTERS, ImageProcessor, normalise, process_image


class AnyresProcessor(ImageProcessor):
    """A base view of the whole image, and tiles of it on the canvas that fits it best."""

    needs_size = True

    @property
    def tiles(self) -> AnyresConfig:
        """The canvases."""
        assert self.config.tiles is not None
        return self.config.tiles

    @property
    def depends_on_image_count(self) -> bool:
        """Whether an image is sized differently when its prompt holds another."""
        return self.tiles.multi_image == "pad"

    def grid(self, size: tuple[int, int], is_only_image: bool = True) -> ImageGrid:
        """Return the tiles of an image, from its width and height alone."""
        tiles, tile = self.tiles, self.config.size
        size = (tiles.square, tiles.square) if tiles.square else size
        if self.depends_on_image_count and not is_only_image:
            return ImageGrid(size=size)
        width, height = best_grid(size, tiles)
        return ImageGrid(rows=height // tile, columns=width // tile, size=size)

    def pixels(self, image: pil.Image, is_only_image: bool = True) -> tuple[np.ndarray, ImageGrid]:
        """Return the base view and the tiles of a decoded (RGB) image, float32 [V, 3, S, S]."""
        config, tile = self.config, self.config.size
        grid = self.grid(image.size, is_only_image)
        if image.size != grid.size:  # `square`
            image = image.resize(grid.size, pil.Resampling.BICUBIC)
        if not grid.rows:
            return process_image(image, replace(config, resize="pad", tiles=None))[None], grid
        base = process_image(image, config)
        canvas = pil.new("RGB", (grid.columns * tile, grid.rows * tile))
        inner = fit(image.size, canvas.size)
        corner = ((canvas.width - inner[0]) // 2, (canvas.height - inner[1]) // 2)
        canvas.paste(image.resize(inner, FILTERS[config.resample]), corner)
        views = normalise(np.asarray(canvas), config)
        views = views.reshape(3, grid.rows, tile, grid.columns, tile).transpose(1, 3, 0, 2, 4)
        return np.concatenate((base[None], views.reshape(-1, 3, tile, tile))), grid


def best_grid(size: tuple[int, int], tiles: AnyresConfig) -> tuple[int, int]:
    """Return width and height of the canvas that keeps most of an image's pixels, and of those
    the one with the least room to spare, and of those the first."""
    width, height = size

    def lost_and_wasted(grid: tuple[int, int]) -> tuple[int, int]:
        scale = min(grid[0] / width, grid[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return -kept, grid[0] * grid[1] - kept

    step = 1 if tiles.axes == "wh" else -1
    grids: list[Any] = [grid[::step] for grid in tiles.grids]
    best: tuple[int, int] = min(grids, key=lost_and_wasted)
    return best


def fit(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """Return the width and height of an image that fills a canvas but keeps its aspect ratio."""
    (width, height), (right, bottom) = size, canvas
    x, y = right / width, bottom / height
    if x < y:
        return right, min(ceil(height * x), bottom)
    return min(ceil(width * y), right), bottom
