"""Nearest-neighbour search by inner product: exact in blocks, or with FAISS.

Rows of the matrix may be memory-mapped; one block of rows and its scores is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from visavis.errors import InputError

BLOCK = 8192  # rows whose scores are in memory at a time
FLAT_UP_TO = 20_000  # rows that FAISS searches exactly: cells would be too small
PROBED = 32  # cells of FAISS that are searched for a query

Found = tuple[np.ndarray, np.ndarray]  # int64 [B, depth] columns, -1 for none; float32 scores


class KNNSearch(Protocol):
    """Finds the most similar of a fixed set of rows."""

    def __call__(self, queries: np.ndarray, excluded: Sequence[Sequence[int]], depth: int) -> Found:
        """Return the best rows of each query, best first; those with score -inf are none.

        Args:
            queries: [B, D].
            excluded: for each query the rows that must not be found.
        """
        ...


class ExactSearch:
    """Search among all rows.

    Args:
        matrix: [R, D], maybe on disk.
        rows: which of them are searched, int64 [M]; what is found are places in this list.
    """

    def __init__(
        self, matrix: np.ndarray, rows: np.ndarray, device: torch.device | str = "cpu"
    ) -> None:
        self.matrix, self.rows, self.device = matrix, rows, device

    def __call__(self, queries: np.ndarray, excluded: Sequence[Sequence[int]], depth: int) -> Found:
        """See `KNNSearch`. Of equal scores the first row comes first."""
        asked = torch.from_numpy(queries).to(self.device)
        lines, columns = _pairs(excluded)
        scores = torch.full((len(asked), 0), -torch.inf, device=self.device)
        places = torch.full((len(asked), 0), -1, device=self.device)
        for first in range(0, len(self.rows), BLOCK):
            part = self.matrix[self.rows[first : first + BLOCK]]
            found = asked @ torch.from_numpy(np.asarray(part)).to(self.device).T  # [B, BLOCK]
            here = (columns >= first) & (columns < first + BLOCK)
            found[lines[here], columns[here] - first] = -torch.inf
            best, at = found.topk(min(depth, found.shape[1]))
            scores, order = _sorted(torch.cat((scores, best), 1), depth)
            places = torch.cat((places, at + first), 1).gather(1, order)
        places[scores == -torch.inf] = -1
        return _padded(places.cpu().numpy(), scores.cpu().numpy(), depth)


class FaissSearch:
    """The same by FAISS: inner products, exact for few rows, in cells for many.

    Raises:
        InputError: FAISS is not installed.
    """

    def __init__(self, matrix: np.ndarray, rows: np.ndarray) -> None:
        try:
            import faiss
        except ImportError as error:
            raise InputError(
                "FAISS is not installed; `pip install faiss-cpu`, or leave out --use-faiss: exact "
                "search needs no extra package."
            ) from error
        vectors = np.ascontiguousarray(matrix[rows], np.float32)
        self.size, dim = vectors.shape
        cells = max(1, round(4 * self.size**0.5))
        kind = "Flat" if self.size <= FLAT_UP_TO else f"IVF{cells},Flat"
        self.index: Any = faiss.index_factory(dim, kind, faiss.METRIC_INNER_PRODUCT)
        self.index.train(vectors)
        self.index.add(vectors)
        if kind != "Flat":
            self.index.nprobe = min(PROBED, cells)

    def __call__(self, queries: np.ndarray, excluded: Sequence[Sequence[int]], depth: int) -> Found:
        """See `KNNSearch`."""
        widest = max(map(len, excluded), default=0)
        scores, places = self.index.search(queries, min(depth + widest, self.size))
        for line, columns in enumerate(excluded):
            scores[line, np.isin(places[line], list(columns))] = -np.inf
        scores[places < 0] = -np.inf
        order = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
        scores, places = (np.take_along_axis(one, order, 1) for one in (scores, places))
        places[scores == -np.inf] = -1
        return _padded(places, scores, depth)


def _pairs(excluded: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return line and column of each excluded pair."""
    lines = [line for line, columns in enumerate(excluded) for _ in columns]
    columns = [column for columns in excluded for column in columns]
    return torch.tensor(lines, dtype=torch.int64), torch.tensor(columns, dtype=torch.int64)


def _sorted(scores: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    values, order = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :depth], order[:, :depth]


def _padded(places: np.ndarray, scores: np.ndarray, depth: int) -> Found:
    missing = ((0, 0), (0, depth - places.shape[1]))
    return (
        np.pad(places, missing, constant_values=-1),
        np.pad(scores, missing, constant_values=-np.inf),
    )
