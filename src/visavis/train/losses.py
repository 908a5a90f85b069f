"""Contrastive and next-token losses: InfoNCE in one or both directions, with hard negatives.

    z_ij = k s_ij + a sg(s_ij) [j is not a positive of i]    k = 1 / temperature, sg: stop-gradient

Rows are queries; columns are all targets: the positive of each query, then hard negatives. One
direction is VLM2Vec's loss; both with `alpha` are LLaVE's hardness weighting. Computed in float32
for vectors of any type.
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


@dataclass(frozen=True)
class FalseNegatives:
    """Which in-batch targets are not negatives of which queries, made a block of rows at a time.

    Target j is not a negative of query i if its content is that of a target of i, of a query with
    the same content, or of a query of the same group: the rule that mining follows too.

    Args:
        queries: key of each query's content, int64 [N].
        groups: key of its group, int64 [N]; those of no group have a key of their own.
        targets: key of each target's content, int64 [M]; the first N are the positives.

    Keys are numbers from 0, equal where contents are (see `numbered`).
    """

    queries: Tensor
    groups: Tensor
    targets: Tensor

    def of_queries(self, rows: slice) -> Tensor:
        """Return a block of rows of the excluded pairs, bool [n, M]."""
        same = _equal(self.queries[rows], self.queries) | _equal(self.groups[rows], self.groups)
        return _reached(same, self.targets[: len(self.queries)], self.targets)

    def of_targets(self, rows: slice) -> Tensor:
        """Return the same pairs with positives as rows and queries as columns, bool [n, N]."""
        same = _equal(self.targets[: len(self.queries)][rows], self.targets[: len(self.queries)])
        by_query = _reached(same, self.queries, self.queries)
        return by_query | _reached(same, self.groups, self.groups)


def numbered(keys: Tensor) -> Tensor:
    """Return numbers from 0 that are equal where rows of keys are, [M, K] -> int64 [M]."""
    groups: Tensor = torch.unique(keys, dim=0, return_inverse=True)[1]
    return groups


def _equal(rows: Tensor, columns: Tensor) -> Tensor:
    return rows[:, None] == columns[None]


def _reached(marked: Tensor, keys: Tensor, columns: Tensor) -> Tensor:
    """Return which columns have a key that a row marks: bool [n, N] at keys [N] -> bool [n, M]."""
    size = int(columns.max()) + 1
    counts = torch.zeros(len(marked), size, device=marked.device)
    return counts.index_add_(1, keys, marked.float())[:, columns] > 0


def contrastive_loss(
    queries: Tensor,
    targets: Tensor,
    settings: Contrast,
    *,
    scale: Tensor | float,
    excluded: Tensor | FalseNegatives | None = None,
) -> Tensor:
    """Return the mean loss, float32. Rows go in blocks: memory grows with N, not with its square.

    Args:
        queries: [N, D], unit rows.
        targets: [M, D], unit rows, M >= N: row i is the positive of query i, the rest are hard
            negatives of all.
        scale: what similarities are multiplied by, the inverse temperature.
        excluded: pairs that are not negatives, bool [N, M], or the keys that they follow from.
    """
    num = len(queries)

    def forth(rows: slice) -> Tensor | None:
        if isinstance(excluded, FalseNegatives):
            return excluded.of_queries(rows)
        return None if excluded is None else excluded[rows]

    def back(rows: slice) -> Tensor | None:
        if isinstance(excluded, FalseNegatives):
            return excluded.of_targets(rows)
        return None if excluded is None else excluded[:, :num].T[rows]

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
