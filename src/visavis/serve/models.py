"""The served models by name: loaded on first use, unloaded when idle.

ModelPool ── get(name) ──► ServedModel = a loaded model + its scheduler
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from visavis.errors import NonFiniteError, VisavisError
from visavis.inputs import Prompt
from visavis.memory import give_back
from visavis.model.pooling import cut, kept_dim
from visavis.serve.config import ServerConfig
from visavis.serve.errors import ApiError
from visavis.serve.metrics import Metrics
from visavis.serve.scheduler import ChatJob, EmbedJob, Scheduler

if TYPE_CHECKING:
    from visavis.api import Model
    from visavis.generate.streaming import Answer, Reply
    from visavis.processing.prompt_encoder import PreparedPrompt

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenScore:
    """A token and its log probability, and the likeliest tokens in its place."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Recorder:
    """Notes the log probabilities of the tokens that a sampler chooses, before temperature and
    cuts."""

    def __init__(self, sample: Callable[[Tensor], int], top: int) -> None:
        self.sample, self.top = sample, top
        self.scores: list[TokenScore] = []

    def __call__(self, logits: Tensor) -> int:
        """Return the sampler's choice of logits [vocab]."""
        token = self.sample(logits)
        logprobs = logits.float().log_softmax(-1)
        found = logprobs.topk(self.top) if self.top else None
        top = zip(found.indices.tolist(), found.values.tolist(), strict=True) if found else ()
        self.scores.append(TokenScore(token, float(logprobs[token]), tuple(top)))
        return token


class ServedModel:
    """A loaded model and the thread in which it works."""

    def __init__(self, name: str, model: Model, config: ServerConfig, metrics: Metrics) -> None:
        self.name, self.model = name, model
        self.loaded_at = datetime.now(UTC)
        limits = config.limits
        self.scheduler = Scheduler(
            name,
            model.engine(config.max_sequences),
            self._embed,
            metrics,
            waiting_chats=limits.waiting_chats,
            waiting_items=limits.waiting_items,
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights in memory."""
        vlm = self.model.vlm
        return sum(tensor.nbytes for tensor in itertools.chain(vlm.parameters(), vlm.buffers()))

    @property
    def number_type(self) -> str:
        """The number type of the activations of the decoder, or of a dual encoder's towers."""
        return str(self.model.vlm.dtype).removeprefix("torch.")

    @property
    def on_gpu(self) -> bool:
        return self.model.device.type != "cpu"

    def prepare_answer(
        self, prompt: Prompt, settings: Mapping[str, Any], top_logprobs: int | None
    ) -> tuple[Answer, Recorder | None]:
        """Return an answer that is ready to be submitted; called from any thread."""
        answer = self.model.ask(prompt, **settings)
        if top_logprobs is None:
            return answer, None
        recorder = Recorder(answer.sequence.sample, top_logprobs)
        answer.sequence.sample = recorder
        return answer, recorder

    def submit_answers(
        self, answers: Sequence[Answer], tells: Sequence[Callable[[str], None]]
    ) -> list[Future[Reply]]:
        """Let answers wait for their turn; each is told its text piece by piece."""
        jobs = [ChatJob(answer, tell) for answer, tell in zip(answers, tells, strict=True)]
        self.scheduler.chat(jobs)
        return [job.future for job in jobs]

    def submit_inputs(self, inputs: Sequence[PreparedPrompt]) -> Future[Any]:
        """Let inputs (`Model.prepare`) wait for their batch; the future ends with their vectors,
        float32 [N, D], or of a multi-vector model [tokens, D] for each."""
        job = EmbedJob(inputs, [len(one.token_ids) for one in inputs])
        self.scheduler.embeddings(job)
        return job.future

    def check_dim(self, dim: int | None) -> None:
        """Raise an InputError if vectors cannot be cut to `dim` numbers."""
        kept_dim(dim, self.model.embedding_dim)

    def cut(self, vectors: np.ndarray, dim: int | None) -> np.ndarray:
        """Keep the first `dim` numbers of vectors, normalised again."""
        dim = kept_dim(dim, self.model.embedding_dim)
        return cut(torch.from_numpy(vectors), dim).numpy()

    def _embed(self, inputs: Sequence[PreparedPrompt]) -> Sequence[np.ndarray]:
        multi, model = self.model.has_multi_vectors, self.model
        vectors = list(
            model.embed_multi_prepared(inputs) if multi else model.embed_prepared(inputs)
        )
        if not all(np.isfinite(one).all() for one in vectors):  # the scheduler finds the input
            raise NonFiniteError(f"{self.name} gives an input a vector that is not finite")
        return vectors

    def close(self) -> None:
        """Stop the thread; unfinished work fails."""
        self.scheduler.close()


@dataclass
class Entry:
    """A name and what stands behind it."""

    source: str
    served: ServedModel | None = None
    users: int = 0  # requests that hold it
    last_used: float = 0.0  # of time.monotonic
    keep_seconds: float | None = None  # as a request said; None: as the configuration says
    modified: float = 0.0  # seconds since 1970, of the model's file or folder
    loading: asyncio.Task[None] | None = None


class ModelPool:
    """Models by name.

    Args:
        load: returns the model behind a source.
        loaded: models that exist already, by name.
    """

    def __init__(
        self,
        config: ServerConfig,
        metrics: Metrics,
        load: Callable[..., Model],
        loaded: dict[str, Model] | None = None,
    ) -> None:
        self.config, self.metrics, self.load = config, metrics, load
        self.entries = {
            name: Entry(source, modified=_modified(source))
            for name, source in config.models.items()
        }
        self.executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="load")
        self.lock = threading.Lock()
        for name, model in (loaded or {}).items():
            self._serve(name, model)

    @property
    def default(self) -> str:
        return next(iter(self.entries))

    def resolve(self, name: str | None) -> str:
        """Return the served name that a request means.

        Raises:
            ApiError: there is none (404).
        """
        if not name:
            return self.default
        for candidate in (name, name.removesuffix(":latest")):
            if candidate in self.entries:
                return candidate
        raise ApiError(
            404,
            f"there is no model {name[:100]!r}; this server has {', '.join(self.entries)}",
            code="model_not_found",
            param="model",
        )

    @asynccontextmanager
    async def using(
        self, name: str | None, keep_seconds: float | None = None
    ) -> AsyncIterator[ServedModel]:
        """Hold a model for a request, loading it first if need be.

        Args:
            keep_seconds: how long it stays loaded afterwards; negative: for good.

        Raises:
            ApiError: no such model (404), or it cannot be loaded (503).
        """
        name = self.resolve(name)
        entry = self.entries[name]
        entry.users += 1
        try:
            if entry.served is None:
                if entry.loading is None:
                    entry.loading = asyncio.create_task(self._load(name))
                # Who leaves while it loads does not keep others from it.
                await asyncio.shield(entry.loading)
            assert entry.served is not None
            if keep_seconds is not None:
                entry.keep_seconds = keep_seconds
            yield entry.served
        finally:
            entry.users -= 1
            entry.last_used = time.monotonic()

    async def _load(self, name: str) -> None:
        loop, entry = asyncio.get_running_loop(), self.entries[name]
        started = time.perf_counter()
        try:
            model = await loop.run_in_executor(
                self.executor, lambda: self.load(entry.source, **self.config.load)
            )
        except (VisavisError, OSError, MemoryError) as error:
            log.error("the model %s cannot be loaded: %s", name, error)
            raise ApiError(
                503,
                f"the model {name} cannot be loaded; see the log of the server",
                code="model_unavailable",
            ) from None
        finally:
            entry.loading = None
        self._serve(name, model)
        log.info("loaded %s in %.1f s", name, time.perf_counter() - started)

    def _serve(self, name: str, model: Model) -> None:
        entry = self.entries[name]
        entry.served = ServedModel(name, model, self.config, self.metrics)
        entry.last_used = time.monotonic()
        self.metrics.loaded.labels(name).set(1)

    def expiry(self, entry: Entry) -> float | None:
        """Return when an entry's model is to be unloaded, of time.monotonic; None: never."""
        seconds = entry.keep_seconds
        if seconds is None:
            seconds = self.config.unload_after
        return None if seconds is None or seconds < 0 else entry.last_used + seconds

    async def unload_idle(self) -> None:
        """Free the models that nobody has used for long enough."""
        for name, entry in self.entries.items():
            served, expiry = entry.served, self.expiry(entry)
            if served is None or expiry is None or entry.users or time.monotonic() < expiry:
                continue
            if not served.scheduler.idle:
                continue
            entry.served, entry.keep_seconds = None, None
            self.metrics.loaded.labels(name).set(0)
            await asyncio.get_running_loop().run_in_executor(self.executor, served.close)
            del served
            gc.collect()
            give_back()
            log.info("unloaded %s", name)

    def close(self) -> None:
        """Stop all threads."""
        for entry in self.entries.values():
            if entry.served is not None:
                entry.served.close()
                entry.served = None
        self.executor.shutdown(wait=False, cancel_futures=True)


def _modified(source: str) -> float:
    try:
        return Path(source).expanduser().stat().st_mtime
    except OSError:  # a bundled name or a hub id
        return time.time()
