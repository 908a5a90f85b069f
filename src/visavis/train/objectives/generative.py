"""Generative training: next-token loss on assistant messages, the same weight for every token.

A step's conversations are split into micro-batches by tokens; each loss is divided by the number of
learned tokens of the whole step, on all processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import nn

from visavis.data.examples import Conversation
from visavis.data.sampler import SourceSampler
from visavis.model.batch import PackedBatch
from visavis.model.image_tokens import typical_tokens
from visavis.processing.prompt_encoder import PreparedPrompt
from visavis.train.data_loader import DataLoader
from visavis.train.gradcache import token_chunks
from visavis.train.objectives import Devices, Part, draw


class GenerativeTask:
    """Draws conversations.

    Args:
        sources: samples by the names that `sampler` draws.
        batch: conversations of a step, of all processes together.
        micro_tokens: tokens of one pass through the model.
    """

    def __init__(
        self,
        sources: Mapping[str, Sequence[Any]],
        sampler: SourceSampler,
        loader: DataLoader,
        *,
        batch: int,
        micro_tokens: int,
        weight: float = 1.0,
        name: str = "generative",
    ) -> None:
        self.sources, self.sampler, self.loader = sources, sampler, loader
        self.batch, self.micro_tokens = batch, micro_tokens
        self.weight, self.name = weight, name

    def step(self, trainee: nn.Module, devices: Devices, *, last: bool = True) -> list[Part]:
        with self.loader.waiting():
            samples = draw(
                self.sampler,
                self.sources,
                Conversation,
                devices,
                batch=self.batch,
                tokens_per_image=typical_tokens(self.loader.encoder.config),
            )
            encoded = [self.loader.chat(sample) for sample in samples]
        learned = sum(sum(one.loss_mask[1:]) for one in encoded)
        everywhere = devices.sum(learned)
        chunks = token_chunks([len(one.token_ids) for one in encoded], self.micro_tokens)
        chunks += [[]] * (devices.passes(len(chunks)) - len(chunks))
        total, tokens = 0.0, 0
        makers = [partial(self._micro_batch, samples, encoded, chunk) for chunk in chunks]
        for number, batch in enumerate(self.loader.prefetch(makers)):
            final = last and number == len(chunks) - 1
            with nullcontext() if final else devices.no_sync():
                loss = trainee(batch, "loss")
                devices.backward(loss * (self.weight * devices.world / everywhere))
            total += float(loss.detach())
            tokens += batch.num_tokens if chunks[number] else 0
        mean = devices.sum(total) / everywhere
        ids = tuple(sample.id for sample in samples)
        waited = self.loader.take_waited()
        return [Part(self.name, mean, int(devices.sum(tokens)), ids, waited)]

    def _micro_batch(
        self,
        samples: Sequence[Conversation],
        encoded: Sequence[PreparedPrompt],
        chunk: Sequence[int],
    ) -> PackedBatch:
        if not chunk:
            return self.loader.nothing()
        own = [samples[i] for i in chunk]
        return self.loader.pack(
            [one.prompt for one in own],
            [encoded[i] for i in chunk],
            ids=[one.id for one in own],
            labels=True,
        )

    def state(self) -> dict[str, Any]:
        return {"mixture": self.sampler.state()}

    def restore(self, state: dict[str, Any]) -> None:
        self.sampler.restore(state["mixture"])
