"""Metrics of ranked retrieval in NumPy, with one rule for ties, and intervals for their means.

Every metric here depends only on the ranks of the relevant candidates and on how many there are, so
scores are reduced to ranks first (`Ranks`, block by block for large corpora) and the metrics follow
from those. Formulas are those of VLM2Vec's `metrics.py` (MMEB-V2); on binary labels they equal
trec_eval's, except average precision, which divides by min(relevant, k).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from visavis.errors import InputError

Ties = Literal["pessimistic", "order"]
KS = (1, 5, 10)
RESAMPLES = 1000


@dataclass
class Relevant:
    """The relevant candidates of one query.

    Args:
        candidates: int64 [R], their numbers in the corpus.
        grades: float64 [R], how relevant each is; above 0.
    """

    candidates: np.ndarray
    grades: np.ndarray

    @classmethod
    def of(cls, grades: Mapping[int, float]) -> Relevant:
        """Return the relevant candidates of a mapping from candidate number to grade.

        Raises:
            InputError: there are none, or a grade is not above 0.
        """
        if not grades or not all(np.isfinite(g) and g > 0 for g in grades.values()):
            raise InputError(
                f"relevance grades are {dict(list(grades.items())[:3])}, expected one finite "
                "number above 0 for each relevant candidate and at least one of them"
            )
        numbers = sorted(grades)
        return cls(np.array(numbers, np.int64), np.array([grades[n] for n in numbers], np.float64))


@dataclass
class Ranks:
    """Where the relevant candidates of one query stand.

    Args:
        ranks: int64 [R], from 1, ascending.
        grades: float64 [R], in the order of `ranks`.
        tied: how many candidates that are not relevant have the score of a relevant one.
    """

    ranks: np.ndarray
    grades: np.ndarray
    tied: int


class RankCounter:
    """Ranks of one query's relevant candidates, counted over blocks of candidates.

    Args:
        relevant: which candidates are relevant.
        scores: [R], their scores.
        ties: "pessimistic" ranks a relevant candidate below all that are not relevant and have the
            same score; "order" ranks equal scores by candidate number, as an argmax does.
    """

    def __init__(self, relevant: Relevant, scores: np.ndarray, ties: Ties = "pessimistic") -> None:
        self.relevant, self.scores, self.ties = relevant, np.asarray(scores), ties
        self.order = np.argsort(self.scores, kind="stable")
        self.sorted = self.scores[self.order]
        self.above = np.zeros(len(self.scores), np.int64)  # other candidates ranked higher
        self.tied = 0

    def add(self, scores: np.ndarray, first: int = 0) -> None:
        """Count a block of candidates: `scores` [C] of the candidates from number `first` on."""
        mine = self.relevant.candidates
        own = mine[(mine >= first) & (mine < first + len(scores))] - first
        others = np.delete(scores, own) if len(own) else scores
        # Of each other candidate: how many relevant ones score lower, and how many not higher.
        lower = np.searchsorted(self.sorted, others, side="left")
        not_higher = np.searchsorted(self.sorted, others, side="right")
        below = np.bincount(lower, minlength=len(mine) + 1).cumsum()[:-1]
        self.above[self.order] += len(others) - below
        equal = lower != not_higher
        if not equal.any():
            return
        self.tied += int(equal.sum())
        if self.ties == "pessimistic":
            change = np.bincount(lower[equal], minlength=len(mine) + 1)
            change -= np.bincount(not_higher[equal], minlength=len(mine) + 1)
            self.above[self.order] += change.cumsum()[:-1]
            return
        numbers = np.delete(np.arange(first, first + len(scores)), own)[equal]
        for i, number in enumerate(mine):
            self.above[i] += ((others[equal] == self.scores[i]) & (numbers < number)).sum()

    def result(self) -> Ranks:
        """Return the ranks once all candidates have been added."""
        mine, grades = self.relevant.candidates, self.relevant.grades
        if self.ties == "pessimistic":
            order = np.lexsort((mine, grades, -self.scores))
        else:
            order = np.lexsort((mine, -self.scores))
        return Ranks(self.above[order] + np.arange(1, len(order) + 1), grades[order], self.tied)


def rank(scores: np.ndarray, relevant: Relevant, ties: Ties = "pessimistic") -> Ranks:
    """Return where the relevant candidates stand among all.

    Args:
        scores: [C], finite, higher is better.

    Raises:
        InputError: a score is not finite, or a relevant candidate is not among the candidates.
    """
    scores = np.asarray(scores)
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise InputError(
            f"the score of candidate {bad[0]} is {scores[bad[0]]}, expected a finite number; the "
            "model's vectors overflow in this precision, load it with precision='f32'"
        )
    if relevant.candidates[-1] >= len(scores) or relevant.candidates[0] < 0:
        raise InputError(
            f"candidate {relevant.candidates[-1]} is relevant, but there are {len(scores)} "
            "candidates; the labels belong to another corpus"
        )
    counter = RankCounter(relevant, scores[relevant.candidates], ties)
    counter.add(scores)
    return counter.result()


def query_metrics(found: Ranks, ks: Sequence[int] = KS) -> dict[str, float]:
    """Return hit, precision, recall, f1, map, mrr, ndcg_linear and ndcg_exponential at each k.

    precision@k divides by k, also where the corpus is smaller; map@k divides by min(R, k); mrr@k is
    1 / rank of the first relevant candidate, 0 beyond k. Gains are the grades for ndcg_linear and
    2^grade - 1 for ndcg_exponential; discounts are 1 / log2(rank + 1).
    """
    ranks, grades, total = found.ranks, found.grades, len(found.ranks)
    ideal = np.sort(grades)[::-1]
    values: dict[str, float] = {}
    for k in ks:
        inside = ranks <= k
        hits = int(inside.sum())
        precision, recall = hits / k, hits / total
        both = precision + recall
        values[f"hit@{k}"] = float(hits > 0)
        values[f"precision@{k}"] = precision
        values[f"recall@{k}"] = recall
        values[f"f1@{k}"] = 2 * precision * recall / both if both else 0.0
        precisions = np.arange(1, hits + 1) / ranks[inside]
        values[f"map@{k}"] = float(precisions.sum()) / min(total, k)
        values[f"mrr@{k}"] = 1 / int(ranks[0]) if hits else 0.0
        best = ideal[:k]
        discount = 1 / np.log2(np.arange(2, len(best) + 2))
        own = 1 / np.log2(ranks[inside] + 1)
        gained = grades[inside]
        values[f"ndcg_linear@{k}"] = float(gained @ own / (best @ discount))
        values[f"ndcg_exponential@{k}"] = float(
            np.expm1(gained * np.log(2)) @ own / (np.expm1(best * np.log(2)) @ discount)
        )
    return values


def collect(values: Iterable[Mapping[str, float]]) -> dict[str, np.ndarray]:
    """Return for each metric its values, float64 [queries], from one mapping a query."""
    rows = list(values)
    if not rows:
        return {}
    return {name: np.array([row[name] for row in rows], np.float64) for name in rows[0]}


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Return the numbers of the k highest scores [C], best first, equal scores by number."""
    k = min(k, len(scores))
    if k < len(scores):
        least = np.partition(scores, len(scores) - k)[len(scores) - k]
        chosen = np.flatnonzero(scores >= least)
    else:
        chosen = np.arange(len(scores))
    return chosen[np.argsort(-scores[chosen], kind="stable")][:k]


# --- retrieval between two sets, as CLIP4Clip computes it -----------------------------------------


def one_to_one_ranks(similarity: np.ndarray, ties: Ties = "pessimistic") -> np.ndarray:
    """Return int64 [N], the rank of candidate i for query i in a square matrix [N, N]."""
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]:
        raise InputError(f"similarities have the shape {similarity.shape}, expected [N, N]")
    grades = np.ones(1)
    return np.array(
        [
            rank(row, Relevant(np.array([number]), grades), ties).ranks[0]
            for number, row in enumerate(similarity)
        ]
    )


def clip4clip_ranks(similarity: np.ndarray) -> np.ndarray:
    """Return the ranks that CLIP4Clip's `compute_metrics` counts, one entry for every tie.

    A query whose right candidate ties with n others adds n + 1 entries, at all the ranks the tie
    spans, so that more ranks than queries come back and a tie can count as a hit.
    """
    descending = -np.sort(-similarity, axis=1)
    own = np.diag(similarity)[:, None]
    return np.nonzero(descending == own)[1] + 1


def recall_summary(ranks: np.ndarray) -> dict[str, float]:
    """Return R@1, R@5, R@10 as shares, the median rank MdR and the mean rank MnR."""
    values = {f"R@{k}": float((ranks <= k).mean()) for k in KS}
    return values | {"MdR": float(np.median(ranks)), "MnR": float(ranks.mean())}


# --- intervals ------------------------------------------------------------------------------------


def interval(
    values: np.ndarray,
    *,
    statistic: Callable[[np.ndarray], np.ndarray] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of a statistic over queries.

    Args:
        values: float [N], one value a query.
        statistic: maps [resamples, N] to [resamples]; None: the mean.
    """
    if not len(values):
        return (float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    found = np.empty(resamples)
    step = max(1, min(resamples, 4_000_000 // len(values)))
    for first in range(0, resamples, step):
        last = min(first + step, resamples)
        drawn = values[rng.integers(0, len(values), (last - first, len(values)))]
        found[first:last] = drawn.mean(1) if statistic is None else statistic(drawn)
    low, high = np.percentile(found, (2.5, 97.5))
    return float(low), float(high)


@dataclass(frozen=True)
class Comparison:
    """A paired comparison of two models on the same queries.

    Args:
        difference: mean of the second minus mean of the first.
        low, high: its 95 % bootstrap interval.
        p_value: two-sided, of the sign-flip permutation test of equal means.
        better, worse: queries where the second is better, and worse.
    """

    difference: float
    low: float
    high: float
    p_value: float
    better: int
    worse: int


def compare(
    first: np.ndarray, second: np.ndarray, *, resamples: int = 2000, seed: int = 0
) -> Comparison:
    """Compare two models by their values on the same queries in the same order.

    Raises:
        InputError: the numbers of queries differ.
    """
    if first.shape != second.shape:
        raise InputError(
            f"{len(first)} and {len(second)} queries cannot be paired; compare runs of the same "
            "suite, tasks and data"
        )
    difference = second - first
    low, high = interval(difference, resamples=resamples, seed=seed)
    observed = abs(difference.mean()) if len(difference) else 0.0
    rng = np.random.default_rng(seed)
    extreme, step = 0, max(1, 4_000_000 // max(1, len(difference)))
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        signs = rng.integers(0, 2, (size, len(difference))) * 2 - 1
        extreme += int((np.abs((signs * difference).mean(1)) >= observed - 1e-12).sum())
    return Comparison(
        float(difference.mean()) if len(difference) else 0.0,
        low,
        high,
        (extreme + 1) / (resamples + 1),
        int((difference > 0).sum()),
        int((difference < 0).sum()),
    )
