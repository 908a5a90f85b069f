"""Ollama's own client against a real server, and what it cannot send but the server takes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import ollama
import pytest

import visavis
from tests.fakes import picture, tiny_model
from tests.serve.serving import base64_of, client_of, png, serving
from visavis import Model


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving() as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> ollama.Client:
    return ollama.Client(host=address, trust_env=False)


@pytest.fixture(scope="module")
def http(address: str) -> Iterator[httpx.Client]:
    with client_of(address) as client:
        yield client


def test_chat_about_an_image(client: ollama.Client) -> None:
    message = {"role": "user", "content": "What?", "images": [png(picture(1))]}
    found = client.chat("tiny", [message], options={"num_predict": 20})
    expected = tiny_model().chat("What?", [picture(1)], max_new_tokens=20)
    assert found.message.content == expected.text
    assert found.done and found.done_reason == expected.finish_reason
    assert found.eval_count == expected.usage.completion_tokens
    assert found.prompt_eval_count == expected.usage.prompt_tokens
    lines = list(client.chat("tiny", [message], options={"num_predict": 20}, stream=True))
    assert "".join(line.message.content or "" for line in lines) == expected.text
    assert [line.done for line in lines] == [False] * (len(lines) - 1) + [True]
    assert len(lines) > 3


def test_generate(client: ollama.Client) -> None:
    found = client.generate(
        "tiny:latest", "What?", system="Be short.", images=[png(picture(2))],
        options={"num_predict": 12, "temperature": 1.0, "seed": 3, "num_ctx": 4096},
    )  # fmt: skip
    assert found.response == tiny_model().chat(
        "What?",
        [picture(2)],
        history=[{"role": "system", "content": "Be short."}],
        max_new_tokens=12,
        temperature=1.0,
        seed=3,
    ).text  # fmt: skip


def test_an_answer_by_json_schema(client: ollama.Client) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    found = client.generate("tiny", "Count", format=schema, options={"num_predict": 60})
    assert json.loads(found.response or "")["a"] in (1, 2)


def test_embeddings(client: ollama.Client) -> None:
    expected = tiny_model().embed(["a cat", "two dogs"])
    found = client.embed("tiny", ["a cat", "two dogs"])
    np.testing.assert_allclose(np.array(found.embeddings), expected, atol=1e-6)
    one = client.embed("tiny", "a cat", dimensions=8, truncate=True)
    cut = expected[0, :8] / np.linalg.norm(expected[0, :8])
    np.testing.assert_allclose(np.array(one.embeddings[0]), cut, atol=1e-6)
    old = client.embeddings("tiny", "a cat")
    np.testing.assert_allclose(np.array(old.embedding), expected[0], atol=1e-6)


def test_images_are_embedded_in_both_forms(http: httpx.Client) -> None:
    sent = base64_of(png(picture(1)))
    body: dict[str, Any] = {"model": "tiny", "input": "a cat", "images": [sent]}
    found = np.array(http.post("/api/embed", json=body).json()["embeddings"])
    model = tiny_model()
    np.testing.assert_allclose(found, model.embed(["a cat", picture(1)]), atol=1e-5)
    body = {"model": "tiny", "inputs": [{"text": "at night", "image": sent}, {"image": sent}]}
    found = np.array(http.post("/api/embed", json=body).json()["embeddings"])
    expected = model.embed([{"image": picture(1), "text": "at night"}, picture(1)])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_models_and_version(client: ollama.Client, http: httpx.Client) -> None:
    (tag,) = client.list().models
    assert tag.model == "tiny"
    assert [one.model for one in client.ps().models] == ["tiny"]
    shown = client.show("tiny")
    assert set(shown.capabilities or []) == {"completion", "embedding", "vision"}
    assert shown.modelinfo is not None
    assert shown.modelinfo["visavis.embedding_length"] == tiny_model().embedding_dim
    assert http.get("/api/version").json() == {"version": visavis.__version__}


@pytest.mark.parametrize(
    ("call", "status", "told"),
    [
        (lambda c: c.chat("gemma", [{"role": "user", "content": "x"}]), 404, "there is no model"),
        (lambda c: c.chat("tiny", [{"role": "user", "content": " "}]), 400, "empty text"),
        (lambda c: c.embed("tiny", []), 400, "nothing to embed"),
        (lambda c: c.embed("tiny", "x", keep_alive="soon"), 400, "keep_alive"),
        (lambda c: c.generate("tiny", "x", options={"mirostat": 2}), 400, "mirostat"),
        (lambda c: c.generate("tiny", "x", suffix="y"), 400, "suffix"),
    ],
)
def test_errors_have_the_clients_shape(
    client: ollama.Client, call: Any, status: int, told: str
) -> None:
    with pytest.raises(ollama.ResponseError, match=told) as caught:
        call(client)
    assert caught.value.status_code == status


def test_a_model_is_loaded_on_first_use_and_unloaded_when_idle() -> None:
    loads: list[str] = []

    def load(source: str, **options: Any) -> Model:
        loads.append(source)
        return tiny_model(int(source))

    settings = {"models": {"a": "0", "b": "1"}, "unload_after": 3600}
    with serving(settings, models={}, load=load) as (address, server):
        client = ollama.Client(host=address, trust_env=False)
        assert client.ps().models == [] and loads == []
        for name, seed in (("b", 1), ("a", 0), ("b", 1)):
            (vector,) = client.embed(name, "a cat").embeddings
            expected = tiny_model(seed).embed(["a cat"])[0]
            np.testing.assert_allclose(np.array(vector), expected, atol=1e-6)
        assert loads == ["1", "0"]
        assert {one.model for one in client.ps().models} == {"a", "b"}
        client.generate("b", keep_alive=0)  # how the client unloads a model
        deadline = time.monotonic() + 30
        while len(client.ps().models) > 1 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert [one.model for one in client.ps().models] == ["a"]
        client.embed("b", "again")
        assert loads == ["1", "0", "1"]
        assert server.service.pool.entries["b"].users == 0


def test_who_leaves_while_a_model_loads_does_not_keep_others_from_it() -> None:
    loads: list[str] = []

    def load(source: str, **options: Any) -> Model:
        loads.append(source)
        time.sleep(0.6)
        return tiny_model()

    with serving({"models": {"a": "0"}}, models={}, load=load) as (address, _):
        with client_of(address) as http, pytest.raises(httpx.TimeoutException):
            http.post("/api/embed", json={"model": "a", "input": "x"}, timeout=0.2)
        client = ollama.Client(host=address, trust_env=False)
        assert len(client.embed("a", "x").embeddings) == 1
        assert loads == ["0"]
