"""Losses over similarities: InfoNCE in one or both directions, with what its users add to it.

    z_ij = k s_ij + a sg(s_ij) [j is no positive of i]       k = 1 / temperature, sg: stop-gradient

Rows are queries; columns are all targets: the positive of each query, then hard negatives. One
direction is VLM2Vec's loss, both with `alpha` are LLaVE's hardness weighting. All in float32,
whatever the vectors are. Knows no model, no data and no devices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CELLS = 2**19  # similarities that are in memory at a time


@dataclass(frozen=True)
class Contrast:
    """The numbers of a contrastive loss.

    Args:
        symmetric: targets look for their queries too (LLaVE); hard negatives take no part there.
        alpha: weight of a negative's own similarity, LLaVE's hardness weighting; 0: none.
        margin: leave out negatives more similar than the positive plus this (Qwen3-VL-Embedding:
            0.1); None: keep.
        ratio: leave out negatives more similar than this share of the positive's similarity
            (NV-Retriever: 0.95); None: keep.
        dims: lengths that vectors are also cut to, each with the same loss, averaged (Matryoshka
            representation learning, Kusupati et al. 2022); empty: whole vectors only.
    """

    symmetric: bool = False
    alpha: float = 0.0
    margin: float | None = None
    ratio: float | None = None
    dims: tuple[int, ...] = ()


def contrastive_loss(
    queries: Tensor,
    targets: Tensor,
    settings: Contrast,
    *,
    scale: Tensor | float,
    excluded: Tensor | Callable[[slice], Tensor] | None = None,
) -> Tensor:
    """Return the mean loss, float32. Rows go in blocks: memory grows with N, not with its square.

    Args:
        queries: [N, D], unit rows.
        targets: [M, D], unit rows, M >= N: row i is the positive of query i, the rest are hard
            negatives of all.
        scale: what similarities are multiplied by, the inverse temperature.
        excluded: bool [N, M], pairs that are no negatives, such as equal targets; or what makes
            rows of it when they are needed, the first N columns of which must be symmetric.
    """
    num = len(queries)

    def forth(rows: slice) -> Tensor | None:
        return excluded[rows] if isinstance(excluded, Tensor) else excluded and excluded(rows)

    def back(rows: slice) -> Tensor | None:
        if isinstance(excluded, Tensor):
            return excluded[:, :num].T[rows]
        return excluded and excluded(rows)[:, :num]

    directions = [(queries, targets, forth)]
    if settings.symmetric:
        directions.append((targets[:num], queries, back))
    dims = settings.dims or (queries.shape[1],)
    total = torch.zeros((), device=queries.device)
    for dim in dims:
        for rows, columns, left_out in directions:
            rows, columns = cut(rows.float(), dim), cut(columns.float(), dim)
            size = max(1, CELLS // len(columns))
            for first in range(0, num, size):
                total = total + checkpoint(
                    _block_loss,
                    rows[first : first + size],
                    columns,
                    first,
                    settings,
                    scale,
                    left_out,
                    use_reentrant=False,
                )
    return total / (num * len(directions) * len(dims))


def cut(vectors: Tensor, dim: int) -> Tensor:
    """Return the first `dim` numbers of each row, normalised again."""
    return vectors if dim == vectors.shape[1] else F.normalize(vectors[:, :dim], dim=-1)


def _block_loss(
    rows: Tensor,
    columns: Tensor,
    first: int,
    settings: Contrast,
    scale: Tensor | float,
    left_out: Callable[[slice], Tensor | None],
) -> Tensor:
    excluded = left_out(slice(first, first + len(rows)))
    losses = row_losses(rows @ columns.T, settings, scale=scale, first=first, excluded=excluded)
    return losses.sum()


def row_losses(
    similarity: Tensor,
    settings: Contrast,
    *,
    scale: Tensor | float,
    first: int = 0,
    excluded: Tensor | None = None,
) -> Tensor:
    """Return the loss of each row of similarities, float32 [n, M] -> [n].

    Args:
        first: the column of the first row's positive; those of the others follow it.
        excluded: bool [n, M], see `contrastive_loss`.
    """
    rows = torch.arange(len(similarity), device=similarity.device)
    fixed = similarity.detach()
    positive = fixed[rows, first + rows][:, None]
    left_out = torch.zeros_like(fixed, dtype=torch.bool) if excluded is None else excluded.clone()
    if settings.margin is not None:
        left_out |= fixed > positive + settings.margin
    if settings.ratio is not None:
        left_out |= fixed > positive * settings.ratio
    left_out[rows, first + rows] = False
    harder = settings.alpha * fixed
    harder[rows, first + rows] = 0
    logits = (scale * similarity + harder).masked_fill(left_out, -torch.inf)
    return F.cross_entropy(logits, first + rows, reduction="none")


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the summed cross entropy, float32, of logits [T, vocab] at labels [T].

    A sum, so that steps of several parts weight tokens and not parts; divide by their number.
    """
    return F.cross_entropy(logits.float(), labels, reduction="sum")
