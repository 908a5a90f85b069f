"""Vectors as bytes, and bounds of the error: exact search that reads a quarter of the memory.

    x ≈ s c     c int8 [D], s = max |x| / 127, e = ‖x - s c‖
    q ≈ t d     d int16 [D], f = ‖q - t d‖

    |q·x - s t d·c| ≤ ‖q‖ e + f ‖s c‖

so an item whose upper bound is below the k-th highest lower bound is not among the k best, and the
others are compared exactly.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from visavis.native.library import check, native

BYTES_PER_THREAD = 4 << 20  # codes below which a second thread does not pay
CONVERTED = 4096  # rows that are converted at a time where the kernels are missing
ROUNDING = 2e-6  # of the products of numbers near 1 in float32, see `Query.bounds`


def encode(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return codes int8 [N, D], scales float32 [N] and error norms float32 [N]; the error of a
    vector that is not finite is infinite.

    Args:
        vectors: float32 [N, D].
    """
    usable = np.isfinite(vectors).all(1)
    clean = np.where(usable[:, None], vectors, 0)
    scales = np.maximum(np.abs(clean).max(1, initial=0), 1e-30) / 127
    codes = np.rint(clean / scales[:, None]).astype(np.int8)
    rest = np.linalg.norm(clean - codes * scales[:, None], axis=1)
    errors = np.where(usable, rest * (1 + 1e-5) + 1e-7, np.inf)
    return codes, scales.astype(np.float32), errors.astype(np.float32)


class Query:
    """A query vector as 16-bit numbers.

    Args:
        vector: float32 [D], finite.
    """

    def __init__(self, vector: np.ndarray) -> None:
        exact = vector.astype(np.float64)
        self.norm = float(np.linalg.norm(exact))
        # No sum of products may exceed 2**31; each |d| is rounded up by at most one half.
        most = (2**31 - 1) / 127 - len(exact)
        highest = max(float(np.abs(exact).max(initial=0)), 1e-30)
        scale = min(32767 / highest, most / max(float(np.abs(exact).sum()), 1e-30))
        self.numbers = np.ascontiguousarray(np.rint(exact * scale).astype(np.int16))
        self.scale = 1 / scale
        self.error = float(np.linalg.norm(exact - self.numbers * self.scale))

    def products(self, codes: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """Return d·c of all rows, or of those with these numbers, float32 [N].

        Args:
            codes: int8 [*, D], contiguous.
            rows: int64 [N].
        """
        number = len(codes) if rows is None else len(rows)
        sums = np.empty(number, np.int32)
        threads = min(os.cpu_count() or 1, max(1, number * codes.shape[1] // BYTES_PER_THREAD))
        edges = [number * i // threads for i in range(threads + 1)]
        spans = [slice(*pair) for pair in pairwise(edges)]
        if native() is None:
            return np.concatenate([self._converted(codes, rows, span) for span in spans])
        jobs = [_pool().submit(self._scan, codes, rows, sums, span) for span in spans[1:]]
        self._scan(codes, rows, sums, spans[0])
        for job in jobs:
            job.result()
        return sums.astype(np.float32)

    def scores(self, products: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """Return approximate cosines, float32 [N]; `products` is overwritten."""
        products *= scales
        products *= np.float32(self.scale)
        return products

    def margins(self, errors: np.ndarray) -> np.ndarray:
        """Return the bounds of the errors of `scores`, float32 [N]."""
        margins: np.ndarray = errors * np.float32(self.norm + self.error)
        margins += np.float32(self.error + ROUNDING * max(self.norm, 1))
        return margins

    def candidates(
        self, scores: np.ndarray, errors: np.ndarray, number: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows that may be among the `number` best and the upper bounds of their
        cosines, the highest first; rows of equal bounds are in their order.

        Args:
            scores: float32 [N]; a row whose score is -inf is left out.
            errors: float32 [N], of all rows.
        """
        rows = np.flatnonzero(scores >= self._threshold(scores, errors, number))
        rows = rows[scores[rows] > -np.inf]
        margins = self.margins(errors[rows])
        lower, upper = scores[rows] - margins, scores[rows] + margins
        kept = upper >= _highest(lower, number)
        rows, upper = rows[kept], upper[kept]
        order = np.argsort(-upper, kind="stable")
        return rows[order], upper[order]

    def _threshold(self, scores: np.ndarray, errors: np.ndarray, number: int) -> float:
        """Return a score below which no row can be among the best, up to the widest error."""
        if number >= len(scores):
            return -np.inf
        # The k-th highest of the maxima of blocks is at most the k-th highest number.
        width = max(1, min(64, len(scores) // (4 * number)))
        whole = len(scores) // width * width
        maxima = scores[:whole].reshape(-1, width).max(1)
        widest = float(self.margins(errors.max(keepdims=True))[0])
        return _highest(maxima, number) - 2 * widest * (1 + 1e-6)

    def _scan(
        self, codes: np.ndarray, rows: np.ndarray | None, sums: np.ndarray, span: slice
    ) -> None:
        library: Any = native()
        part = codes[span] if rows is None else codes
        wanted = None if rows is None else np.ascontiguousarray(rows[span], np.int64)
        check(
            library.vv_scan(
                part.ctypes.data,
                None if wanted is None else wanted.ctypes.data,
                span.stop - span.start,
                codes.shape[1],
                self.numbers.ctypes.data,
                sums[span].ctypes.data,
            )
        )

    def _converted(self, codes: np.ndarray, rows: np.ndarray | None, span: slice) -> np.ndarray:
        """The same products in float32: exact to some 1e-7 of ‖d‖ ‖c‖."""
        found = np.empty(span.stop - span.start, np.float32)
        numbers = self.numbers.astype(np.float32)
        for first in range(span.start, span.stop, CONVERTED):
            last = min(first + CONVERTED, span.stop)
            part = codes[first:last] if rows is None else codes[rows[first:last]]
            found[first - span.start : last - span.start] = part.astype(np.float32) @ numbers
        return found


def _highest(values: np.ndarray, number: int) -> float:
    """Return the number-th highest of some values; -inf if there are fewer."""
    if number > len(values):
        return -np.inf
    return float(np.partition(values, len(values) - number)[len(values) - number])


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="scan")
