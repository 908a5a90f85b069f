"""Ranks and metrics of a retrieval task from its vectors, in bounded memory.

Candidates come in blocks. Dot products are computed in float64 and rounded to float32, so that the
same two vectors give the same score in whichever block they meet, and equal scores are real ties.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from visavis.errors import InputError
from visavis.evaluate.items import RetrievalData
from visavis.evaluate.metrics import KS, RankCounter, Ranks, Ties, collect, query_metrics, top_k
from visavis.evaluate.vectors import Vectors

SHOWN = 5  # best candidates of each query that are kept
QUERIES, BLOCK = 2048, 8192  # scored at a time: 128 MB of float64


@dataclass
class Scored:
    """The result of scoring a task.

    Args:
        metrics: for each metric its values, float64 [N].
        numbers: which queries they belong to, [N]; the others could not be scored.
        ranks: of each of them.
        top: of each of them its best candidates and their scores.
        problems: reasons by query.
        tied_queries: how many have other candidates with a right one's score.
    """

    metrics: dict[str, np.ndarray] = field(default_factory=dict)
    numbers: list[int] = field(default_factory=list)
    ranks: list[Ranks] = field(default_factory=list)
    top: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    problems: dict[int, str] = field(default_factory=dict)
    tied_queries: int = 0


def score(
    data: RetrievalData,
    queries: Vectors,
    candidates: Vectors,
    *,
    ties: Ties = "pessimistic",
    ks: tuple[int, ...] = KS,
) -> Scored:
    """Rank the candidates of every query.

    A query is left out, with the reason, where its own vector or that of one of its candidates is
    missing; in a corpus that all queries share, where one of its right candidates is missing.
    """
    if not data.candidates:
        raise InputError("the list of candidates is empty, expected at least the right ones")
    found = Scored()
    bad = np.zeros(len(data.candidates), bool)
    bad[list(candidates.bad)] = True
    pools = data.pools
    for first in range(0, len(data.queries), QUERIES):
        numbers = []
        for number in range(first, min(first + QUERIES, len(data.queries))):
            pool = data.relevant[number].candidates if pools is None else pools[number]
            if number in queries.bad:
                found.problems[number] = queries.bad[number]
            elif bad[pool].any():
                broken = int(pool[bad[pool]][0])
                found.problems[number] = (
                    f"its candidate {_name(data, broken)} cannot be used: {candidates.bad[broken]}"
                )
            else:
                numbers.append(number)
        rows = queries.rows(np.array(numbers, np.int64)).astype(np.float64)  # [Q, D]
        if pools is None:
            results = _global(data, numbers, rows, candidates, bad, ties)
        else:
            results = list(_local(data, numbers, rows, candidates, ties))
        for number, (ranks, top) in zip(numbers, results, strict=True):
            found.numbers.append(number)
            found.ranks.append(ranks)
            found.top.append(top)
            found.tied_queries += ranks.tied > 0
    found.metrics = collect(query_metrics(ranks, ks) for ranks in found.ranks)
    return found


Result = tuple[Ranks, tuple[np.ndarray, np.ndarray]]


def dot(queries: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Return dot products float32 [Q, C] of float64 queries [Q, D] and candidates [C, D]."""
    return (queries @ candidates.T.astype(np.float64)).astype(np.float32)


def _global(
    data: RetrievalData,
    numbers: list[int],
    rows: np.ndarray,
    candidates: Vectors,
    bad: np.ndarray,
    ties: Ties,
) -> list[Result]:
    counters = []
    for row, number in zip(rows, numbers, strict=True):
        relevant = data.relevant[number]
        own = dot(row[None], candidates.rows(relevant.candidates))[0]
        counters.append(RankCounter(relevant, own, ties))
    best = np.full((len(numbers), 0), -np.inf, np.float32)
    names = np.zeros((len(numbers), 0), np.int64)
    for first, block in candidates.blocks(BLOCK):
        scores = dot(rows, block)  # [Q, C]
        usable = ~bad[first : first + len(block)]
        for counter, line in zip(counters, scores, strict=True):
            if usable.all():
                counter.add(line, first)
            else:
                counter.add(np.where(usable, line, -np.inf).astype(np.float32), first)
        scores[:, ~usable] = -np.inf
        best, names = _merge(best, names, scores, first)
    return [
        (counter.result(), (name, value))
        for counter, name, value in zip(counters, names, best, strict=True)
    ]


def _merge(
    best: np.ndarray, names: np.ndarray, scores: np.ndarray, first: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the best scores and their numbers after one more block."""
    if scores.shape[1] > 2 * SHOWN:
        chosen = np.argpartition(-scores, SHOWN, axis=1)[:, :SHOWN]
        chosen.sort(axis=1)
    else:
        chosen = np.tile(np.arange(scores.shape[1]), (len(scores), 1))
    best = np.concatenate([best, np.take_along_axis(scores, chosen, 1)], 1)
    names = np.concatenate([names, chosen + first], 1)
    order = np.argsort(-best, axis=1, kind="stable")[:, :SHOWN]
    return np.take_along_axis(best, order, 1), np.take_along_axis(names, order, 1)


def _local(
    data: RetrievalData, numbers: list[int], rows: np.ndarray, candidates: Vectors, ties: Ties
) -> Iterator[Result]:
    """Rank each query's own candidates.

    Rows share most candidates, so one product of all queries with all candidates that occur is
    quicker than one for each query.
    """
    assert data.pools is not None
    step = 128
    for start in range(0, len(numbers), step):
        part = numbers[start : start + step]
        union = np.unique(np.concatenate([data.pools[number] for number in part]))
        lines = rows[start : start + step]
        scores = np.empty((len(part), len(union)), np.float32)
        for first in range(0, len(union), BLOCK):
            scores[:, first : first + BLOCK] = dot(
                lines, candidates.rows(union[first : first + BLOCK])
            )
        for line, number in zip(scores, part, strict=True):
            pool = data.pools[number]
            own = line[np.searchsorted(union, pool)]
            relevant = data.relevant[number]
            places = np.array([int(np.flatnonzero(pool == c)[0]) for c in relevant.candidates])
            order = np.argsort(places)
            inside = type(relevant)(places[order], relevant.grades[order])
            counter = RankCounter(inside, own[inside.candidates], ties)
            counter.add(own)
            shown = top_k(own, SHOWN)
            yield counter.result(), (pool[shown], own[shown])


def _name(data: RetrievalData, number: int) -> str:
    return data.candidate_ids[number] if data.candidate_ids else str(number)
