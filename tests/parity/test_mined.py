"""Mined texts against sentence_transformers.util.mine_hard_negatives: rules and rank windows."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.test_negatives import Table, match, mined
from visavis.data.hard_negatives import Mining
from visavis.inputs import Prompt

pytestmark = pytest.mark.parity
NUM, OTHERS = 40, 60


class Columns(dict):
    """As much of `datasets.Dataset` as the peer uses; the library itself is not needed."""

    @property
    def column_names(self) -> list[str]:
        return list(self)

    @staticmethod
    def from_dict(columns: dict[str, list[Any]]) -> Columns:
        return Columns(columns)

    def to_pandas(self) -> Any:
        anchors = next(iter(self.values()))
        counts = {name: {a: list(anchors).count(a) for a in anchors} for name in self}
        count = SimpleNamespace(to_dict=lambda: counts)
        return SimpleNamespace(groupby=lambda name: SimpleNamespace(count=lambda: count))


class Peer:
    """As much of a SentenceTransformer: vectors from the same table."""

    device = torch.device("cpu")

    def __init__(self, table: Table) -> None:
        self.table = table

    def encode_query(self, texts: Sequence[str], **_: Any) -> np.ndarray:
        return np.stack([self.table.vector(text) for text in texts])

    encode_document = encode_query

    def similarity(self, first: Any, second: Any) -> torch.Tensor:
        return torch.as_tensor(first) @ torch.as_tensor(second).T

    def similarity_pairwise(self, first: Any, second: Any) -> torch.Tensor:
        return (torch.as_tensor(first) * torch.as_tensor(second)).sum(1)


def peers_negatives(
    table: Table, texts: dict[str, str], others: list[str], monkeypatch: Any, **settings: Any
) -> dict[str, list[tuple[str, float]]]:
    peer = pytest.importorskip("sentence_transformers.util")
    stub = ModuleType("datasets")
    stub.Dataset = Columns  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", stub)
    module = sys.modules[peer.mine_hard_negatives.__module__]
    monkeypatch.setattr(module, "is_datasets_available", lambda: True)
    dataset = Columns(query=list(texts), answer=list(texts.values()))
    rows = peer.mine_hard_negatives(
        dataset, Peer(table), corpus=others, output_scores=True, verbose=False, **settings
    )
    found: dict[str, list[tuple[str, float]]] = {}
    for query, text, (_, score) in zip(
        rows["query"], rows["negative"], rows["scores"], strict=True
    ):
        found.setdefault(query, []).append((text, score))
    return found


@pytest.mark.parametrize(
    "shared",
    [
        {},
        {"relative_margin": 0.05},
        {"absolute_margin": 0.05},
        {"relative_margin": 0.2, "absolute_margin": 0.1},
        {"range_min": 7},
        {"range_min": 3, "range_max": 8, "relative_margin": 0.1},
        {"max_score": 0.4, "min_score": -0.1},
    ],
    ids=str,
)
def test_the_same_are_mined(
    shared: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, draw = Table(), np.random.default_rng(3)
    pairs = {f"query {i}": f"answer {i}" for i in range(NUM)}
    others = [f"other {i}" for i in range(OTHERS)]
    for i in range(NUM):  # answers near their queries, some far
        noise = draw.normal(size=8) * draw.uniform(0.2, 2)
        table.vectors[f"answer {i}"] = table.vector(f"query {i}") + noise
    shared = {"relative_margin": None, "range_max": 60, **shared}
    expected = peers_negatives(table, pairs, others, monkeypatch, num_negatives=4, **shared)
    settings = Mining(nearest=4, **shared)
    samples = [match(query, query, answer) for query, answer in pairs.items()]
    items = [Prompt.of(other) for other in others]
    found, corpus, _ = mined(samples, settings, tmp_path, table, items)
    named = {
        query: [(corpus.prompt(one.place)[0].text, one.score) for one in each]
        for query, each in found.items()
        if each
    }
    assert named.keys() == expected.keys() and expected
    for query, each in expected.items():
        assert [text for text, _ in named[query]] == [text for text, _ in each]
        np.testing.assert_allclose(
            [score for _, score in named[query]], [score for _, score in each], atol=1e-6
        )
