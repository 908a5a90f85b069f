"""Phi-3.5-vision's run of image tokens: the tiles' lines, a mark, the lines of the whole picture.

    tiles, put together: rows * s lines of columns * s tokens, each ended by `line`
    `middle`, one token
    base view: s lines of s tokens, each ended by `line`

Both marks are learned in the width that the connector's layers read, and pass them as tokens do.
Called by `fusion.py`; knows no tower and no weights' names elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visavis.model.visual import Shape


class Separators(nn.Module):
    """The learned marks, as two rows [2, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.line = nn.Parameter(torch.zeros(width))
        self.middle = nn.Parameter(torch.zeros(width))

    def forward(self) -> Tensor:
        return torch.stack((self.line, self.middle))


def count_hd(side: int, shape: Shape) -> int:
    """Return how many tokens a picture becomes whose views are of side x side tokens."""
    tiles = shape.rows * side * (shape.columns * side + 1)
    return tiles + 1 + side * (side + 1)


def arrange_hd(tokens: Tensor, shape: Shape, marks: Tensor) -> Tensor:
    """Return the run of tokens [n, D] of the views' tokens [V, s, s, D], the base view first.

    Args:
        marks: what `Separators` become in the decoder's width, [2, D].
    """
    line, middle = marks.to(tokens.dtype)[:, None, None]  # each [1, 1, D]
    tiles = tokens[1:].unflatten(0, (shape.rows, shape.columns)).transpose(1, 2)
    whole = tiles.flatten(2, 3).flatten(0, 1)  # [rows * s, columns * s, D]
    runs = [
        torch.cat((image, line.expand(len(image), 1, -1)), 1).flatten(0, 1)
        for image in (whole, tokens[0])
    ]
    return torch.cat((runs[0], middle[0], runs[1]))
