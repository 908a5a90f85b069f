"""The public face on a tiny random model: chat, embed, trace, and every way to misuse them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import visavis
from tests.fakes import picture, tiny_model, write_tiny_checkpoint
from visavis.errors import (
    CheckpointError,
    ContextLengthError,
    ImageError,
    InputError,
    UnknownNameError,
)
from visavis.model.image_tokens import tokens_per_view
from visavis.processing.feature_cache import FeatureCache

ITEMS = [
    {"text": "a cat"},
    {"image": picture(1)},
    {"text": "a much longer text about nothing in particular, " * 3},
    {"image": picture(2), "text": "what is this?"},
    {"image": [picture(1), picture(3)], "text": "two"},
    picture(3),
    "a cat",
    {"text": "before", "image": picture(2)},
]


@pytest.fixture(scope="module")
def model() -> visavis.Model:
    return tiny_model()


def test_vectors_are_unit_float32_rows_in_order(model: visavis.Model) -> None:
    vectors = model.embed(ITEMS)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(ITEMS), model.embedding_dim)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(vectors[0], vectors[6], atol=1e-6)
    assert np.abs(vectors[3] - vectors[7]).max() > 1e-4  # text and image the other way round


@settings(max_examples=15, deadline=None)
@given(
    chosen=st.lists(st.integers(0, len(ITEMS) - 1), min_size=1, max_size=10),
    batch_tokens=st.sampled_from([1, 60, 4096]),
    cached=st.booleans(),
)
def test_any_batch_gives_the_vectors_of_singles(
    chosen: list[int], batch_tokens: int, cached: bool
) -> None:
    model = tiny_model()
    singles = np.concatenate([model.embed([ITEMS[i]]) for i in chosen])
    if not cached:
        model.image_encoder.cache = FeatureCache()
    together = model.embed([ITEMS[i] for i in chosen], batch_tokens=batch_tokens)
    np.testing.assert_allclose(together, singles, atol=2e-6)


def test_equal_pictures_are_seen_once(
    model: visavis.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.image_encoder.cache = FeatureCache()
    seen = []
    see = model.vlm.see
    monkeypatch.setattr(model.vlm, "see", lambda pixels: seen.append(len(pixels)) or see(pixels))
    model.embed([{"image": picture(5)}, {"image": picture(5), "text": "again"}])
    model.embed([{"image": picture(5)}])
    assert seen == [1]


def test_the_cache_stays_within_its_bytes() -> None:
    cache = FeatureCache(max_bytes=1000)
    for key in "abc":
        cache.put(key, (torch.zeros(100), torch.zeros(10)))  # 440 bytes
    assert cache.get("a") is None
    assert cache.get("b") is not None and cache.get("c") is not None
    assert cache.num_bytes == 880


def test_one_item_needs_no_list(model: visavis.Model) -> None:
    np.testing.assert_array_equal(model.embed("a cat"), model.embed(["a cat"]))
    pixels = np.asarray(picture(1))
    assert model.embed(pixels).shape == (1, model.embedding_dim)
    np.testing.assert_allclose(model.embed(pixels), model.embed([picture(1)]), atol=1e-6)


def test_an_empty_list_gives_no_rows(model: visavis.Model) -> None:
    assert model.embed([]).shape == (0, model.embedding_dim)


def test_a_cut_vector_is_a_unit_vector(model: visavis.Model) -> None:
    whole, cut = model.embed(["a cat"])[0], model.embed(["a cat"], dim=4)[0]
    np.testing.assert_allclose(cut, whole[:4] / np.linalg.norm(whole[:4]), atol=1e-6)


def test_an_instruction_changes_text_and_pictures(model: visavis.Model) -> None:
    plain = model.embed(["a cat", picture(1)])
    asked = model.embed(["a cat", picture(1)], instruction="find the same breed")
    assert (np.abs(plain - asked).max(axis=1) > 1e-4).all()
    joined = model.profile.instruction_form.format(instruction="find the same breed", text="a cat")
    np.testing.assert_allclose(asked[0], model.embed([joined])[0], atol=1e-6)


def test_chat_streams_what_it_returns(model: visavis.Model) -> None:
    whole = model.chat("what is this?", [picture(1)], max_new_tokens=12)
    streamed = model.chat("what is this?", [picture(1)], max_new_tokens=12, stream=True)
    assert "".join(streamed) == streamed.text == whole.text
    assert whole.usage.prompt_tokens == streamed.usage.prompt_tokens
    assert whole.usage.completion_tokens == streamed.usage.completion_tokens
    assert 0 < whole.usage.completion_tokens <= 12
    assert whole.usage.prompt_tokens > tokens_per_view(model.vlm.config)
    assert whole.timings.prefill_s > 0
    assert whole.finish_reason == ("length" if whole.usage.completion_tokens == 12 else "stop")


def test_a_stream_can_be_left_early(model: visavis.Model) -> None:
    reply = model.chat("go on", max_new_tokens=50, stream=True)
    first = next(iter(reply))
    assert reply.text == first
    whole = model.chat("go on", max_new_tokens=50)
    assert first and first != whole.text and whole.text.startswith(first)
    again = model.chat("go on", max_new_tokens=50, stream=True)  # nothing of the first is left over
    assert "".join(again) == whole.text


def test_seeds_repeat_and_temperature_varies(model: visavis.Model) -> None:
    def ask(seed: int) -> str:
        return model.chat("hello", max_new_tokens=20, temperature=1.5, seed=seed).text

    assert ask(1) == ask(1)
    assert len({ask(seed) for seed in range(4)}) > 1


def test_history_comes_before_the_question(model: visavis.Model) -> None:
    history = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    question = {"role": "user", "content": "and now?"}
    asked = model.chat("and now?", history=history, max_new_tokens=8)
    encoded = model.encoder.chat(visavis.Prompt.of([*history, question]))
    assert asked.usage.prompt_tokens == len(encoded.token_ids)
    text = model.tokenizer.decode(encoded.token_ids, skip_special_tokens=True)
    assert text.index("hi") < text.index("hello") < text.index("and now?")
    other = [{"role": "user", "content": "no"}, history[1]]
    assert model.chat("and now?", history=other, max_new_tokens=8).text != asked.text


def test_decoding_with_the_cache_is_decoding_without(model: visavis.Model) -> None:
    reply = model.chat("count", max_new_tokens=8)
    ids = [int(token) for token in model.trace("count").token_ids]
    assert len(ids) == reply.usage.prompt_tokens
    answer: list[int] = []
    while len(answer) < 8:
        token = int(model.trace(ids + answer).logits[-1].argmax())
        if token in model.specials.eot_ids:
            break
        answer.append(token)
    assert model.tokenizer.decode(answer, skip_special_tokens=True) == reply.text
    assert len(answer) == reply.usage.completion_tokens


def test_trace_shows_where_images_stand(model: visavis.Model) -> None:
    trace = model.trace({"image": [picture(1), picture(2)], "text": "two"})
    length = tokens_per_view(model.vlm.config)
    assert [count for _, count in trace.image_slots] == [length, length]
    for start, count in trace.image_slots:
        assert (trace.token_ids[start : start + count] == model.vlm.config.image_token_id).all()
    config = model.vlm.config.decoder
    assert trace.hidden.shape == (len(trace.token_ids), config.width)
    assert trace.logits.shape == (len(trace.token_ids), config.vocab_size)
    assert trace.hidden.dtype == trace.logits.dtype == np.float32
    given = model.trace([5, 6, 7])
    np.testing.assert_array_equal(given.token_ids, [5, 6, 7])


def test_the_head_may_read_the_tower(tmp_path: Path) -> None:
    model = tiny_model()
    head, tower = model.vlm.config.head, model.vlm.config.tower
    assert head is not None and tower is not None
    config = replace(model.vlm.config, head=replace(head, tower_width=tower.width))
    torch.manual_seed(0)
    model.vlm.config, old = config, model.vlm.head
    try:
        from visavis.model.embedding_head import EmbeddingHead

        model.vlm.head = EmbeddingHead(config.head, config.decoder.width)  # type: ignore[arg-type]
        model.vlm.requires_grad_(False)
        together = model.embed(ITEMS)
        singles = np.concatenate([model.embed([item]) for item in ITEMS])
        np.testing.assert_allclose(together, singles, atol=2e-6)
        with torch.no_grad():
            model.vlm.head.image.weight[:, -tower.width :] = 0
        assert np.abs(model.embed([picture(1)]) - together[1]).max() > 1e-4
        np.testing.assert_allclose(model.embed(["a cat"])[0], together[0], atol=1e-6)
    finally:
        model.vlm.head, model.vlm.config = old, replace(config, head=head)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda m: m.chat(""), InputError, "empty"),
        (lambda m: m.chat("x", max_new_tokens=0), InputError, "at least 1"),
        (lambda m: m.chat("x", temperature=-1), InputError, "temperature"),
        (lambda m: m.chat("x", ["no-such-file.png"]), ImageError, "no-such-file.png"),
        (lambda m: m.chat("x", [b"no image"]), ImageError, "picture|image"),
        (lambda m: m.chat("word " * 4000), ContextLengthError, "at most"),
        (lambda m: m.embed(["x", "word " * 4000]), ContextLengthError, "at most"),
        (lambda m: m.embed([42]), InputError, "int"),
        (lambda m: m.embed([""]), InputError, "empty"),
        (lambda m: m.embed(["x"], dim=0), InputError, "dim"),
        (lambda m: m.embed(["x"], dim=10_000), InputError, "dim"),
        (lambda m: m.embed(["x"], dim=-1), InputError, "dim"),
        (lambda m: m.embed(["x"], dim=10**12), InputError, "dim"),
        (lambda m: m.embed([{"image": "https://a.example/x.png"}]), InputError, "download"),
    ],
)
def test_misuse_is_one_clear_error(model, call, error, says) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=says):
        call(model)


def test_unknown_models_are_named_with_their_neighbours(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="nano"):
        visavis.load("nanoo")
    (tmp_path / "readme.txt").write_text("nothing here")
    with pytest.raises(CheckpointError, match="readme.txt"):
        visavis.load(tmp_path)
    with pytest.raises(UnknownNameError, match="bf16"):
        visavis.load(write_tiny_checkpoint(tmp_path / "tiny"), precision="bf17")


@pytest.mark.parametrize("harm", ["truncate", "swap", "config", "remove"])
def test_damaged_folders_are_refused(tmp_path: Path, harm: str) -> None:
    folder = write_tiny_checkpoint(tmp_path / "tiny")
    weights = folder / "model.safetensors"
    if harm == "truncate":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif harm == "swap":
        weights.write_bytes(b"\xff" * 4096)
    elif harm == "config":
        (folder / "visavis.json").write_text('{"format": "visavis/9"}')
    else:
        weights.unlink()
    with pytest.raises(CheckpointError):
        visavis.load(folder)


def test_a_model_can_be_loaded_in_inference_mode(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path)
    with torch.inference_mode():
        model = visavis.load(tmp_path, precision="int4", device="cpu")
    assert not any(weight.is_inference() for weight in model.vlm.state_dict().values())


def test_fingerprints_tell_weights_apart(tmp_path: Path) -> None:
    one = visavis.load(write_tiny_checkpoint(tmp_path / "a", seed=0)).fingerprint
    same = visavis.load(write_tiny_checkpoint(tmp_path / "b", seed=0)).fingerprint
    other = visavis.load(write_tiny_checkpoint(tmp_path / "c", seed=1)).fingerprint
    assert one == same != other
