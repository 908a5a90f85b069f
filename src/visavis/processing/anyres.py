"""A picture as a view of the whole and tiles of it (LLaVA 1.6's "anyres").

    picture ── squash ──────────────────────────────────► base view [S, S]
       └─ choose a canvas ── resize, centre on black ── cut ──► tiles [S, S], row by row

Which canvas is chosen follows from the picture's size alone, so its tokens can be counted before
its pixels are read. Knows no model and imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import ceil
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image as pil

from visavis.errors import InputError
from visavis.model.image_input import ImageGrid
from visavis.utils import suggest

if TYPE_CHECKING:
    from visavis.processing.images import ImageProcessorConfig


@dataclass(frozen=True)
class AnyresConfig:
    """Which canvases a picture may be laid on.

    Args:
        grids: sides of each canvas in pixels, multiples of the tile, in the checkpoint's order.
        axes: whether these pairs are (width, height), as the original code reads them, or
            (height, width), as transformers does. Where several canvases are equally good the
            first is taken, so the two choose differently for many small pictures.
        multi_image: what becomes of a picture that is not its prompt's only one: tiled as well,
            or padded to a square of the mean colour and seen whole only.
        square: side of the square that every picture is squashed to first; 0: none.
    """

    grids: tuple[tuple[int, int], ...]
    axes: Literal["wh", "hw"] = "wh"
    multi_image: Literal["tile", "pad"] = "tile"
    square: int = 0

    def __post_init__(self) -> None:
        problems = []
        if not self.grids or not all(
            len(grid) == 2 and all(type(side) is int and side > 0 for side in grid)
            for grid in self.grids
        ):
            problems.append(f"grids are {self.grids!r}, expected pairs of positive ints")
        if self.axes not in ("wh", "hw"):
            problems.append(f"axes is {self.axes!r}, expected wh or hw")
        if self.multi_image not in ("tile", "pad"):
            problems.append(f"multi_image is {self.multi_image!r}, expected tile or pad")
        if type(self.square) is not int or self.square < 0:
            problems.append(f"square is {self.square!r}, expected 0 or a positive int")
        if problems:
            raise InputError(f"tiles config: {'; '.join(problems)}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AnyresConfig:
        """Return the config of plain JSON values; unknown keys are errors."""
        names = [field.name for field in fields(cls)]
        for key in values:
            if key not in names:
                raise InputError(f"tiles config: unknown key {key!r}; {suggest(key, names)}")
        grids = values.get("grids", ())
        listed = isinstance(grids, (list, tuple)) and all(
            isinstance(g, (list, tuple)) for g in grids
        )
        return cls(**{**values, "grids": tuple(map(tuple, grids)) if listed else grids})


# How models size pictures whatever the folder of their base says, by the name of their profile.
SQUARES = {"vlm2vec-v1": 1344}


def image_shape(size: tuple[int, int], processor: ImageProcessorConfig, alone: bool) -> ImageGrid:
    """Return the tiles of a picture, from its width and height alone.

    Args:
        alone: whether it is its prompt's only one.
    """
    tiles = processor.tiles
    assert tiles is not None
    size = (tiles.square, tiles.square) if tiles.square else size
    if tiles.multi_image == "pad" and not alone:
        return ImageGrid(size=size)
    width, height = best_grid(size, tiles)
    return ImageGrid(rows=height // processor.size, columns=width // processor.size, size=size)


def image_views(
    image: pil.Image, processor: ImageProcessorConfig, alone: bool
) -> tuple[np.ndarray, ImageGrid]:
    """Return the base view and the tiles of a decoded (RGB) picture, float32 [V, 3, S, S]."""
    from visavis.processing.images import FILTERS, normalise, process_image

    shape, tile = image_shape(image.size, processor, alone), processor.size
    if image.size != shape.size:  # `square`
        image = image.resize(shape.size, pil.Resampling.BICUBIC)
    if not shape.rows:
        return process_image(image, replace(processor, resize="pad", tiles=None))[None], shape
    base = process_image(image, processor)
    canvas = pil.new("RGB", (shape.columns * tile, shape.rows * tile))
    inner = fit(image.size, canvas.size)
    corner = ((canvas.width - inner[0]) // 2, (canvas.height - inner[1]) // 2)
    canvas.paste(image.resize(inner, FILTERS[processor.resample]), corner)
    tiles = normalise(np.asarray(canvas), processor)
    tiles = tiles.reshape(3, shape.rows, tile, shape.columns, tile).transpose(1, 3, 0, 2, 4)
    return np.concatenate((base[None], tiles.reshape(-1, 3, tile, tile))), shape


def best_grid(size: tuple[int, int], tiles: AnyresConfig) -> tuple[int, int]:
    """Return width and height of the canvas that keeps most of a picture's pixels, and of those
    the one with the least room to spare, and of those the first."""
    width, height = size

    def lost_and_wasted(grid: tuple[int, int]) -> tuple[int, int]:
        scale = min(grid[0] / width, grid[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return -kept, grid[0] * grid[1] - kept

    step = 1 if tiles.axes == "wh" else -1
    grids: list[Any] = [grid[::step] for grid in tiles.grids]
    return min(grids, key=lost_and_wasted)


def fit(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """Return the width and height of a picture that fills a canvas but keeps its aspect ratio."""
    (width, height), (right, bottom) = size, canvas
    x, y = right / width, bottom / height
    if x < y:
        return right, min(ceil(height * x), bottom)
    return min(ceil(width * y), right), bottom
