"""Image tokens carry what retrieval needs in directions their words leave empty.

A connector that speaks in words keeps what words say and drops the rest; the retrieval map of raw
features is better than any map of its tokens (dev/LOG.md). Tokens have directions with next to no
variance. There this writes, small, the retrieval map's output: the decoder hardly notices, and the
embedding head reads it back from the input embeddings (layer 0) without loss. Linear connectors
only. Knows no files and no objective.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from visavis.train.pair import Pair

AMPLITUDE = 0.25  # of a token's own spread per direction; measured harmless for answers


@dataclass
class Carried:
    """The changed connector, and the head's image layer that reads layer 0."""

    connector_weight: Tensor  # [D, folds * W]
    connector_bias: Tensor  # [D]
    head_weight: Tensor  # [dim, D]
    head_bias: Tensor  # [dim]


def carry(
    weight: Tensor,  # [D, folds * W]
    bias: Tensor,  # [D]
    folded: Tensor,  # [tokens, folds * W], what the connector reads, of many pictures
    pair: Pair,
    *,
    room: int,
) -> Carried:
    """Write the pair's image map into the `room` directions in which tokens vary least."""
    tokens = folded @ weight.T + bias  # [tokens, D]
    _, directions = torch.linalg.eigh(torch.cov(tokens.T))
    empty = directions[:, :room]  # [D, room], least variance first
    folds = weight.shape[1] // pair.image_weight.shape[1]
    tied = (pair.image_weight / folds).repeat(1, folds)  # the map of a token's mean patch
    wanted = folded @ tied.T + pair.image_bias  # [tokens, dim]
    middle = wanted.mean(0)
    _, main = torch.linalg.eigh(torch.cov(wanted.T))
    main = main[:, -room:]  # [dim, room]: all of it where dim <= room
    written = (wanted - middle) @ main
    size = AMPLITUDE * tokens.std(0).mean() / written.std(0).mean()
    keep = torch.eye(len(bias)) - empty @ empty.T
    mean = empty @ empty.T @ tokens.mean(0)  # stays: the decoder knows it
    empty = empty[:, : main.shape[1]]
    head_weight = main @ empty.T / size
    return Carried(
        connector_weight=keep @ weight + size * empty @ main.T @ tied,
        connector_bias=keep @ bias + mean + size * empty @ main.T @ (pair.image_bias - middle),
        head_weight=head_weight,
        head_bias=middle - head_weight @ mean,
    )
