"""InternVL's images: tiles on the canvas whose aspect ratio is nearest, and a view of the whole.

    image ──┬── squash to columns * S by rows * S ── cut ──► tiles [3, S, S], row by row
            └── squash ──► whole [3, S, S], the last view, where there is more than one tile

How many tiles there are follows from the size alone.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image as pil

from visavis.model.image_input import ImageGrid
from visavis.processing.config import RatioConfig
from visavis.processing.resize import FILTERS, ImageProcessor, normalise, process_image


class InternVLProcessor(ImageProcessor):
    """Tiles and a view of the whole, at the end."""

    needs_size = True

    @property
    def ratio(self) -> RatioConfig:
        """How many tiles an image becomes."""
        assert self.config.ratio is not None
        return self.config.ratio

    def grid(self, size: tuple[int, int], is_only_image: bool = True) -> ImageGrid:
        """Return the tiles of an image, from its width and height alone."""
        columns, rows = nearest_canvas(size, self.config.size, self.ratio)
        return ImageGrid(rows=rows, columns=columns) if rows * columns > 1 else ImageGrid()

    def pixels(self, image: pil.Image, is_only_image: bool = True) -> tuple[np.ndarray, ImageGrid]:
        """Return the tiles of a decoded (RGB) image and its whole, float32 [V, 3, S, S]."""
        grid, side = self.grid(image.size), self.config.size
        whole = process_image(image, self.config)[None]
        if not grid.rows:
            return whole, grid
        size = (grid.columns * side, grid.rows * side)
        canvas = image.resize(size, FILTERS[self.config.resample])
        cut = normalise(np.asarray(canvas), self.config)
        tiles = cut.reshape(3, grid.rows, side, grid.columns, side).transpose(1, 3, 0, 2, 4)
        return np.concatenate((tiles.reshape(-1, 3, side, side), whole)), grid


def nearest_canvas(size: tuple[int, int], tile: int, config: RatioConfig) -> tuple[int, int]:
    """Return columns and rows of the canvas whose aspect ratio is nearest to an image's.

    Of canvases of the same ratio it is the largest that has less than twice the image's pixels.
    """
    if config.max_tiles == 1:
        return 1, 1
    ratio, area = size[0] / size[1], size[0] * size[1]
    best, least = (1, 1), float("inf")
    for columns, rows in _canvases(config.min_tiles, config.max_tiles):
        distance = abs(ratio - columns / rows)
        fits = area > 0.5 * tile * tile * columns * rows
        if distance < least or (distance == least and fits):
            best, least = (columns, rows), distance
    return best


@lru_cache(maxsize=16)
def _canvases(least: int, most: int) -> list[tuple[int, int]]:
    """Return columns and rows of all canvases, those of fewer tiles first."""
    sides = range(1, most + 1)
    found = [(columns, rows) for columns in sides for rows in sides]
    return sorted((one for one in found if least <= one[0] * one[1] <= most), key=_tiles)


def _tiles(canvas: tuple[int, int]) -> int:
    return canvas[0] * canvas[1]
