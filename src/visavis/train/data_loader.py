"""Packed batches from examples: token ids, labels and pixels, prefetched while a step runs.

Images are opened when their batch is made and dropped with it. With a feature store the vision
tower's cached output takes their place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from visavis.data.examples import Conversation
from visavis.errors import TrainError, VisavisError
from visavis.inputs import Prompt
from visavis.model.batch import PackedBatch
from visavis.model.image_input import ImageInput
from visavis.processing.collate import next_token_labels, pack
from visavis.processing.image_encoder import load_pixels
from visavis.processing.prompt_encoder import PreparedPrompt, PromptEncoder

T = TypeVar("T")


class Features(Protocol):
    """Store of the vision tower's output for images (see `feature_store.py`)."""

    def of(self, prompts: Sequence[Prompt], ids: Sequence[str]) -> Tensor:
        """Return features [N, P, W] of all images of prompts, in order; `ids` name them."""
        ...


class DataLoader:
    """Makes batches for one model on one device.

    Args:
        max_tokens: sequences longer than this are an error; None: the model's context.
        cut: longer conversations lose their end instead.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        device: torch.device | str = "cpu",
        *,
        features: Features | None = None,
        max_tokens: int | None = None,
        cut: bool = False,
        threads: int = 2,
    ) -> None:
        self.encoder, self.device, self.features = encoder, device, features
        self.max_tokens = min(max_tokens or encoder.context_length, encoder.context_length)
        self.cut = min(self.max_tokens, encoder.context_length - 1) if cut else None
        self.pool = ThreadPoolExecutor(threads)
        self.ahead = ThreadPoolExecutor(1)  # makes the next batch; waits for `pool`
        self.waited = 0.0  # see `waiting`

    def chat(self, sample: Conversation) -> PreparedPrompt:
        """Encode a conversation.

        Raises:
            TrainError: nothing of it would be learned, or it is too long; the message names it.
        """
        chat = partial(self.encoder.chat, add_generation_prompt=False, cut=self.cut)
        encoded = self._encoded(sample.id, chat, sample.prompt)
        check_learned(sample.id, encoded)
        return encoded

    def item(self, id: str, prompt: Prompt, instruction: str | None = None) -> PreparedPrompt:
        """Encode an item that is embedded.

        Raises:
            TrainError: it cannot be; the message names it.
        """
        return self._encoded(id, partial(self.encoder.item, instruction=instruction), prompt)

    def _encoded(
        self, id: str, encode: Callable[[Prompt], PreparedPrompt], prompt: Prompt
    ) -> PreparedPrompt:
        try:
            encoded = encode(prompt)
        except VisavisError as error:
            raise TrainError(f"the sample {id!r} cannot be used: {error}") from error
        if len(encoded.token_ids) > self.max_tokens:
            raise TrainError(
                f"the sample {id!r} has {len(encoded.token_ids)} tokens, expected at most "
                f"{self.max_tokens}; shorten it, or raise max_tokens in the recipe."
            )
        return encoded

    def pack(
        self,
        prompts: Sequence[Prompt],
        encoded: Sequence[PreparedPrompt],
        *,
        ids: Sequence[str],
        labels: bool = False,
    ) -> PackedBatch:
        """Lay sequences end to end with what the model needs of their images.

        Args:
            ids: of the sample that each prompt is of.

        Raises:
            TrainError: an image cannot be read; the message names the sample.
        """
        batch = pack(encoded)
        if labels:
            batch.labels = next_token_labels(encoded)
        if any(prompt.visuals for prompt in prompts):
            if self.features is not None:
                batch.features = self.features.of(prompts, ids)
            else:
                batch.visuals = self._pixels(encoded, ids)
        return batch.to(self.device)

    def _pixels(
        self, prompts: Sequence[PreparedPrompt], ids: Sequence[str]
    ) -> tuple[ImageInput, ...]:
        processor = self.encoder.processor
        assert processor is not None
        waiting = [
            (id, self.pool.submit(load_pixels, one, processor))
            for id, prompt in zip(ids, prompts, strict=True)
            for one in prompt.images
        ]
        return tuple(_seen(id, future) for id, future in waiting)

    def nothing(self) -> PackedBatch:
        """Return a batch of one token that teaches nothing, for a process that has run out."""
        zero = torch.zeros(1, dtype=torch.int64)
        positions = zero.expand(3, 1) if self.encoder.config.decoder.mrope_sections else zero
        return PackedBatch(zero, positions, (1,), labels=zero - 100).to(self.device)

    def prefetch(self, makers: Iterable[Callable[[], T]]) -> Iterator[T]:
        """Yield what each of `makers` (functions without arguments) returns, one made ahead."""
        waiting: Future[T] | None = None
        for make in makers:
            coming = self.ahead.submit(make)
            if waiting is not None:
                yield self.result(waiting)
            waiting = coming
        if waiting is not None:
            yield self.result(waiting)

    def result(self, future: Future[T]) -> T:
        """Return the result of a future, and count the time spent waiting for it."""
        with self.waiting():
            return future.result()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time spent here as that in which the model had nothing to do."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.waited += time.perf_counter() - started

    def take_waited(self) -> float:
        """Return the seconds that were counted, and start over."""
        waited, self.waited = self.waited, 0.0
        return waited


def check_learned(id: str, encoded: PreparedPrompt) -> None:
    """Refuse a conversation without a learned token.

    Raises:
        TrainError: the loss mask leaves out all tokens; the message names the conversation.
    """
    if not any(encoded.loss_mask[1:]):
        raise TrainError(
            f"nothing would be learned of {id!r}: none of its {len(encoded.token_ids)} tokens is "
            "an answer's. Its assistant turns are missing or were cut off, or the chat template "
            "leaves them out; leave the record out or correct it."
        )


def _seen(id: str, future: Future[ImageInput]) -> ImageInput:
    """Return the image input that a worker prepared.

    Raises:
        TrainError: the image cannot be read; the message names the sample.
    """
    try:
        return future.result()
    except VisavisError as error:
        raise TrainError(
            f"a picture of the sample {id!r} cannot be read: {error} Leave the record out or mend "
            "the file; `visavis data check` finds all of them."
        ) from error
    except Exception as error:
        raise TrainError(
            f"a worker failed at a picture of the sample {id!r} ({type(error).__name__}: {error}); "
            "if its file opens elsewhere, this is a fault of visavis. Leave the record out to go "
            "on."
        ) from error
