"""Ranking metrics against trec_eval, scikit-learn and golden numbers of VLM2Vec and CLIP4Clip."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from visavis.errors import InputError
from visavis.evaluate.metrics import (
    RankCounter,
    Relevant,
    clip4clip_ranks,
    compare,
    interval,
    one_to_one_ranks,
    query_metrics,
    rank,
    recall_summary,
    top_k,
)


def naive(scores: np.ndarray, grades: Mapping[int, float], ties: str) -> list[int]:
    """Return the relevant candidates' ranks by sorting everything."""

    def key(number: int) -> tuple[float, ...]:
        if ties == "pessimistic":
            return (-scores[number], grades.get(number, 0), number)
        return (-scores[number], number)

    order = sorted(range(len(scores)), key=key)
    return [place for place, number in enumerate(order, 1) if number in grades]


cases = st.integers(1, 40).flatmap(
    lambda size: st.tuples(
        st.lists(st.integers(0, 6), min_size=size, max_size=size),
        st.dictionaries(st.integers(0, size - 1), st.integers(1, 3), min_size=1, max_size=6),
        st.integers(1, size),
    )
)


@pytest.mark.parametrize("ties", ["pessimistic", "order"])
@given(case=cases)
def test_ranks_by_blocks_are_those_of_a_full_sort(
    ties: str, case: tuple[list[int], dict[int, int], int]
) -> None:
    values, grades, block = case
    scores = np.array(values, np.float32)
    relevant = Relevant.of(grades)
    counter = RankCounter(relevant, scores[relevant.candidates], ties)  # type: ignore[arg-type]
    for first in range(0, len(scores), block):
        counter.add(scores[first : first + block], first)
    found = counter.result()
    assert list(found.ranks) == naive(scores, grades, ties)
    equal = np.isin(scores, scores[relevant.candidates])
    assert found.tied == equal.sum() - len(grades)
    assert list(rank(scores, relevant, ties).ranks) == list(found.ranks)  # type: ignore[arg-type]


def distinct(seed: int, size: int, number: int) -> tuple[np.ndarray, dict[int, float]]:
    rng = np.random.default_rng(seed)
    scores = rng.permutation(size).astype(np.float32)
    chosen = rng.choice(size, number, replace=False)
    return scores, {int(c): float(rng.integers(1, 4)) for c in chosen}


def test_metrics_are_those_of_trec_eval() -> None:
    pytrec_eval = pytest.importorskip("pytrec_eval")
    names = {"P", "recall", "ndcg_cut", "recip_rank", "success"}
    measures = {f"{n}.1,5,10" if n != "recip_rank" else n for n in names}
    for seed in range(200):
        scores, grades = distinct(seed, 30, 1 + seed % 7)
        qrels = {"q": {f"d{n}": int(g) for n, g in grades.items()}}
        run = {"q": {f"d{n}": float(s) for n, s in enumerate(scores)}}
        expected = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(run)["q"]
        found = query_metrics(rank(scores, Relevant.of(grades)), ks=(1, 5, 10, 30))
        for k in (1, 5, 10):
            assert found[f"precision@{k}"] == pytest.approx(expected[f"P_{k}"])
            assert found[f"recall@{k}"] == pytest.approx(expected[f"recall_{k}"])
            assert found[f"hit@{k}"] == pytest.approx(expected[f"success_{k}"])
            assert found[f"ndcg_linear@{k}"] == pytest.approx(expected[f"ndcg_cut_{k}"])
        assert found["mrr@30"] == pytest.approx(expected["recip_rank"])


def test_metrics_are_those_of_scikit_learn() -> None:
    for seed in range(60):
        scores, grades = distinct(seed, 20, 1 + seed % 5)
        labels = np.array([grades.get(n, 0.0) for n in range(20)])
        found = query_metrics(rank(scores, Relevant.of(grades)), ks=(1, 5, 10, 20))
        assert found["map@20"] == pytest.approx(
            sk.average_precision_score(labels > 0, scores), abs=1e-9
        )
        for k in (1, 5, 10):
            expected = sk.ndcg_score(labels[None], scores[None], k=k)
            assert found[f"ndcg_linear@{k}"] == pytest.approx(expected)
            exponential = sk.ndcg_score(2 ** labels[None] - 1, scores[None], k=k)
            assert found[f"ndcg_exponential@{k}"] == pytest.approx(exponential)
            chosen = np.isin(np.arange(20), np.argsort(-scores)[:k])
            assert found[f"f1@{k}"] == pytest.approx(sk.f1_score(labels > 0, chosen))


def test_golden_numbers_of_vlm2vec() -> None:
    """Printed by RankingMetrics.evaluate of VLM2Vec main@6e1e1d4 on the same rankings."""
    total: dict[str, float] = {}
    for seed in range(50):
        scores, grades = distinct(1000 + seed, 25, 1 + seed % 4)
        binary = dict.fromkeys(grades, 1.0)
        for name, value in query_metrics(rank(scores, Relevant.of(binary))).items():
            total[name] = total.get(name, 0.0) + value / 50
    for name, value in VLM2VEC.items():
        assert total[name] == pytest.approx(value, abs=1e-12), name


VLM2VEC = {
    "hit@1": 0.1,
    "hit@5": 0.5,
    "hit@10": 0.78,
    "ndcg_linear@1": 0.1,
    "ndcg_linear@5": 0.17342624563364253,
    "ndcg_linear@10": 0.276131118385732,
    "ndcg_exponential@5": 0.17342624563364253,
    "ndcg_exponential@10": 0.276131118385732,
    "precision@5": 0.10800000000000001,
    "precision@10": 0.114,
    "recall@1": 0.035,
    "recall@5": 0.24333333333333332,
    "recall@10": 0.4966666666666667,
    "f1@1": 0.050666666666666665,
    "f1@5": 0.14182539682539683,
    "f1@10": 0.17926406926406926,
    "map@1": 0.1,
    "map@5": 0.10661111111111111,
    "map@10": 0.15501256613756614,
    "mrr@5": 0.228,
    "mrr@10": 0.26361111111111113,
}


def test_golden_ranks_of_clip4clip() -> None:
    """Printed by compute_metrics of LLaVE@2c23053's CLIP4Clip on the same matrix."""
    similarity = np.random.default_rng(7).integers(0, 40, (60, 60)).astype(np.float32)
    official = recall_summary(clip4clip_ranks(similarity))
    assert official == pytest.approx(CLIP4CLIP)
    strict = one_to_one_ranks(similarity)
    assert len(strict) == 60 and len(clip4clip_ranks(similarity)) > 60
    assert recall_summary(strict)["MnR"] != official["MnR"]


CLIP4CLIP = {
    "R@1": 0.020547945205479454,
    "R@5": 0.1095890410958904,
    "R@10": 0.16438356164383564,
    "MdR": 32.5,
    "MnR": 31.006849315068493,
}


def test_without_ties_clip4clip_counts_as_we_do() -> None:
    similarity = np.random.default_rng(0).random((50, 50))
    assert (one_to_one_ranks(similarity) == clip4clip_ranks(similarity)).all()


def test_a_constant_encoder_hits_nothing() -> None:
    found = rank(np.zeros(10, np.float32), Relevant.of({0: 1.0}))
    assert found.ranks[0] == 10 and found.tied == 9
    assert rank(np.zeros(10, np.float32), Relevant.of({0: 1.0}), "order").ranks[0] == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_an_error(value: float) -> None:
    scores = np.zeros(5)
    scores[3] = value
    with pytest.raises(InputError, match="candidate 3"):
        rank(scores, Relevant.of({0: 1.0}))


def test_labels_outside_the_corpus_are_an_error() -> None:
    with pytest.raises(InputError, match="candidate 7 is relevant"):
        rank(np.zeros(5), Relevant.of({7: 1.0}))
    with pytest.raises(InputError, match="at least one"):
        Relevant.of({})


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.integers(1, 12))
def test_top_k_is_a_stable_sort(values: list[int], k: int) -> None:
    scores = np.array(values, np.float32)
    assert list(top_k(scores, k)) == list(np.argsort(-scores, kind="stable")[:k])


def test_an_interval_covers_the_mean_in_about_95_of_100_samples() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for number in range(200):
        low, high = interval((rng.random(200) < 0.3).astype(float), seed=number)
        covered += low <= 0.3 <= high
    assert 180 <= covered <= 200


def test_a_paired_comparison_sees_a_small_steady_difference() -> None:
    rng = np.random.default_rng(4)
    first = (rng.random(500) < 0.5).astype(float)
    second = first.copy()
    second[np.flatnonzero(first == 0)[:30]] = 1
    found = compare(first, second)
    assert found.difference == pytest.approx(0.06) and (found.better, found.worse) == (30, 0)
    assert found.low > 0 and found.p_value < 0.01
    same = compare(first, first[::-1].copy())
    assert same.low <= 0 <= same.high and same.p_value > 0.05
    with pytest.raises(InputError, match="cannot be paired"):
        compare(first, second[:10])
