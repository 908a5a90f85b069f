"""Requests that cannot be answered are refused before any work; what goes wrong later harms nobody
else and leaves no memory behind."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import visavis
from tests.fakes import picture, tiny_model, write_pictures, write_tiny_checkpoint
from visavis.api import Model
from visavis.errors import ContextLengthError, ImageError, InputError, OutOfMemoryError
from visavis.generate.engine import Engine, GeneratedSequence
from visavis.generate.prefix_cache import PrefixCache
from visavis.inputs import Prompt
from visavis.memory import enough_memory
from visavis.processing.chat_template import Encoded

PICTURES = [picture(seed) for seed in range(130)]  # 4 tokens each, and a context of 512


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> Model:
    """A model that fails as soon as it works."""
    model = tiny_model()

    def work(*given: Any, **settings: Any) -> None:
        raise AssertionError("it worked")

    monkeypatch.setattr(model.vlm, "see", work)
    monkeypatch.setattr(model.vlm.decoder, "forward", work)
    return model


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda m: m.chat("word " * 200), ContextLengthError, "reads at most 511"),
        (lambda m: m.chat_many(["hi", "word " * 200]), ContextLengthError, "at most 511"),
        (lambda m: m.chat("x", PICTURES), ContextLengthError, "520 of them from images"),
        (lambda m: m.embed([{"image": PICTURES}]), ContextLengthError, "use fewer images"),
        (lambda m: m.chat(""), InputError, "empty text and no image"),
        (lambda m: m.chat(" \n"), InputError, "empty text and no image"),
        (lambda m: m.chat_many(["hi", ""]), InputError, "empty text and no image"),
        (lambda m: m.chat_many([[]]), InputError, "empty list"),
        (lambda m: m.chat_many("hi"), InputError, "prompts are one str"),
        (lambda m: m.chat_many(["hi"], max_sequences=0), InputError, "max_sequences is 0"),
        (lambda m: m.embed(["hi"], batch_tokens=0), InputError, "batch_tokens is 0"),
        (lambda m: m.trace([]), InputError, "empty list"),
        (lambda m: m.encoder.checked(Encoded([], [], [])), InputError, "has no tokens"),
    ],
)
def test_bad_requests_cost_nothing(
    idle: Model, call: Callable[[Model], Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        call(idle)


def test_pictures_without_text_and_text_without_pictures() -> None:
    model = tiny_model()
    for text, images in (("", PICTURES[:2]), ("what?", [])):
        assert model.chat(text, images, max_new_tokens=3).usage.completion_tokens <= 3
    assert model.chat_many([PICTURES[0]], max_new_tokens=3)[0].finish_reason
    assert model.embed([PICTURES[0], "what?"]).shape[0] == 2


def huge(*given: Any, **settings: Any) -> torch.Tensor:
    return torch.empty(2**50, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("part", "call", "says"),
    [
        ("see", lambda m: m.chat("hi", [picture(60)]), "looking at 1 pictures.*Use fewer"),
        (
            "forward",
            lambda m: m.chat("hi", [picture(1)]),
            "prompt of [0-9]+ tokens .4 of them of 1",
        ),
        ("embed", lambda m: m.embed(["a", "b"]), "embedding 2 items.*batch_tokens"),
    ],
)
def test_out_of_memory_says_what_for_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, part: str, call: Callable[[Model], Any], says: str
) -> None:
    model = tiny_model()
    with monkeypatch.context() as patch:
        patch.setattr(model.vlm, part, huge)
        with pytest.raises(OutOfMemoryError, match=f"memory ran out while .*{says}"):
            call(model)
    assert call(model) is not None


def test_out_of_memory_while_growing_and_loading(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    model = tiny_model()
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_several", huge)
        with pytest.raises(OutOfMemoryError, match="growing 2 answers, [0-9]+ tokens.*max_sequ"):
            model.chat_many(["one", "two"], max_new_tokens=4)
        with pytest.raises(OutOfMemoryError, match="searching with 3 beams"):
            model.chat("one", max_new_tokens=4, beams=3)
    folder = write_tiny_checkpoint(tmp_path / "tiny")
    monkeypatch.setattr("visavis.api.load_checkpoint", huge)
    with pytest.raises(OutOfMemoryError, match="loading .*tiny.*smaller precision"):
        visavis.load(folder)


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")]
)
def test_memory_errors_are_known_and_others_pass(error: Exception) -> None:
    with pytest.raises(OutOfMemoryError, match="while trying"), enough_memory("trying", "Stop."):
        raise error
    with pytest.raises(RuntimeError, match="shape"), enough_memory("trying", "Stop."):
        raise RuntimeError("shape")


def test_what_ran_out_holds_no_memory() -> None:
    class Big:
        pass

    kept: list[weakref.ref[Big]] = []

    def work() -> None:
        big = Big()
        kept.append(weakref.ref(big))
        raise MemoryError

    with pytest.raises(OutOfMemoryError) as caught, enough_memory("trying", "Stop."):
        work()
    gc.collect()
    assert kept[0]() is None and isinstance(caught.value.__cause__, MemoryError)


@pytest.fixture
def sequences() -> list[GeneratedSequence]:
    model = tiny_model()
    prompts = [Prompt.of(f"question number {number}") for number in range(3)]
    return [model.ask(prompt, max_new_tokens=12).sequence for prompt in prompts]


def test_cancelling_returns_the_memory(sequences: list[GeneratedSequence]) -> None:
    engine = Engine(tiny_model().vlm, prefixes=PrefixCache(max_bytes=0))
    for one in sequences:
        engine.add(one)
    for _ in range(5):
        engine.step()
    caches = [weakref.ref(one.cache) for one in sequences if one.cache is not None]
    assert len(caches) == 3 and all(cache().num_bytes > 0 for cache in caches)  # type: ignore[union-attr]
    sequences[1].stop()
    engine.step()
    assert engine.active == [sequences[0], sequences[2]] and caches[1]() is None
    for one in sequences:
        one.stop()
    engine.drop()
    gc.collect()
    assert engine.active == [] and engine.flat is None and not engine.busy
    assert all(cache() is None for cache in caches)


@pytest.mark.parametrize("where", ["prompt", "first token", "third token"])
@pytest.mark.parametrize("number", [1, 3])
def test_what_goes_wrong_in_one_ends_only_that_one(
    sequences: list[GeneratedSequence], where: str, number: int, tmp_path: Path
) -> None:
    model, chosen = tiny_model(), sequences[:number]
    asked = [Prompt.of(f"question number {place}") for place in range(number)]
    others = [model.ask(prompt, max_new_tokens=12).sequence for prompt in asked]
    list(Engine(model.vlm, model.image_encoder).run(others))
    expected = [other.tokens for other in others]
    bad, sample, said = chosen[-1], chosen[-1].sample, []

    def fail(scores: torch.Tensor) -> int:
        said.append(1)
        if len(said) == {"first token": 1, "third token": 3}[where]:
            raise RuntimeError("the sampler failed")
        return sample(scores)

    if where == "prompt":
        (path,) = write_pictures(tmp_path, 1, first_seed=977)  # in no cache
        bad.prompt = model.ask(
            Prompt.chat("what is it?", [path]), max_new_tokens=12
        ).sequence.prompt
        path.unlink()
    else:
        bad.sample = fail
    engine = Engine(model.vlm, model.image_encoder, prefixes=PrefixCache())
    for one in chosen:
        engine.add(one)
    while engine.busy:
        engine.step()
    assert isinstance(bad.error, ImageError if where == "prompt" else RuntimeError)
    assert bad.done and bad.cache is None and engine.active == []
    for one, tokens in zip(chosen[:-1], expected, strict=False):
        assert one.tokens == tokens and one.error is None
    again = model.ask(asked[-1], max_new_tokens=12).sequence
    list(engine.run([again]))
    assert again.tokens == expected[-1]


def test_a_reader_that_fails_leaves_the_model_sound() -> None:
    model = tiny_model()
    whole = model.chat("go on", max_new_tokens=12).text

    def read() -> Iterator[str]:
        for piece in model.chat("go on", max_new_tokens=12, stream=True):
            yield piece
            raise OSError("the socket is closed")

    with pytest.raises(OSError, match="closed"):
        list(read())
    assert model.chat("go on", max_new_tokens=12).text == whole
