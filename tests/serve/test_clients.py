"""Clients of other vendors pointed at a real server: Cohere, Voyage, LangChain, Haystack."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.fakes import picture, tiny_model
from tests.serve.serving import data_uri, serving

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving() as (address, _):
        yield address


def near(found: Any, items: list[Any]) -> None:
    np.testing.assert_allclose(np.array(found), tiny_model().embed(items), atol=1e-5)


def test_cohere(address: str) -> None:
    cohere = pytest.importorskip("cohere")
    client = cohere.ClientV2(api_key="none", base_url=address)
    texts = ["a cat", "two dogs"]
    found = client.embed(
        model="tiny", texts=texts, input_type="search_document", embedding_types=["float", "int8"]
    )
    near(found.embeddings.float_, texts)
    assert len(found.embeddings.int8[0]) == 16
    images = client.embed(
        model="tiny", images=[data_uri(picture(1))], input_type="image", embedding_types=["float"]
    )
    near(images.embeddings.float_, [picture(1)])
    part = {"type": "image_url", "image_url": {"url": data_uri(picture(1))}}
    both = client.embed(
        model="tiny",
        inputs=[{"content": [part, {"type": "text", "text": "at night"}]}],
        input_type="search_query",
        embedding_types=["float"],
        output_dimension=16,
    )
    near(both.embeddings.float_, [{"image": picture(1), "text": "at night"}])
    documents = [f"document {number}" for number in range(120)]
    ranked = client.rerank(model="tiny", query="document 7", documents=documents, top_n=3)
    assert ranked.results[0].index == 7
    assert ranked.results[0].relevance_score == pytest.approx(1, abs=1e-5)
    with pytest.raises(cohere.errors.NotFoundError, match="there is no model"):
        client.rerank(model="other", query="x", documents=["x"])
    with pytest.raises(cohere.errors.BadRequestError, match="empty text"):
        client.embed(model="tiny", texts=[""], input_type="search_query")


def test_voyage(address: str) -> None:
    voyageai = pytest.importorskip("voyageai")
    client = voyageai.Client(api_key="none", base_url=f"{address}/v1")
    found = client.multimodal_embed(
        inputs=[["at night"], [picture(1)], [picture(1), "at night"]],
        model="tiny",
        input_type="document",
    )
    night = {"image": picture(1), "text": "at night"}
    near(found.embeddings, ["at night", picture(1), night])
    assert found.image_pixels == 2 * 48 * 36
    assert found.total_tokens > 0
    coarse = client.multimodal_embed(inputs=[["a"]], model="tiny", output_dtype="int8")
    assert max(map(abs, coarse.embeddings[0])) == 127
    with pytest.raises(voyageai.error.InvalidRequestError):
        client.multimodal_embed(inputs=[["a"]], model="tiny", output_dimension=999)


def test_voyages_texts(address: str) -> None:
    voyageai = pytest.importorskip("voyageai")
    client = voyageai.Client(api_key="none", base_url=f"{address}/v1")
    near(client.embed(["a cat"], model="tiny", input_type="document").embeddings, ["a cat"])
    coarse = client.embed(["a cat"], model="tiny", output_dtype="int8", output_dimension=8)
    assert len(coarse.embeddings[0]) == 8
    assert max(map(abs, coarse.embeddings[0])) == 127


def test_langchain(address: str) -> None:
    langchain = pytest.importorskip("langchain_openai")
    settings = {"model": "tiny", "base_url": f"{address}/v1", "api_key": "none"}
    embeddings = langchain.OpenAIEmbeddings(check_embedding_ctx_length=False, **settings)
    near(embeddings.embed_documents(["a cat", "two dogs"]), ["a cat", "two dogs"])
    near([embeddings.embed_query("a cat")], ["a cat"])
    with pytest.raises(Exception, match="check_embedding_ctx_length=False"):
        # Its default sends the ids of another vocabulary.
        langchain.OpenAIEmbeddings(tiktoken_enabled=True, **settings).client.create(
            input=[[9906, 1917]], model="tiny"
        )
    chat = langchain.ChatOpenAI(max_tokens=16, temperature=0, **settings)
    part = {"type": "image_url", "image_url": {"url": data_uri(picture(1))}}
    message = {"role": "user", "content": [{"type": "text", "text": "What?"}, part]}
    answer = chat.invoke([message])
    expected = tiny_model().chat_many([[message]], max_new_tokens=16)[0]
    assert answer.content == expected.text
    assert "".join(chunk.content for chunk in chat.stream([message])) == expected.text
    assert answer.usage_metadata["output_tokens"] == expected.usage.completion_tokens


def test_haystack(address: str) -> None:
    embedders = pytest.importorskip("haystack.components.embedders")
    generators = pytest.importorskip("haystack.components.generators.chat")
    haystack = pytest.importorskip("haystack")
    from haystack.dataclasses import ChatMessage
    from haystack.utils import Secret

    settings = {
        "api_base_url": f"{address}/v1",
        "api_key": Secret.from_token("none"),
        "model": "tiny",
    }
    text = embedders.OpenAITextEmbedder(**settings).run("a cat")["embedding"]
    near([text], ["a cat"])
    documents = [haystack.Document(content=words) for words in ("a cat", "two dogs")]
    found = embedders.OpenAIDocumentEmbedder(**settings).run(documents)["documents"]
    near([one.embedding for one in found], ["a cat", "two dogs"])
    generator = generators.OpenAIChatGenerator(generation_kwargs={"max_tokens": 12}, **settings)
    (reply,) = generator.run([ChatMessage.from_user("Go")])["replies"]
    assert reply.text == tiny_model().chat("Go", max_new_tokens=12).text


def test_open_webui_and_litellm_requests(address: str) -> None:
    """The requests of two clients that are not installed here, as their sources send them."""
    import httpx

    headers = {"Authorization": "Bearer none", "X-OpenWebUI-User-Name": "A", "Accept": "*/*"}
    with httpx.Client(base_url=address, trust_env=False, headers=headers, timeout=60) as client:
        body: dict[str, Any] = {"input": ["a cat"], "model": "tiny"}
        near([client.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]], ["a cat"])
        body = {"input": ["a cat"], "model": "tiny", "truncate": True}
        near(client.post("/api/embed", json=body).json()["embeddings"], ["a cat"])
        documents = [f"document {number}" for number in range(90)]
        body = {"model": "tiny", "query": "document 5", "documents": documents, "top_n": 3}
        ranked = client.post("/v1/rerank", json=body).json()["results"]
        assert ranked[0]["index"] == 5 and ranked[0]["relevance_score"] > 0.99
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "Go"}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": 8,
            "metadata": {"user_id": "1", "chat_id": "2"},
        }
        text = client.post("/v1/chat/completions", json=body).text
        assert text.endswith("data: [DONE]\n\n")
        body = {"model": "tiny", "input": ["a cat"], "encoding_format": None, "user": "x"}
        assert client.post("/v1/embeddings", json=body).status_code == 200
