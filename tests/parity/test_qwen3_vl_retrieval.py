"""Qwen3-VL-Embedding and Qwen3-VL-Reranker: the prompts of the published code, rendered by the
folder's own template, and its formulas on the stock class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import visavis
from tests.parity.peers import assert_close
from tests.parity.qwen2_vl_files import TEMPLATE_3, noise, peer_inputs, save_qwen3_vl, tokenizer
from tests.serve.serving import client_of, data_uri, serving
from visavis.cli import app
from visavis.errors import InputError
from visavis.processing.config import ImageProcessorConfig, Qwen2VLConfig, sized_as
from visavis.processing.qwen2_vl import Qwen2VLProcessor, resized

pytestmark = pytest.mark.parity
YES, NO = 264, 265
SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".'
)
DEFAULT = "Given a search query, retrieve relevant candidates that answer the query."
IMAGE_PART, VIDEO_PART = {"type": "image"}, {"type": "video"}


def with_answers() -> PreTrainedTokenizerFast:
    found = tokenizer()
    found.add_tokens([AddedToken(text, normalized=False) for text in ("yes", "no")])
    assert found.convert_tokens_to_ids(["yes", "no"]) == [YES, NO]
    found.chat_template = TEMPLATE_3
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    where = tmp_path_factory.mktemp("qwen3-vl")
    peer = save_qwen3_vl(where, vocab_size=266, max_position_embeddings=32768)
    with_answers().save_pretrained(where)
    (where / "chat_template.jinja").write_text(TEMPLATE_3)
    return peer, where


@pytest.fixture(scope="module")
def embedder(folder: tuple[Any, Path]) -> visavis.Model:
    return load(folder[1], "qwen3-vl-embedding")


@pytest.fixture(scope="module")
def reranker(folder: tuple[Any, Path]) -> visavis.Model:
    return load(folder[1], "qwen3-vl-reranker")


def load(folder: Path, profile: str) -> visavis.Model:
    return visavis.load(folder, precision="f32", device="cpu", profile=profile)


def last_state(
    peer: Any, model: visavis.Model, messages: list[dict[str, Any]], images: list[Any]
) -> torch.Tensor:
    """Return the peer's last hidden state of the last token of a conversation."""
    text = with_answers().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert model.processor is not None
    seen = [Qwen2VLProcessor(model.processor).pixels(image) for image in images]
    for patches, _ in seen:
        written = "<|IMAGE_PAD|>" * (len(patches) // 4)
        text = text.replace("<|image_pad|>", written, 1)
    ids = with_answers()(text.replace("<|IMAGE_PAD|>", "<|image_pad|>"))["input_ids"]
    inputs = peer_inputs(ids, [(torch.from_numpy(patches), shape) for patches, shape in seen])
    return peer(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]


def conversation(instruction: str, content: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Return what the published embedder gives its template."""
    system = [{"type": "text", "text": instruction}]
    return [{"role": "system", "content": system}, {"role": "user", "content": content}]


@torch.no_grad()
def test_vectors_are_those_of_the_published_code(
    folder: tuple[Any, Path], embedder: visavis.Model
) -> None:
    one, two = noise((90, 61), 1), noise((64, 100), 2)
    texts = {"type": "text", "text": "a cat"}
    items: list[tuple[Any, list[dict[str, str]], list[Any]]] = [
        ("a cat", [texts], []),
        ({"image": one}, [IMAGE_PART], [one]),
        ({"image": [one, two], "text": "a cat"}, [IMAGE_PART, IMAGE_PART, texts], [one, two]),
    ]
    vectors = embedder.embed([item for item, _, _ in items], instruction="Find it")
    short = embedder.embed([item for item, _, _ in items], instruction="Find it", dim=8)
    for vector, cut, (_, content, images) in zip(vectors, short, items, strict=True):
        state = last_state(folder[0], embedder, conversation("Find it.", content), images)
        expected = torch.nn.functional.normalize(state, dim=0)
        assert_close(torch.from_numpy(vector), expected, f"{len(images)} images")
        expected = torch.nn.functional.normalize(state[:8], dim=0)  # Matryoshka
        assert_close(torch.from_numpy(cut), expected, "the first eight numbers")


@pytest.mark.parametrize(
    ("given", "instruction"),
    [
        (None, "Represent the user's input."),
        ("  ", "Represent the user's input."),
        ("Find it", "Find it."),
        (" Find it! ", "Find it!"),
        ("找", "找."),
        ("找。", "找。"),
    ],
)
def test_instructions_end_with_a_mark(
    embedder: visavis.Model, given: str | None, instruction: str
) -> None:
    prepared = embedder.prepare(visavis.Prompt.of("a cat"), given)
    messages = conversation(instruction, [{"type": "text", "text": "a cat"}])
    text = with_answers().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prepared.token_ids == with_answers()(text)["input_ids"]


def test_a_video_is_embedded_with_the_times_of_its_frames(embedder: visavis.Model) -> None:
    """Sixteen seconds of two pictures each; sixteen frames, eight pairs."""
    video = visavis.Video([noise((40, 40), n) for n in range(32)])
    prepared = embedder.prepare(visavis.Prompt.of([video, visavis.Text("a cat")]))
    text = embedder.tokenizer.decode(prepared.token_ids, skip_special_tokens=False)
    counts = {count for _, count in prepared.image_slots}
    assert len(prepared.image_slots) == 8 and len(counts) == 1
    run = "<|vision_start|>" + "<|video_pad|>" * counts.pop() + "<|vision_end|>"
    times = np.linspace(0, 31, 16).round().reshape(8, 2).mean(1) / 2
    written = "".join(f"<{time:.1f} seconds>{run}" for time in times)
    assert f"<|im_start|>user\n{written}a cat<|im_end|>" in text


def test_published_sizes() -> None:
    base = ImageProcessorConfig(
        32, "patches", (0.5,) * 3, (0.5,) * 3, patches=Qwen2VLConfig(patch=16)
    )
    config = sized_as(base, "qwen3-vl-embedding")
    assert config.patches is not None and config.video is not None
    assert (config.video.fps, config.video.max_frames, config.video.min_frames) == (1.0, 64, 4)
    width, height = resized((4000, 3000), config.patches)
    assert 1700 < width * height / 32**2 <= 1800
    for frames, most in ((8, 768), (64, 240)):  # tokens of a frame: 15,360 of all at most
        width, height = resized((4000, 3000), config.patches, frames)
        assert 0.9 * most < width * height / 32**2 <= most


def judged(
    instruction: str, query: list[dict[str, str]], document: list[dict[str, str]]
) -> list[dict[str, Any]]:
    """Return what the published reranker gives its template."""
    content = [{"type": "text", "text": "<Instruct>: " + instruction}]
    content += [{"type": "text", "text": "<Query>:"}, *query]
    content += [{"type": "text", "text": "\n<Document>:"}, *document]
    return conversation(SYSTEM, content)


@torch.no_grad()
@pytest.mark.parametrize("instruction", [None, "Find cats"])
def test_scores_are_those_of_the_published_code(
    folder: tuple[Any, Path], reranker: visavis.Model, instruction: str | None
) -> None:
    peer, model = folder[0], reranker
    one, two = noise((90, 61), 1), noise((64, 100), 2)
    query = {"image": one, "text": "like this"}
    asked = [IMAGE_PART, {"type": "text", "text": "like this"}]
    documents: list[tuple[Any, list[dict[str, str]], list[Any]]] = [
        ("a cat", [{"type": "text", "text": "a cat"}], []),
        ({"image": two}, [IMAGE_PART], [two]),
        ({"image": two, "text": "dog"}, [IMAGE_PART, {"type": "text", "text": "dog"}], [two]),
    ]
    listed = [document for document, _, _ in documents]
    scores = model.rerank(query, listed, instruction=instruction)
    assert scores.shape == (3,) and ((scores > 0) & (scores < 1)).all()
    difference = peer.lm_head.weight[YES] - peer.lm_head.weight[NO]
    for score, (document, content, images) in zip(scores, documents, strict=True):
        messages = judged(instruction or DEFAULT, asked, content)
        state = last_state(peer, model, messages, [one, *images])
        assert abs(float((difference @ state).sigmoid()) - score) < 1e-5
        alone = model.rerank(query, [document], instruction=instruction)
        assert abs(float(alone[0]) - score) < 1e-6
    assert len({round(float(score), 4) for score in scores}) == 3


def test_what_a_model_is_not_is_said(
    embedder: visavis.Model, reranker: visavis.Model, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="scores a document for a query and gives no vectors"):
        reranker.embed(["a cat"])
    with pytest.raises(InputError, match="not known to be a reranker: name its profile"):
        embedder.rerank("a", ["b"])
    save_qwen3_vl(tmp_path)
    with pytest.raises(InputError, match="has no tokens 'yes' and 'no'"):
        load(tmp_path, "qwen3-vl-reranker").rerank("a", ["b"])


def test_the_command_orders_documents(
    folder: tuple[Any, Path], reranker: visavis.Model, tmp_path: Path
) -> None:
    for number in (1, 2):
        noise((64, 64), number).save(tmp_path / f"{number}.png")
    (tmp_path / "more.jsonl").write_text('{"image": "2.png", "text": "dog"}\n')
    settings = ["--profile", "qwen3-vl-reranker", "--precision", "f32", "--device", "cpu"]
    words = ["rerank", str(folder[1]), "a cat", "-t", "a cat", "-i", str(tmp_path / "1.png")]
    words += ["--items", str(tmp_path / "more.jsonl"), "--query-image", str(tmp_path / "2.png")]
    found = CliRunner().invoke(app, [*words, *settings, "--json"])
    assert found.exit_code == 0, found.output
    rows = json.loads(found.stdout)["results"]
    query = {"image": tmp_path / "2.png", "text": "a cat"}
    documents = ["a cat", tmp_path / "1.png", {"image": tmp_path / "2.png", "text": "dog"}]
    scores = reranker.rerank(query, documents)
    assert [row["index"] for row in rows] == (-scores).argsort().tolist()
    assert np.allclose([row["score"] for row in rows], np.sort(scores)[::-1], atol=1e-6)
    shown = CliRunner().invoke(app, [*words, *settings, "--top-k", "1"]).stdout
    assert shown.split()[0] == f"{rows[0]['score']:.4f}" and len(shown.splitlines()) == 1
    for wrong, message in (
        (["rerank", str(folder[1]), "-t", "a"], "nothing to look for"),
        (["rerank", str(folder[1]), "a"], "nothing to score"),
        ([*words, "--top-k", "0"], "--top-k is 0, expected 1 or more"),
    ):
        refused = CliRunner().invoke(app, wrong)
        assert refused.exit_code == 2 and message in refused.stderr


def test_the_server_reranks_by_its_scores(reranker: visavis.Model) -> None:
    image = noise((64, 64), 2)
    documents: list[Any] = ["a cat", {"image": data_uri(image)}, {"text": "dog"}]
    expected = reranker.rerank("a cat", ["a cat", image, "dog"], instruction="Find cats")
    with serving(models={"judge": reranker}) as (address, _), client_of(address) as client:
        body = {"model": "judge", "query": "a cat", "documents": documents, "top_n": 2}
        for path in ("/v1/rerank", "/v2/rerank"):
            response = client.post(path, json=body | {"instruction": "Find cats"})
            assert response.status_code == 200, response.text
            found = response.json()["results"]
            order = (-expected).argsort()[:2].tolist()
            assert [one["index"] for one in found] == order
            scores = [one["relevance_score"] for one in found]
            assert np.allclose(scores, expected[order], atol=1e-6)
        refused = client.post("/v1/embeddings", json={"model": "judge", "input": "a cat"})
        assert refused.status_code == 400 and "use rerank" in refused.text
        wrong = client.post("/v1/rerank", json=body | {"documents": ["a", {"image": "x.png"}]})
        assert wrong.status_code in (400, 422)
        shown = client.post("/api/show", json={"model": "judge"})
        assert "embedding" not in shown.json()["capabilities"]
