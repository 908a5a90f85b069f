"""Embedding, rerank and score requests as clients without a package of their own send them."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from tests.fakes import picture, tiny_model
from tests.serve.serving import base64_of, client_of, data_uri, png, serving
from visavis.serve.encode import quantize

URI = data_uri(picture(1))
BASE64 = base64_of(png(picture(1)))
BOTH = {"image": picture(1), "text": "at night"}


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    settings = {"instructions": {"query": "Find it.", "document": "Keep it."}}
    with serving(settings) as (address, _), client_of(address) as client:
        yield client


def embedded(client: httpx.Client, path: str = "/v1/embeddings", **body: Any) -> np.ndarray:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    found = response.json()
    assert [one["index"] for one in found["data"]] == list(range(len(found["data"])))
    return np.array([one["embedding"] for one in found["data"]])


@pytest.mark.parametrize(
    ("dialect", "body", "items"),
    [
        ("Jina", {"input": [{"text": "a cat"}, {"image": URI}, {"image": BASE64}]},
         ["a cat", picture(1), picture(1)]),
        ("Jina, text only", {"input": ["a cat"], "task": "text-matching", "normalized": True},
         ["a cat"]),
        ("SGLang", {"input": [{"text": "at night", "image": BASE64}]}, [BOTH]),
        ("vLLM", {"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": URI}},
            {"type": "text", "text": "at night"}]}]}, [BOTH]),
        ("Infinity", {"input": [URI], "modality": "image"}, [picture(1)]),
        ("llama.cpp", {"input": [{"prompt_string": "<__media__>at night",
                                  "multimodal_data": [BASE64]}]}, [BOTH]),
        ("llama.cpp, older", {"content": "a cat"}, ["a cat"]),
        ("content parts", {"input": [{"content": [
            {"type": "image_url", "image_url": URI}, {"type": "text", "text": "at night"}]}]},
         [BOTH]),
        ("LiteLLM", {"input": ["a cat"], "encoding_format": None, "user": ""}, ["a cat"]),
        ("open-webui", {"model": "tiny", "input": ["a cat", "two dogs"]}, ["a cat", "two dogs"]),
    ],
)  # fmt: skip
def test_each_form_gives_the_models_vectors(
    client: httpx.Client, dialect: str, body: dict[str, Any], items: list[Any]
) -> None:
    found = embedded(client, **body)
    np.testing.assert_allclose(found, tiny_model().embed(items), atol=1e-5)
    if "messages" not in body:
        same = embedded(client, "/embeddings", **body)
        np.testing.assert_allclose(same, found, atol=1e-5)


@pytest.mark.parametrize("kind", ["float", "base64", "int8", "uint8", "binary", "ubinary"])
def test_each_number_type_in_each_api(client: httpx.Client, kind: str) -> None:
    expected = quantize(tiny_model().embed(["a cat", picture(1)]), kind)

    def checked(rows: list[Any], dtype: Any) -> None:
        if isinstance(rows[0], str):
            rows = [np.frombuffer(base64.b64decode(row), dtype) for row in rows]
        np.testing.assert_allclose(np.array(rows), expected, atol=1e-5)

    inputs = [{"text": "a cat"}, {"image": URI}]
    for name in ("encoding_format", "embedding_type"):
        response = client.post("/v1/embeddings", json={"input": inputs, name: kind})
        checked([one["embedding"] for one in response.json()["data"]], "<f4")
    parts = [
        {"content": [{"type": "text", "text": "a cat"}]},
        {"content": [{"type": "image_url", "image_url": {"url": URI}}]},
    ]
    body = {"model": "tiny", "inputs": parts, "embedding_types": [kind, "float"]}
    found = client.post("/v2/embed", json=body).json()["embeddings"]
    checked(found[kind], "<f4")
    assert {name for name, value in found.items() if value} == {kind, "float"}
    if kind != "base64":
        body = {
            "inputs": [{"content": [{"type": "text", "text": "a cat"}]},
                       {"content": [{"type": "image_base64", "image_base64": URI}]}],
            "output_dtype": kind,
            "output_encoding": "base64",
        }  # fmt: skip
        found = client.post("/v1/multimodalembeddings", json=body).json()
        checked([one["embedding"] for one in found["data"]], expected.dtype)
        assert found["usage"]["image_pixels"] == 48 * 36


def test_int8_keeps_the_cosine_and_bits_are_packed() -> None:
    vectors = tiny_model().embed([f"text {number}" for number in range(50)])
    for kind in ("int8", "uint8"):
        coarse = quantize(vectors, kind).astype(np.float64) - (128 if kind == "uint8" else 0)
        coarse /= np.linalg.norm(coarse, axis=1, keepdims=True)
        np.testing.assert_allclose(coarse @ coarse.T, vectors @ vectors.T, atol=0.02)
    bits = np.unpackbits(quantize(vectors, "ubinary"), axis=1)
    np.testing.assert_array_equal(bits, vectors > 0)
    signed = quantize(vectors, "binary")
    np.testing.assert_array_equal(signed.astype(int) + 128, quantize(vectors, "ubinary"))


def test_sides_and_instructions(client: httpx.Client) -> None:
    model = tiny_model()
    query, target = (
        model.embed(["a cat"], instruction=words) for words in ("Find it.", "Keep it.")
    )
    own = model.embed(["a cat"], instruction="Mine.")
    assert np.abs(query - target).max() > 0.01
    bodies: list[tuple[str, dict[str, Any], str, str]] = [
        ("/v1/embeddings", {"input": ["a cat"]}, "task", "retrieval.query"),
        ("/v1/embeddings", {"input": ["a cat"]}, "input_type", "query"),
        ("/v2/embed", {"texts": ["a cat"]}, "input_type", "search_query"),
        ("/v1/multimodalembeddings",
         {"inputs": [{"content": [{"type": "text", "text": "a cat"}]}]}, "input_type", "query"),
    ]  # fmt: skip
    for path, body, field, name in bodies:
        for value, expected in ((name, query), (name.replace("query", "document"), target)):
            found = vector_of(client.post(path, json={**body, field: value}).json())
            np.testing.assert_allclose(found, expected[0], atol=1e-5)
        asked = {**body, field: name, "instruction": "Mine."}
        np.testing.assert_allclose(
            vector_of(client.post(path, json=asked).json()), own[0], atol=1e-5
        )
        assert client.post(path, json={**body, field: "sideways"}).status_code == 400


def vector_of(found: dict[str, Any]) -> np.ndarray:
    rows = [one["embedding"] for one in found["data"]] if "data" in found else None
    return np.array((rows or found["embeddings"]["float"])[0])


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank"])
def test_rerank_of_hundreds_of_texts_and_images(client: httpx.Client, path: str) -> None:
    texts = [f"document {number}" for number in range(300)]
    documents: list[Any] = [*texts, {"image": URI}, {"text": "at night", "image": URI}]
    body = {"model": "tiny", "query": "document 7", "documents": documents, "top_n": 5}
    found = client.post(path, json={**body, "return_documents": True}).json()["results"]
    model = tiny_model()
    query = model.embed(["document 7"], instruction="Find it.")[0]
    cosines = model.embed([*texts, picture(1), BOTH], instruction="Keep it.") @ query
    order = np.argsort(-cosines, kind="stable")[:5]
    assert [one["index"] for one in found] == order.tolist()
    scores = [one["relevance_score"] for one in found]
    np.testing.assert_allclose(scores, (1 + cosines[order]) / 2, atol=1e-5)
    assert found[0]["document"] == (
        {"text": texts[order[0]]} if order[0] < 300 else documents[order[0]]
    )
    whole = client.post(path, json={"query": "x", "documents": texts}).json()["results"]
    assert len(whole) == 300 and whole[0]["document"] is None


def test_score_is_the_cosine(client: httpx.Client) -> None:
    body = {"model": "tiny", "text_1": "a cat", "text_2": ["two dogs", {"image": URI}]}
    found = client.post("/v1/score", json=body).json()["data"]
    model = tiny_model()
    query = model.embed(["a cat"], instruction="Find it.")[0]
    expected = model.embed(["two dogs", picture(1)], instruction="Keep it.") @ query
    np.testing.assert_allclose([one["score"] for one in found], expected, atol=1e-5)
    pairs = client.post("/v1/score", json={"queries": ["a", "b"], "documents": ["a", "b"]})
    assert len(pairs.json()["data"]) == 2
    odd = client.post("/v1/score", json={"text_1": ["a", "b"], "text_2": ["a", "b", "c"]})
    assert odd.status_code == 400


def test_errors_have_the_shape_of_each_api(client: httpx.Client) -> None:
    assert client.post("/v2/embed", json={"texts": [""]}).json().keys() == {"message"}
    assert client.post("/v1/rerank", json={}).json().keys() == {"detail"}
    assert client.post("/v2/rerank", json={}).json().keys() == {"message"}
    wrong = client.post("/v1/multimodalembeddings", json={"inputs": []})
    assert wrong.json().keys() == {"detail"}
    assert client.post("/v1/embeddings", json={}).json()["error"]["type"] == "invalid_request_error"


def test_the_input_that_is_wrong_is_named(client: httpx.Client) -> None:
    bad: list[Any] = [
        ["a cat", " "],
        ["a cat", {"image": "data:image/png;base64,AAAA"}],
        ["a cat", "long " * 300],
    ]
    for inputs in bad:
        response = client.post("/v1/embeddings", json={"input": inputs})
        assert response.status_code == 400
        assert response.json()["error"]["message"].startswith("input 1: ")
    response = client.post("/v1/embeddings", json={"input": ["a"], "dimensions": 99})
    assert response.status_code == 400
    assert "16 numbers" in response.json()["error"]["message"]
    marked = {"prompt_string": "<__media__> a", "multimodal_data": []}
    response = client.post("/v1/embeddings", json={"input": [marked]})
    assert "1 <__media__> markers" in response.json()["error"]["message"]
