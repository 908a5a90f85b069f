"""One thread in which a model works for many: answers grow together, other work goes in between.

    answer(prompt, tell)     tell(piece) as text becomes certain; the future ends with the reply
    work(function)           runs between two steps of the answers; the future ends with its result

Callers wait on futures or are told from this thread. Knows a model; nothing of networks.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from visavis.generate.engine import Engine, GeneratedSequence
from visavis.generate.streaming import Answer, Reply

if TYPE_CHECKING:
    from visavis.inputs import Prompt

Result = TypeVar("Result")
OnText = Callable[[str], None]


class BatchScheduler:
    """Takes requests from any thread.

    Args:
        ask: turns a prompt and settings into an answer that has not begun (`Model.ask`).
        engine: grows the answers.
    """

    def __init__(self, ask: Callable[..., Answer], engine: Engine) -> None:
        self.ask, self.engine = ask, engine
        self.requests: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.growing: dict[GeneratedSequence, tuple[Answer, OnText, Future[Reply]]] = {}
        self.thread = threading.Thread(target=self._run, name="model", daemon=True)
        self.thread.start()

    def work(self, function: Callable[[], Result]) -> Future[Result]:
        """Run a function in the model's thread."""
        future: Future[Result] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)

        self.requests.put(run)
        return future

    def answer(self, prompt: Prompt, tell: OnText, **settings: Any) -> Future[Reply]:
        """Answer a prompt beside the others; `cancel()` of the future ends it."""
        future: Future[Reply] = Future()

        def begin() -> None:
            if future.cancelled():
                return
            try:
                answer = self.ask(prompt, **settings)
            except BaseException as error:
                future.set_exception(error)
                return
            self.growing[answer.sequence] = (answer, tell, future)
            self.engine.add(answer.sequence)

        self.requests.put(begin)
        return future

    def close(self) -> None:
        """End every answer and the thread."""
        self.requests.put(None)
        self.thread.join()

    def _run(self) -> None:
        while True:
            with suppress(queue.Empty):
                while (request := self.requests.get(block=not self.engine.busy)) is not None:
                    request()
                self._drop_all()
                return
            self._step()

    def _step(self) -> None:
        """Let all answers grow by a token and tell what became certain."""
        for sequence, (_, _, future) in self.growing.items():
            if future.cancelled():
                sequence.stop()
        try:
            grown = self.engine.step()
        except BaseException as error:  # of no answer in particular
            for _, _, future in self.growing.values():
                if not future.cancelled():
                    future.set_exception(error)
            self._drop_all()
            return
        for sequence in grown:
            answer, tell, future = self.growing[sequence]
            try:
                if sequence.error is not None:
                    raise sequence.error
                if piece := answer.update():
                    tell(piece)
                if sequence.done and not future.cancelled():
                    future.set_result(answer.reply)
            except BaseException as error:
                sequence.stop()
                if not future.cancelled():
                    future.set_exception(error)
        for sequence in [one for one in self.growing if one.done]:
            del self.growing[sequence]

    def _drop_all(self) -> None:
        for sequence in self.growing:
            sequence.stop()
        self.growing.clear()
        self.engine.drop()
