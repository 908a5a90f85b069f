"""Batches, turns, full queues, cancellation and errors in the model's thread, with a real model."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import visavis
from tests.fakes import picture, tiny_model, write_tiny_checkpoint
from tests.serve.serving import png
from visavis.errors import ImageError, InputError
from visavis.inputs import Image, Prompt
from visavis.serve.config import make_config
from visavis.serve.errors import ApiError
from visavis.serve.metrics import Metrics
from visavis.serve.models import ServedModel
from visavis.serve.scheduler import EmbedJob


def served(**limits: int) -> ServedModel:
    config = make_config({"models": {"tiny": "tiny"}, "limits": limits})
    return ServedModel("tiny", tiny_model(), config, Metrics())


@pytest.fixture
def model() -> Iterator[ServedModel]:
    opened = served()
    yield opened
    opened.close()


def prepared(model: ServedModel, *texts: str) -> list[Any]:
    return [model.model.prepare(Prompt.of(text)) for text in texts]


def answers(model: ServedModel, *texts: str, **settings: Any) -> list[Any]:
    settings = {"max_new_tokens": 24, **settings}
    return [model.prepare_answer(Prompt.of(text), settings, None)[0] for text in texts]


def paused(model: ServedModel) -> threading.Event:
    """Keep the model's thread busy until the returned event is set."""
    begun, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        go_on.wait(30)

    model.scheduler.work(wait)
    assert begun.wait(30)
    return go_on


def test_a_flood_of_single_texts_becomes_few_batches(model: ServedModel) -> None:
    texts = [f"text {number}" for number in range(100)]
    batches: list[int] = []
    embed = model.scheduler.embed

    def counted(inputs: Sequence[Any]) -> np.ndarray:
        batches.append(len(inputs))
        return embed(inputs)

    model.scheduler.embed = counted
    go_on = paused(model)
    futures = [model.submit_inputs(prepared(model, text)) for text in texts]
    go_on.set()
    vectors = np.concatenate([future.result(30) for future in futures])
    np.testing.assert_allclose(vectors, tiny_model().embed(texts), atol=1e-6)
    assert sum(batches) == 100
    assert len(batches) <= 2  # 700 to 800 tokens, 2,048 a batch


def test_a_request_of_one_text_is_not_behind_one_of_two_thousand(model: ServedModel) -> None:
    go_on = paused(model)
    large = model.submit_inputs(prepared(model, *(f"a longer text {n}" for n in range(2000))))
    small = model.submit_inputs(prepared(model, "small"))
    order: list[str] = []
    large.add_done_callback(lambda future: order.append("large"))
    small.add_done_callback(lambda future: order.append("small"))
    go_on.set()
    assert large.result(60).shape == (2000, 16)
    assert order == ["small", "large"]


def test_answers_grow_between_batches_and_get_half_of_the_time(model: ServedModel) -> None:
    def ask() -> str:
        (answer,) = answers(model, "Go", max_new_tokens=16)
        (future,) = model.submit_answers([answer], [lambda piece: at_work.append("chat")])
        return future.result(60).text

    at_work: list[str] = []
    model.submit_inputs(prepared(model, "warm")).result(60)  # first calls take longer
    ask()
    at_work.clear()
    flood = [
        model.submit_inputs(prepared(model, *(f"some text {n}" for n in range(200))))
        for _ in range(40)
    ]
    for one in flood:
        one.add_done_callback(lambda _: at_work.append("embed"))
    assert ask() == tiny_model().chat("Go", max_new_tokens=16).text
    # The answer ends while a part of the flood is still to come.
    assert at_work.index("chat") < len(flood)
    assert sum(not one.done() for one in flood) > 0
    for one in flood:
        one.result(60)


def test_full_queues_refuse_with_a_time_to_come_back() -> None:
    model = served(waiting_chats=2, waiting_items=10)
    go_on = paused(model)
    try:
        model.submit_inputs(prepared(model, *map(str, range(8))))
        with pytest.raises(ApiError) as caught:
            model.submit_inputs(prepared(model, "a", "b", "c"))
        assert caught.value.status == 429
        assert 1 <= (caught.value.retry_after or 0) <= 60
        model.submit_inputs(prepared(model, "a", "b"))
        model.submit_answers(answers(model, "a", "b"), [print, print])
        with pytest.raises(ApiError, match="waiting"):
            model.submit_answers(answers(model, "c"), [print])
    finally:
        go_on.set()
        model.close()


def test_one_large_request_is_taken_by_an_empty_queue() -> None:
    model = served(waiting_items=10)
    assert model.submit_inputs(prepared(model, *map(str, range(50)))).result(30).shape[0] == 50
    model.close()


@pytest.mark.parametrize("moment", ["waiting", "growing"])
def test_a_cancelled_answer_frees_its_memory(model: ServedModel, moment: str) -> None:
    go_on = paused(model) if moment == "waiting" else None
    begun = threading.Event()
    (answer,) = answers(model, "Go", max_new_tokens=400)
    (future,) = model.submit_answers([answer], [lambda piece: begun.set()])
    if go_on is None:
        assert begun.wait(30)
    assert future.cancel()
    model.scheduler.wake()
    if go_on is not None:
        go_on.set()
    deadline = time.monotonic() + 30
    while not model.scheduler.idle and time.monotonic() < deadline:
        time.sleep(0.005)
    assert model.scheduler.idle
    engine: Any = model.scheduler.engine
    assert not model.scheduler.growing and not engine.active
    assert answer.sequence.cache is None
    assert len(answer.sequence.tokens) < 400
    assert model.submit_inputs(prepared(model, "still there")).result(30).shape == (1, 16)


def test_settling_what_was_cancelled_harms_nobody(model: ServedModel) -> None:
    """A future may be cancelled between any two lines of the model's thread."""

    class Failing(EmbedJob):
        pass

    embed = model.scheduler.embed

    def cancels_then_fails(inputs: Sequence[Any]) -> np.ndarray:
        for job in jobs:
            job.future.cancel()
        raise InputError("refused")

    jobs: list[Any] = []
    model.scheduler.embed = cancels_then_fails
    go_on = paused(model)
    for text in ("a", "b"):
        inputs = prepared(model, text)
        jobs.append(Failing(inputs, [len(one.token_ids) for one in inputs]))
        model.scheduler.embeddings(jobs[-1])
    cancelled = model.scheduler.work(lambda: cancelled.cancel() and 1 / 0)
    go_on.set()
    while not model.scheduler.idle:
        time.sleep(0.005)
    model.scheduler.embed = embed
    assert model.scheduler.thread.is_alive()
    assert model.submit_inputs(prepared(model, "still there")).result(30).shape == (1, 16)


def test_a_vector_that_is_not_finite_is_an_error(model: ServedModel) -> None:
    """The weights are those of a model of its own, with one infinite number."""
    with tempfile.TemporaryDirectory() as folder:
        broken = visavis.load(write_tiny_checkpoint(Path(folder)), precision="f32", device="cpu")
    token = broken.tokenizer.token_to_id("b")
    with torch.no_grad():
        broken.vlm.decoder.embed.weight[token] = torch.inf
    config = make_config({"models": {"tiny": "tiny"}})
    opened = ServedModel("tiny", broken, config, Metrics())
    go_on = paused(opened)
    futures = [opened.submit_inputs(prepared(opened, text)) for text in ("aaa", "abc")]
    go_on.set()
    assert futures[0].result(30).shape == (1, 16)
    with pytest.raises(visavis.VisavisError, match="not finite"):
        futures[1].result(30)
    opened.close()


class Panic(BaseException):
    """What a library written in Rust raises when it gives up."""


@pytest.mark.parametrize("error", [InputError("bad"), MemoryError(), Panic(), SystemExit(3)])
def test_an_error_of_one_input_fails_its_request_only(
    model: ServedModel, error: BaseException
) -> None:
    embed, bad = model.scheduler.embed, prepared(model, "bad")[0].token_ids

    def failing(inputs: Sequence[Any]) -> np.ndarray:
        if any(one.token_ids == bad for one in inputs):
            raise error
        return embed(inputs)

    model.scheduler.embed = failing
    go_on = paused(model)
    futures = [model.submit_inputs(prepared(model, text)) for text in ("good", "bad", "fine")]
    go_on.set()
    assert futures[0].result(30).shape == futures[2].result(30).shape == (1, 16)
    assert futures[1].exception(30) is error


def test_an_error_of_a_step_fails_the_answers_and_not_the_thread(model: ServedModel) -> None:
    engine: Any = model.scheduler.engine
    step = engine.step

    def failing() -> Any:
        engine.step = step
        raise Panic

    engine.step = failing
    first = model.submit_answers(answers(model, "Go"), [lambda piece: None])[0]
    assert isinstance(first.exception(30), Panic)
    second = model.submit_answers(answers(model, "Go"), [lambda piece: None])[0]
    assert second.result(30).text == tiny_model().chat("Go", max_new_tokens=24).text


def test_a_listener_that_fails_ends_its_own_answer(model: ServedModel) -> None:
    def broken(piece: str) -> None:
        raise OSError("nobody listens")

    first, second = model.submit_answers(answers(model, "Go", "Come"), [broken, lambda piece: None])
    assert isinstance(first.exception(30), OSError)
    assert second.result(30).text == tiny_model().chat("Come", max_new_tokens=24).text


def test_each_answer_has_its_own_error(model: ServedModel) -> None:
    expected = tiny_model().chat("Go", max_new_tokens=24).text
    damaged = png(picture(3))[:-40]
    good = answers(model, "Go", "Go")
    bad = model.prepare_answer(Prompt.chat("see", [Image(damaged)]), {}, None)[0]
    biased = answers(model, "hi", logit_bias={10**6: 1.0})[0]
    every = [*good, bad, biased]
    go_on = paused(model)
    futures = model.submit_answers(every, [lambda piece: None] * 4)
    go_on.set()
    assert [one.result(60).text for one in futures[:2]] == [expected] * 2
    assert isinstance(futures[2].exception(60), ImageError)
    assert isinstance(futures[3].exception(60), InputError)


def test_closing_fails_what_is_unfinished() -> None:
    model = served()
    go_on = paused(model)
    (answer,) = model.submit_answers(answers(model, "Go", max_new_tokens=400), [print])
    closing = threading.Thread(target=model.close)
    closing.start()
    time.sleep(0.05)
    go_on.set()
    closing.join(30)
    assert isinstance(answer.exception(1), ApiError)
    with pytest.raises(ApiError, match="unloaded"):
        model.submit_inputs(prepared(model, "a"))
