"""Positions on three axes (time, height, width) for sequences with images and videos: M-RoPE.

    text                    image of 2 x 3 tokens        text
    0 1 2                   3 3 3 3 3 3                  6 7      time
    0 1 2                   3 3 3 4 4 4                  6 7      height
    0 1 2                   3 4 5 3 4 5                  6 7      width

What follows an image or video continues after its largest position on any axis (Wang et al. 2024,
Qwen2-VL). Knows no rotary frequencies (see `rope.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from visavis.model.visual import Shape


def positions(
    length: int, slots: Sequence[tuple[int, int]], shapes: Sequence[Shape], merge: int = 2
) -> Tensor:
    """Return the positions of one sequence, int64 [3, L]; the next token's is their maximum + 1.

    Args:
        length: tokens of the sequence, L.
        slots: (start, number of tokens) of each image or video.
        shapes: their temporal patches, and rows and columns of patches.
        merge: side of the square of patches that become one token.
    """
    pieces: list[Tensor] = []
    at = following = 0  # in the sequence; the next free position
    pairs = zip(slots, shapes, strict=True)
    for (start, count), shape in sorted(pairs, key=lambda pair: pair[0]):
        pieces.append(_text(start - at, following))
        following += start - at
        size = (shape.frames, shape.rows // merge, shape.columns // merge)
        grid = torch.cartesian_prod(*(torch.arange(n) for n in size)).T  # [3, n]
        assert grid.shape[1] == count, f"{shape} has {grid.shape[1]} tokens, its slot {count}"
        pieces.append(grid + following)
        following += max(size)
        at = start + count
    pieces.append(_text(length - at, following))
    return torch.cat(pieces, 1)


def _text(length: int, first: int) -> Tensor:
    return torch.arange(first, first + length).expand(3, -1)
