"""Which parts of an image match a query: the similarity that is lost when a part is covered.

    loss(window)    = cos(query, image) - cos(query, image with the window in its mean colour)
    relevance(cell) = mean loss of the windows that cover the cell

Occlusion (Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks", 2014, section
4.2) with overlapping windows, whose losses are averaged as RISE averages those of its masks
(Petsiuk et al., 2018). It needs only `embed`, so dual encoders and models that embed through their
decoder are explained alike, and by the same number that ranks the hits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageStat

from visavis.inputs import Prompt

CELLS = 8  # along the longer side
WINDOW = 2  # cells along each side of a window
SIZE = 448  # pixels of the longer side: what the towers of most models read
BATCH = 8  # images embedded between two looks at `wanted`


@dataclass(frozen=True)
class Relevance:
    """The relevance of each cell of an image.

    Attributes:
        cells: float32 [rows, columns], a difference of cosines; negative where a part speaks
            against the query.
        score: cosine of the whole image and the query.
    """

    cells: np.ndarray
    score: float


def relevance(
    model: Any,
    image: Image.Image,
    query: Any,
    *,
    wanted: Callable[[], bool] = lambda: True,
) -> Relevance | None:
    """Return which parts of an image match a query; None if it is no longer wanted.

    Args:
        model: embeds some 50 versions of the image.
        query: any input of `Prompt.of`.
        wanted: asked now and then whether to continue.
    """
    image = image.convert("RGB")
    image.thumbnail((SIZE, SIZE))
    rows, columns = grid_of(*image.size)
    windows = [
        (row, column) for row in range(rows - WINDOW + 1) for column in range(columns - WINDOW + 1)
    ]
    colour = tuple(round(mean) for mean in ImageStat.Stat(image).mean)
    versions = [image, *(_covered(image, window, rows, columns, colour) for window in windows)]
    target = model.embed([Prompt.of(query)])[0]
    scores: list[float] = []
    for start in range(0, len(versions), BATCH):
        if not wanted():
            return None
        scores += (model.embed(versions[start : start + BATCH]) @ target).tolist()
    losses, counts = np.zeros((rows, columns)), np.zeros((rows, columns))
    for (row, column), score in zip(windows, scores[1:], strict=True):
        inside = slice(row, row + WINDOW), slice(column, column + WINDOW)
        losses[inside] += scores[0] - score
        counts[inside] += 1
    return Relevance((losses / counts).astype(np.float32), scores[0])


def grid_of(width: int, height: int) -> tuple[int, int]:
    """Return rows and columns of nearly square cells, `CELLS` along the longer side."""
    longer = max(width, height)
    rows, columns = (max(WINDOW, round(CELLS * side / longer)) for side in (height, width))
    return rows, columns


def _covered(
    image: Image.Image,
    window: tuple[int, int],
    rows: int,
    columns: int,
    colour: tuple[int, ...],
) -> Image.Image:
    (row, column), (width, height) = window, image.size
    left, right = (round(edge * width / columns) for edge in (column, column + WINDOW))
    top, bottom = (round(edge * height / rows) for edge in (row, row + WINDOW))
    covered = image.copy()
    covered.paste(colour, (left, top, right, bottom))
    return covered
