"""OpenAI's own client against a real server: its requests and the answers it reads."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from tests.fakes import picture, tiny_model
from tests.processing.test_pdf import pdf_bytes
from tests.processing.test_video import encode
from tests.serve.serving import base64_of, data_uri, serving
from visavis.inputs import Document, Video


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with (
        serving() as (address, _),
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def content(*parts: Any) -> Any:
    return [{"role": "user", "content": list(parts)}]


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def image(seed: int) -> dict[str, Any]:
    url = {"url": data_uri(picture(seed)), "detail": "low"}
    return {"type": "image_url", "image_url": url}


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "visavis"
    with pytest.raises(
        openai.NotFoundError, match="there is no model 'gpt-4o'; this server has tiny"
    ):
        client.models.retrieve("gpt-4o")


def test_chat_about_several_images_says_what_the_model_says(client: openai.OpenAI) -> None:
    messages = content(image(1), text("Compare with"), image(2))
    found = client.chat.completions.create(model="tiny", messages=messages, max_tokens=20)
    expected = tiny_model().chat_many(
        [[{"type": "image_url", "image_url": {"url": data_uri(picture(1))}}, text("Compare with"),
          {"type": "image_url", "image_url": {"url": data_uri(picture(2))}}]],
        max_new_tokens=20,
    )[0]  # fmt: skip
    (choice,) = found.choices
    assert choice.message.content == expected.text
    assert choice.finish_reason == expected.finish_reason
    assert found.usage is not None
    assert found.usage.prompt_tokens == expected.usage.prompt_tokens
    assert found.usage.completion_tokens == expected.usage.completion_tokens


def test_a_stream_holds_the_same_answer_and_its_usage(client: openai.OpenAI) -> None:
    messages = content(image(1), text("What?"))
    stream = client.chat.completions.create(
        model="tiny",
        messages=messages,
        max_completion_tokens=30,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    whole = client.chat.completions.create(model="tiny", messages=messages, max_tokens=30)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len(pieces) > 3
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.choices == []
    assert last.usage is not None and whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens


def test_videos_and_documents(client: openai.OpenAI, tmp_path: Path) -> None:
    pytest.importorskip("av")
    pytest.importorskip("pypdfium2")
    clip = encode(tmp_path / "clip.mp4", num=12).read_bytes()
    paper = pdf_bytes(2)
    parts = {
        "video": {
            "type": "video_url",
            "video_url": {"url": f"data:video/mp4;base64,{base64_of(clip)}"},
        },
        "document": {
            "type": "file",
            "file": {
                "file_data": f"data:application/pdf;base64,{base64_of(paper)}",
                "filename": "paper.pdf",
            },
        },
    }
    for kind, part in parts.items():
        messages: Any = content(part, text("What?"))
        found = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12)
        shown = Video(clip) if kind == "video" else Document(paper)
        expected = tiny_model().chat("What?", [shown], max_new_tokens=12)
        assert found.choices[0].message.content == expected.text, kind


def test_several_answers_with_seeds(client: openai.OpenAI) -> None:
    def ask(**more: Any) -> list[str | None]:
        found = client.chat.completions.create(
            model="tiny", messages=content(text("Go")), max_tokens=12, temperature=1.5, **more
        )
        return [choice.message.content for choice in found.choices]

    several = ask(n=3, seed=7)
    assert len(set(several)) == 3
    assert [ask(seed=7 + number)[0] for number in range(3)] == several
    streamed = [""] * 3
    for chunk in client.chat.completions.create(
        model="tiny",
        messages=content(text("Go")),
        max_tokens=12,
        temperature=1.5,
        n=3,
        seed=7,
        stream=True,
    ):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == several


def test_a_stop_text_ends_the_answer(client: openai.OpenAI) -> None:
    whole = tiny_model().chat("Go", max_new_tokens=30).text
    stop = whole[6:8]
    found = client.chat.completions.create(
        model="tiny", messages=content(text("Go")), max_tokens=30, stop=[stop, "never this"]
    )
    assert found.choices[0].message.content == whole[: whole.index(stop)]
    assert found.choices[0].finish_reason == "stop"


def test_logprobs_are_those_of_the_model(client: openai.OpenAI) -> None:
    messages = content(text("Go"))
    found = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=5, logprobs=True, top_logprobs=3
    )
    logprobs = found.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert len(logprobs.content) == 5
    logits = tiny_model().trace([{"role": "user", "content": "Go"}]).logits[-1]
    expected = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    first = logprobs.content[0]
    assert first.logprob == pytest.approx(float(expected.max()), abs=1e-4)
    assert [one.logprob for one in first.top_logprobs] == pytest.approx(
        sorted(expected.tolist(), reverse=True)[:3], abs=1e-4
    )
    assert first.top_logprobs[0].token == first.token  # the likeliest one is said
    stream = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=5, logprobs=True, stream=True
    )
    streamed = [
        one.logprob
        for chunk in stream
        for choice in chunk.choices
        if choice.logprobs and choice.logprobs.content
        for one in choice.logprobs.content
    ]
    assert streamed == pytest.approx([one.logprob for one in logprobs.content])


def test_an_answer_by_json_schema(client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance")
    schema: Any = {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["a"],
        "additionalProperties": False,
    }
    found = client.chat.completions.create(
        model="tiny",
        messages=content(text("Count")),
        max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
    )
    answer = json.loads(found.choices[0].message.content or "")
    assert 0 <= answer["a"] <= 9


def test_embeddings_in_both_encodings(client: openai.OpenAI) -> None:
    texts = ["a cat", "two dogs", "a cat"]
    expected = tiny_model().embed(texts)
    as_base64 = client.embeddings.create(model="tiny", input=texts)  # the client's default
    as_floats = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    for found in (as_base64, as_floats):
        vectors = np.array([one.embedding for one in found.data], np.float32)
        np.testing.assert_allclose(vectors, expected, atol=1e-6)
        assert [one.index for one in found.data] == [0, 1, 2]
    assert as_floats.usage.prompt_tokens == sum(map(len, texts))  # a token a byte
    short = client.embeddings.create(model="tiny", input="a cat", dimensions=8)
    cut = expected[0][:8] / np.linalg.norm(expected[0][:8])
    np.testing.assert_allclose(np.array(short.data[0].embedding), cut, atol=1e-6)


def test_a_batch_of_2048_texts(client: openai.OpenAI) -> None:
    texts = [f"text {number}" for number in range(2048)]
    found = client.embeddings.create(model="tiny", input=texts)
    vectors = np.array([one.embedding for one in found.data], np.float32)
    np.testing.assert_allclose(vectors[::97], tiny_model().embed(texts[::97]), atol=1e-6)


def test_token_ids_are_refused_by_name(client: openai.OpenAI) -> None:
    for ids in ([9906, 1917], [[9906, 1917], [15339]]):
        with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
            client.embeddings.create(model="tiny", input=ids)


def test_responses(client: openai.OpenAI) -> None:
    parts: Any = [
        {"type": "input_text", "text": "What?"},
        {"type": "input_image", "image_url": data_uri(picture(3)), "detail": "auto"},
    ]
    found = client.responses.create(
        model="tiny",
        instructions="Be short.",
        input=[{"role": "user", "content": parts}],
        max_output_tokens=16,
    )
    history = [{"role": "system", "content": "Be short."}]
    question = {"type": "image_url", "image_url": {"url": data_uri(picture(3))}}
    messages = [*history, {"role": "user", "content": [text("What?"), question]}]
    (expected,) = tiny_model().chat_many([messages], max_new_tokens=16)
    assert found.output_text == expected.text
    assert found.status == ("completed" if expected.finish_reason == "stop" else "incomplete")
    assert found.usage is not None
    assert found.usage.output_tokens == expected.usage.completion_tokens


def test_a_stream_of_response_events(client: openai.OpenAI) -> None:
    events = list(
        client.responses.create(model="tiny", input="Go", max_output_tokens=16, stream=True)
    )
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    expected = tiny_model().chat("Go", max_new_tokens=16)
    assert "".join(deltas) == expected.text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    # The model's answer is cut by the limit; the client knows this last event too.
    last = events[-1]
    assert last.type == "response.incomplete"
    assert last.response.output_text == expected.text


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tool calls"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"max_tokens": 10**6}, "at most 4096"),
        ({"top_logprobs": 3}, "needs logprobs"),
        ({"temperature": -1}, "temperature"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"extra_body": {"best_of": 3}}, "best_of: unknown field"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "last message"),
        ({"messages": [{"role": "user", "content": ""}]}, "empty text"),
        ({"messages": content({"type": "input_audio"})}, "messages"),
    ],
)
def test_what_cannot_be_answered_is_a_bad_request(
    client: openai.OpenAI, change: dict[str, Any], told: str
) -> None:
    request: dict[str, Any] = {"model": "tiny", "messages": content(text("Go"))}
    with pytest.raises(openai.BadRequestError, match=told):
        client.chat.completions.create(**{**request, **change})


def test_an_image_that_cannot_be_used(client: openai.OpenAI) -> None:
    urls = {
        "/etc/passwd": "files of the server cannot be named",
        "file:///etc/passwd": "fetches no URLs",
        "http://127.0.0.1/x.png": "fetches no URLs",
        "data:image/png;base64,AAAA": "not a picture",
        "data:image/png;base64,": "is empty",
        "data:text/html;base64,AAAA": "text/html",
        "data:image/png,abc": "not base64",
    }
    for url, told in urls.items():
        part = {"type": "image_url", "image_url": {"url": url}}
        with pytest.raises(openai.BadRequestError, match=told):
            client.chat.completions.create(model="tiny", messages=content(part))


def test_a_damaged_image_is_a_bad_request(client: openai.OpenAI) -> None:
    whole = base64.b64decode(data_uri(picture(1)).partition(",")[2])
    url = f"data:image/png;base64,{base64_of(whole[:-30])}"
    part = {"type": "image_url", "image_url": {"url": url}}
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="tiny", messages=content(part))
