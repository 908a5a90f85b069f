"""One thread in which a model works for many requests: answers and embeddings.

    chat requests ──► engine: all answers grow by a token a step ─┐
                                                                  ├─► one unit of work at a time
    embeddings    ──► waiting inputs become one batch ────────────┘

Continuous batching: an answer enters and leaves between two steps. Dynamic batching: a batch takes
what waits at that moment, from the requests in turn, so that a request of one input is not behind
one of two thousand. Nothing waits for a batch to fill.

Fairness: while both kinds have work, the next unit goes to the kind that has had less of the
model's time since both had work, so each gets half of it; a batch then has at most
SHARED_BATCH_TOKENS tokens, so that an answer's next token waits for one small batch at most.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from visavis.serve.errors import ApiError
from visavis.serve.metrics import Metrics

BATCH_TOKENS = 2048  # of a batch of inputs while no answer is being generated
SHARED_BATCH_TOKENS = 512  # and while one is
SETTLED = 0.9  # weight of the past in the moving averages that Retry-After is computed from
log = logging.getLogger(__name__)


class GrowingAnswer(Protocol):
    """An answer that an engine can grow (`visavis.generate.streaming.Answer`)."""

    sequence: Any
    reply: Any

    def update(self) -> str: ...


class GrowingEngine(Protocol):
    """The interface of a generation engine (`visavis.generate.engine.Engine`)."""

    @property
    def busy(self) -> bool: ...
    def add(self, sequence: Any) -> None: ...
    def step(self) -> list[Any]: ...
    def drop(self) -> None: ...


@dataclass(eq=False)
class ChatJob:
    """An answer in the making; `tell` gets each piece of text, in the model's thread."""

    answer: GrowingAnswer
    tell: Callable[[str], None]
    future: Future[Any] = field(default_factory=Future)


@dataclass(eq=False)
class EmbedJob:
    """The inputs of one request. `future` ends with their vectors, float32 [N, D], or a list of
    [tokens, D] of a multi-vector model."""

    inputs: Sequence[Any]
    lengths: Sequence[int]  # tokens of each input
    future: Future[Any] = field(default_factory=Future)
    begun: int = 0  # inputs that have been put into batches
    vectors: list[np.ndarray] = field(default_factory=list)

    @property
    def left(self) -> int:
        return len(self.inputs) - self.begun


class Scheduler:
    """Takes requests for one model from any thread.

    Args:
        name: of the model, for the metrics.
        engine: grows its answers.
        embed: returns the vector [D] of each input of a batch, or its vectors [tokens, D].
        waiting_chats, waiting_items: how many may wait; more are refused with status 429.
    """

    def __init__(
        self,
        name: str,
        engine: GrowingEngine,
        embed: Callable[[Sequence[Any]], Sequence[np.ndarray]],
        metrics: Metrics,
        *,
        waiting_chats: int,
        waiting_items: int,
    ) -> None:
        self.name, self.engine, self.embed, self.metrics = name, engine, embed, metrics
        self.waiting_chats, self.waiting_items = waiting_chats, waiting_items
        self.condition = threading.Condition()
        self.arrived: deque[ChatJob] = deque()
        self.tasks: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self.growing: dict[Any, ChatJob] = {}
        self.embedding: deque[EmbedJob] = deque()
        self.used = {"chat": 0.0, "embed": 0.0}
        self.closing = False
        self.seconds_per_answer, self.seconds_per_input = 1.0, 0.01
        self.thread = threading.Thread(target=self._run, name=f"model {name}", daemon=True)
        self.thread.start()

    @property
    def idle(self) -> bool:
        with self.condition:
            return not (self.arrived or self.growing or self.embedding or self.tasks)

    def chat(self, jobs: Sequence[ChatJob]) -> None:
        """Let answers wait for their turn.

        Raises:
            ApiError: too many wait already (429), or the model is being unloaded (503).
        """
        with self.condition:
            self._check_open()
            waiting = len(self.arrived) + len(self.growing)
            if waiting and waiting + len(jobs) > self.waiting_chats:
                self._refuse(f"{waiting} answers are", self.seconds_per_answer * waiting)
            self.arrived.extend(jobs)
            self.condition.notify()

    def embeddings(self, job: EmbedJob) -> None:
        """Let the inputs of a request wait for their batches.

        Raises:
            ApiError: too many wait already (429), or the model is being unloaded (503).
        """
        with self.condition:
            self._check_open()
            waiting = sum(each.left for each in self.embedding)
            if waiting and waiting + job.left > self.waiting_items:
                self._refuse(f"{waiting} inputs are", self.seconds_per_input * waiting)
            self.embedding.append(job)
            self.condition.notify()

    def work(self, function: Callable[[], Any]) -> Future[Any]:
        """Run a function in the model's thread, between two units of work."""
        future: Future[Any] = Future()
        with self.condition:
            self._check_open()
            self.tasks.append((function, future))
            self.condition.notify()
        return future

    def wake(self) -> None:
        """Let the thread look at futures that have been cancelled."""
        with self.condition:
            self.condition.notify()

    def close(self) -> None:
        """End everything that is unfinished, and the thread; returns once it has ended."""
        with self.condition:
            self.closing = True
            self.condition.notify()
        self.thread.join()

    def _check_open(self) -> None:
        if self.closing:
            message = "the model is being unloaded; send the request again"
            raise ApiError(503, message, code="unloading", retry_after=1)

    def _refuse(self, what: str, seconds: float) -> None:
        self.metrics.refused.labels(self.name).inc()
        raise ApiError(
            429,
            f"{what} waiting for the model already; try again later",
            code="queue_full",
            retry_after=max(1, min(60, round(seconds))),
        )

    # --- in the model's thread ------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            try:
                if not self._turn():
                    break
            except BaseException as error:  # of no request in particular: the thread lives on
                log.exception("the model's thread met an error")
                self._fail_all(error)
        self._fail_all(ApiError(503, "the server is stopping", code="stopping", retry_after=5))

    def _turn(self) -> bool:
        """Do one unit of work, or wait for some; return whether to continue."""
        with self.condition:
            while not (self.closing or self.arrived or self.tasks or self._busy()):
                self.condition.wait()
            if self.closing:
                return False
            arrived = list(self.arrived)
            self.arrived.clear()
            tasks = list(self.tasks)
            self.tasks.clear()
            self._gauge()
        for job in arrived:
            if not job.future.cancelled():
                self.growing[job.answer.sequence] = job
                self.engine.add(job.answer.sequence)
        for function, future in tasks:
            _run_task(function, future)
        chats, inputs = bool(self.growing) or self.engine.busy, bool(self.embedding)
        if not (chats and inputs):
            self.used = {"chat": 0.0, "embed": 0.0}
        if not (chats or inputs):
            return True
        turn = "chat" if chats and (not inputs or self._behind("chat")) else "embed"
        started = time.perf_counter()
        try:
            if turn == "chat":
                self._grow()
            else:
                self._embed(SHARED_BATCH_TOKENS if chats else BATCH_TOKENS)
        finally:
            seconds = time.perf_counter() - started
            self.used[turn] += seconds
            self.metrics.model_seconds.labels(self.name, turn).inc(seconds)
        return True

    def _busy(self) -> bool:
        return bool(self.growing or self.embedding or self.engine.busy)

    def _behind(self, kind: str) -> bool:
        return self.used[kind] <= self.used["embed" if kind == "chat" else "chat"]

    def _gauge(self) -> None:
        self.metrics.growing.labels(self.name).set(len(self.growing))
        left = sum(each.left for each in self.embedding)
        self.metrics.waiting.labels(self.name, "inputs").set(left)

    def _grow(self) -> None:
        """Let all answers grow by a token and tell what became certain."""
        for sequence, job in self.growing.items():
            if job.future.cancelled():
                sequence.stop()
        try:
            grown = self.engine.step()
        except BaseException as error:  # of no answer in particular
            self._fail_chats(error)
            return
        for sequence in grown:
            if sequence in self.growing:
                self._tell(sequence, self.growing[sequence])
        for sequence in [one for one in self.growing if one.done]:
            job = self.growing.pop(sequence)
            settle(job.future, job.answer.reply)
        if not self.growing:
            self.engine.drop()  # memory of those that ended is returned now, not at the next step

    def _tell(self, sequence: Any, job: ChatJob) -> None:
        try:
            if sequence.error is not None:
                raise sequence.error
            if piece := job.answer.update():
                job.tell(piece)
            if sequence.done:
                timings = job.answer.reply.timings
                self.seconds_per_answer = _moved(
                    self.seconds_per_answer,
                    (timings.prefill_s + timings.decode_s) / max(1, len(self.growing)),
                )
        except BaseException as error:
            sequence.stop()
            fail(job.future, error)

    def _embed(self, budget: int) -> None:
        """Embed a batch of what waits, from the requests in turn."""
        with self.condition:
            picked = self._pick(budget)
        if not picked:
            return
        started = time.perf_counter()
        batch = [job.inputs[number] for job, number in picked]
        try:
            vectors: list[np.ndarray] | None = list(self.embed(batch))
        except BaseException as error:
            vectors = None
            if len({id(job) for job, _ in picked}) == 1:
                fail(picked[0][0].future, error)
                return
        for place, (job, number) in enumerate(picked):
            if vectors is not None:
                job.vectors.append(vectors[place])
            elif not job.future.done():  # find out whose input it was
                try:
                    job.vectors.append(self.embed([job.inputs[number]])[0])
                except BaseException as error:
                    fail(job.future, error)
            if len(job.vectors) == len(job.inputs):
                single = job.vectors[0].ndim == 1
                settle(job.future, np.stack(job.vectors) if single else job.vectors)
        seconds = (time.perf_counter() - started) / len(picked)
        self.seconds_per_input = _moved(self.seconds_per_input, seconds)
        self.metrics.batches.labels(self.name).inc()
        self.metrics.batch_items.labels(self.name).inc(len(picked))

    def _pick(self, budget: int) -> list[tuple[EmbedJob, int]]:
        """Return (request, number of the input) of a batch within a budget of tokens."""
        picked: list[tuple[EmbedJob, int]] = []
        used = 0
        full = False
        while self.embedding and not full:
            job = self.embedding.popleft()
            if job.future.done():  # cancelled, or one of its inputs failed
                continue
            while job.left:
                length = job.lengths[job.begun]
                if picked and used + length > budget:
                    full = True
                    break
                picked.append((job, job.begun))
                used += length
                job.begun += 1
            if job.left:
                self.embedding.append(job)  # behind the others
        return picked

    def _fail_chats(self, error: BaseException) -> None:
        for sequence, job in self.growing.items():
            sequence.stop()
            fail(job.future, error)
        self.growing.clear()
        self.engine.drop()

    def _fail_all(self, error: BaseException) -> None:
        with self.condition:
            futures: list[Future[Any]] = [job.future for job in self.arrived]
            futures += [job.future for job in self.embedding]
            futures += [future for _, future in self.tasks]
            self.arrived.clear()
            self.embedding.clear()
            self.tasks.clear()
        for future in futures:
            fail(future, error)
        with suppress(Exception):
            self._fail_chats(error)


def settle(future: Future[Any], result: Any) -> None:
    """Give a future its result, unless whoever waited for it has left."""
    with suppress(InvalidStateError):
        future.set_result(result)


def fail(future: Future[Any], error: BaseException) -> None:
    """Give a future its error, unless whoever waited for it has left."""
    with suppress(InvalidStateError):
        future.set_exception(error)


def _run_task(function: Callable[[], Any], future: Future[Any]) -> None:
    if future.cancelled():
        return
    try:
        settle(future, function())
    except BaseException as error:
        fail(future, error)


def _moved(average: float, value: float) -> float:
    return SETTLED * average + (1 - SETTLED) * value
