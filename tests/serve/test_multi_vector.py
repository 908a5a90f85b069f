"""Multi-vector models behind the APIs: reranked by MaxSim, and no single vectors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

import visavis
from tests.fakes import picture, tiny_model, tiny_multi_vector_model
from tests.serve.serving import client_of, data_uri, serving

TEXTS = ["a red house", "two dogs", "x"]


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    models = {"multi": tiny_multi_vector_model(), "tiny": tiny_model()}
    settings = {"instructions": {"query": "Find it.", "document": "Keep it."}}
    with serving(settings, models=models) as (address, _), client_of(address) as client:
        yield client


def similarities(query: str, items: list[Any]) -> np.ndarray:
    model = tiny_multi_vector_model()
    first = model.embed_multi([query])[0]
    found = [model.embed_multi(item, documents=True)[0] for item in items]
    return np.array([visavis.maxsim(first, one) / len(first) for one in found])


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank"])
def test_rerank_is_by_maxsim(client: httpx.Client, path: str) -> None:
    documents: list[Any] = [*TEXTS, *({"image": data_uri(picture(seed))} for seed in (1, 2))]
    body = {"model": "multi", "query": "dogs", "documents": documents}
    results = client.post(path, json=body).json()["results"]
    expected = similarities("dogs", [*TEXTS, picture(1), picture(2)])
    order = np.argsort(-expected, kind="stable")
    assert [one["index"] for one in results] == order.tolist()
    scores = [one["relevance_score"] for one in results]
    np.testing.assert_allclose(scores, (1 + expected[order]) / 2, atol=1e-5)
    assert np.ptp(scores) > 0.01


def test_score_is_the_mean_of_the_best_cosines(client: httpx.Client) -> None:
    body = {"model": "multi", "text_1": "dogs", "text_2": TEXTS}
    data = client.post("/v1/score", json=body).json()["data"]
    scores = [one["score"] for one in data]
    np.testing.assert_allclose(scores, similarities("dogs", TEXTS), atol=1e-5)


def test_there_is_no_single_vector(client: httpx.Client) -> None:
    answer = client.post("/v1/embeddings", json={"model": "multi", "input": "x"})
    assert answer.status_code == 400 and "use embed_multi" in answer.json()["error"]["message"]
    shown = client.post("/api/show", json={"model": "multi"}).json()
    assert "embedding" not in shown["capabilities"]
    body = {"model": "multi", "query": "x", "documents": ["y"], "instruction": "Find it."}
    refused = client.post("/v1/rerank", json=body)
    assert refused.status_code == 400 and "takes none" in refused.text
    both = {"text": "at night", "image": data_uri(picture(1))}
    refused = client.post("/v1/rerank", json={**body, "instruction": None, "documents": [both]})
    assert refused.status_code == 400 and "one text or one image" in refused.text
