"""The operations of the server, apart from any API: answers, embeddings, similarities.

dialect ──► Service.chat / embed ──► Reader (limits) ──► ServedModel ──► Scheduler
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from visavis.errors import InputError
from visavis.serve.adding import FolderAdding
from visavis.serve.config import ServerConfig, Side
from visavis.serve.errors import ApiError
from visavis.serve.fetch import Fetcher
from visavis.serve.indexes import Indexes
from visavis.serve.media import Cost, Piece, Reader, Turn
from visavis.serve.metrics import Metrics
from visavis.serve.models import ModelPool, Recorder, ServedModel, TokenScore

if TYPE_CHECKING:
    from visavis.generate.streaming import Answer, Reply

Result = TypeVar("Result")
INDEX_THREADS = 4
PREPARING_THREADS = 4  # decode requests and tokenize while the model works


@dataclass(frozen=True)
class Piecewise:
    """A piece of the text of one of a request's answers.

    Args:
        index: of the answer.
        scores: of the tokens in it, where they were asked for.
        reply: the whole answer, in its last piece.
    """

    index: int
    text: str
    scores: tuple[TokenScore, ...] = ()
    reply: Reply | None = None


class Chat:
    """The answers to one request, in the making. Iterating yields their pieces as they come."""

    def __init__(
        self, served: ServedModel, answers: Sequence[tuple[Answer, Recorder | None]]
    ) -> None:
        self.served, self.name = served, served.name
        self.created = time.time()
        self.answers = answers
        self.events: asyncio.Queue[Piecewise | BaseException] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        self.told = [0] * len(answers)  # scores that have been passed on
        numbers = range(len(answers))
        self.futures = served.submit_answers(
            [answer for answer, _ in answers], [self._teller(number) for number in numbers]
        )
        for number, future in enumerate(self.futures):
            future.add_done_callback(self._ender(number))

    def _put(self, event: Piecewise | BaseException) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody listens
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    def _teller(self, number: int) -> Callable[[str], None]:
        return lambda text: self._put(Piecewise(number, text, self._scores(number)))

    def _scores(self, number: int) -> tuple[TokenScore, ...]:
        """Return the scores of the tokens that have been shown since the last call."""
        answer, recorder = self.answers[number]
        if recorder is None:
            return ()
        new = recorder.scores[self.told[number] : answer.shown]
        self.told[number] = answer.shown
        return tuple(new)

    def _ender(self, number: int) -> Callable[[Future[Reply]], None]:
        def ended(future: Future[Reply]) -> None:
            if future.cancelled():
                return
            error = future.exception()
            if error is not None:
                self._put(error)
            else:
                self._put(Piecewise(number, "", self._scores(number), future.result()))

        return ended

    async def __aiter__(self) -> AsyncIterator[Piecewise]:
        left = len(self.answers)
        while left:
            event = await self.events.get()
            if isinstance(event, BaseException):
                raise event
            yield event
            left -= event.reply is not None

    def cancel(self) -> None:
        """End the answers that are unfinished and return their memory."""
        for future in self.futures:
            future.cancel()
        self.served.scheduler.wake()

    def token_text(self, token_id: int) -> str:
        """Return a token's text."""
        return self.served.model.tokenizer.decode([token_id], skip_special_tokens=False)


@dataclass(frozen=True)
class Embedded:
    """The vectors of a request and what its inputs held.

    Args:
        vectors: float32 [N, D]; [N, 0] of a multi-vector model.
        of_inputs: of each input its vector [D], or its vectors [tokens, D].
    """

    name: str
    vectors: np.ndarray
    of_inputs: Sequence[np.ndarray]
    num_tokens: int
    text_tokens: int
    cost: Cost


class Service:
    """Answers and embeds for the dialects."""

    def __init__(self, config: ServerConfig, pool: ModelPool, metrics: Metrics) -> None:
        self.config, self.pool, self.metrics = config, pool, metrics
        self.fetcher = Fetcher(config.allow_urls, max_bytes=config.limits.body_bytes)
        self.executor = ThreadPoolExecutor(PREPARING_THREADS, thread_name_prefix="prepare")
        # Searching and adding wait for vectors: they have threads of their own, so that they cannot
        # keep the preparation of what they wait for from running.
        self.index_executor = ThreadPoolExecutor(INDEX_THREADS, thread_name_prefix="index")
        self.indexes = Indexes(config.indexes)
        self.adding = FolderAdding(config.allow_folders)
        self.examples: Sequence[str] = ()
        self.started = int(time.time())
        self.draining = False

    def reader(self) -> Reader:
        """Return the reader that makes the prompts of one request."""
        return Reader(self.config.limits, self.fetcher)

    async def prepare(self, work: Callable[[], Result]) -> Result:
        """Run a function beside the event loop, in one of the threads that prepare requests."""
        return await asyncio.get_running_loop().run_in_executor(self.executor, work)

    async def prepare_index(self, work: Callable[[], Result]) -> Result:
        """Run a function of an index beside the event loop; it may wait for vectors."""
        return await asyncio.get_running_loop().run_in_executor(self.index_executor, work)

    @asynccontextmanager
    async def chat(
        self,
        name: str | None,
        turns: Sequence[Turn],
        settings: Mapping[str, Any],
        *,
        n: int = 1,
        top_logprobs: int | None = None,
        keep_seconds: float | None = None,
    ) -> AsyncIterator[Chat]:
        """Begin the answers to a request; leaving the block ends those that are unfinished.

        Args:
            n: how many answers; the seed of each is one more than that of the one before.
            top_logprobs: how many likely tokens are noted beside each token; None: nothing is.

        Raises:
            ApiError, InputError: the request cannot be answered.
        """
        self.check_open()
        limit = self.config.limits.new_tokens
        asked = settings.get("max_new_tokens", limit)
        if asked > limit:
            raise ApiError(
                400,
                f"{asked} tokens were asked for, but this server generates at most {limit} per "
                "answer",
                code="invalid_value",
                param="max_tokens",
            )
        async with self.pool.using(name, keep_seconds) as served:

            def begin() -> list[tuple[Answer, Recorder | None]]:
                prompt = self.reader().prompt(turns)
                answers = []
                for number in range(n):
                    own = {**settings, "max_new_tokens": asked}
                    if (seed := own.get("seed")) is not None:
                        own["seed"] = seed + number
                    answers.append(served.prepare_answer(prompt, own, top_logprobs))
                return answers

            chat = Chat(served, await self.prepare(begin))
            try:
                yield chat
            finally:
                chat.cancel()

    def count_tokens(self, name: str, replies: Sequence[Reply]) -> None:
        """Add the tokens of finished answers to the metrics."""
        usage = replies[0].usage
        metrics = self.metrics
        metrics.prompt_tokens.labels(name, "chat").inc(usage.prompt_tokens)
        metrics.cached_tokens.labels(name).inc(usage.cached_tokens)
        metrics.new_tokens.labels(name).inc(sum(one.usage.completion_tokens for one in replies))
        metrics.first_token.labels(name).observe(replies[0].timings.prefill_s)

    async def embed(
        self,
        name: str | None,
        inputs: Sequence[Sequence[Piece]],
        *,
        instruction: str | None = None,
        side: Side | None = None,
        num_queries: int | None = None,
        dim: int | None = None,
        multi: bool = False,
        keep_seconds: float | None = None,
    ) -> Embedded:
        """Return the vectors of inputs.

        Args:
            instruction: what the vectors are for; None: what the configuration says of the side.
            side: of all inputs; None: it was not said.
            num_queries: number of leading inputs that are queries and get the instruction; the rest
                documents; None: all are of `side`.
            dim: keep the first `dim` numbers of each vector.
            multi: the vectors may be those of a multi-vector model.

        Raises:
            ApiError, InputError: an input cannot be embedded; the message names it.
        """
        self.check_open()
        async with self.pool.using(name, keep_seconds) as served:
            reader = self.reader()
            known = self.config.instructions
            multi = multi and served.model.has_multi_vectors

            def instruction_of(number: int) -> str | None:
                if multi:  # of its own prompts, not of a server's other models
                    return instruction
                if num_queries is None:
                    return instruction or (known.get(side) if side else None)
                is_query = number < num_queries
                return (instruction or known.get("query")) if is_query else known.get("document")

            left = threading.Event()  # the client: the rest need not be prepared

            def prepare() -> list[Any]:
                if not multi:
                    served.check_dim(dim)
                prepared: list[Any] = []
                for number, pieces in enumerate(inputs):
                    if left.is_set():
                        return prepared
                    try:
                        is_document = num_queries is not None and number >= num_queries
                        prepared.append(
                            served.model.prepare(
                                reader.item(pieces),
                                instruction_of(number),
                                document=multi and is_document,
                            )
                        )
                    except InputError as error:
                        raise type(error)(f"input {number}: {error}") from None
                    except ApiError as error:
                        message = f"input {number}: {error.message}"
                        raise ApiError(error.status, message, code=error.code) from None
                return prepared

            try:
                prepared = await self.prepare(prepare)
            finally:
                left.set()
            future = served.submit_inputs(prepared)
            try:
                vectors = await asyncio.wrap_future(future)
            finally:
                future.cancel()
            of_inputs = list(vectors if multi else served.cut(vectors, dim))
            num_tokens = sum(len(one.token_ids) for one in prepared)
            self.metrics.prompt_tokens.labels(served.name, "embed").inc(num_tokens)
            return Embedded(
                served.name,
                np.empty((len(inputs), 0), np.float32) if multi else np.stack(of_inputs),
                of_inputs,
                num_tokens,
                num_tokens - sum(count for one in prepared for _, count in one.image_slots),
                reader.cost,
            )

    def check_open(self) -> None:
        """Raise an ApiError (503) while the server is being stopped."""
        if self.draining:
            raise ApiError(503, "the server is stopping", code="stopping", retry_after=5)

    def close(self) -> None:
        """Stop all threads; unfinished work fails."""
        self.adding.stop()
        self.executor.shutdown(wait=False, cancel_futures=True)
        self.pool.close()
        self.index_executor.shutdown(wait=True, cancel_futures=True)
        self.indexes.close()
