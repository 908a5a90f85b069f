"""Next-token loss on what the assistant says, every learned token of a step weighing the same.

A step's samples are cut into micro-batches by tokens; the loss of each is divided by the learned
tokens of all of them, on all processes. Knows neither the loop nor where samples come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import nn

from visavis.data.examples import Conversation, estimated_tokens
from visavis.data.sampler import SourceSampler, dealt
from visavis.errors import TrainError
from visavis.model.batch import PackedBatch
from visavis.processing.chat_template import Encoded
from visavis.train.data_loader import DataLoader
from visavis.train.gradcache import token_chunks
from visavis.train.objectives import Devices, Part


class GenerativeTask:
    """Draws conversations.

    Args:
        sources: samples by the names that `mixture` draws.
        batch: conversations of a step, of all processes together.
        micro_tokens: tokens of one pass through the model.
    """

    def __init__(
        self,
        sources: Mapping[str, Sequence[Any]],
        mixture: SourceSampler,
        batcher: DataLoader,
        *,
        batch: int,
        micro_tokens: int,
        weight: float = 1.0,
        name: str = "generative",
    ) -> None:
        self.sources, self.mixture, self.batcher = sources, mixture, batcher
        self.batch, self.micro_tokens = batch, micro_tokens
        self.weight, self.name = weight, name

    def step(self, trainee: nn.Module, devices: Devices, *, last: bool = True) -> list[Part]:
        with self.batcher.waiting():
            samples = self._own(devices)
            encoded = [self.batcher.chat(sample) for sample in samples]
        learned = sum(sum(one.loss_mask[1:]) for one in encoded)
        everywhere = devices.sum(learned)
        chunks = token_chunks([len(one.token_ids) for one in encoded], self.micro_tokens)
        chunks += [[]] * (devices.passes(len(chunks)) - len(chunks))
        total, tokens = 0.0, 0
        makers = [partial(self._micro_batch, samples, encoded, chunk) for chunk in chunks]
        for number, batch in enumerate(self.batcher.prefetch(makers)):
            final = last and number == len(chunks) - 1
            with nullcontext() if final else devices.no_sync():
                loss = trainee(batch, "loss")
                devices.backward(loss * (self.weight * devices.world / everywhere))
            total += float(loss.detach())
            tokens += batch.num_tokens if chunks[number] else 0
        mean = devices.sum(total) / everywhere
        ids = tuple(sample.id for sample in samples)
        waited = self.batcher.take_waited()
        return [Part(self.name, mean, int(devices.sum(tokens)), ids, waited)]

    def _own(self, devices: Devices) -> list[Conversation]:
        """Draw a step's conversations; return those of this process.

        Raises:
            TrainError: it has none, or a sample is no conversation.
        """
        if self.batch < devices.world:
            raise TrainError(
                f"a step draws {self.batch} conversation(s) for {devices.world} processes, "
                "expected at least one each; raise `batch` under `generative`."
            )
        drawn = self.mixture.batch(self.batch)
        samples = [self.sources[name][number] for name, number in drawn]
        for sample in samples:
            if not isinstance(sample, Conversation):
                raise TrainError(
                    f"the sample {sample.id!r} is a query with its target, expected a "
                    "conversation; name its source under `contrastive`."
                )
        if devices.world == 1:
            return samples
        per_image = self.batcher.encoder.config.tokens_per_image
        sizes = [estimated_tokens(sample, per_image) for sample in samples]
        return [samples[i] for i in dealt(sizes, devices.world)[devices.rank]]

    def _micro_batch(
        self, samples: Sequence[Conversation], encoded: Sequence[Encoded], chunk: Sequence[int]
    ) -> PackedBatch:
        if not chunk:
            return self.batcher.nothing()
        own = [samples[i] for i in chunk]
        return self.batcher.pack(
            [one.prompt for one in own],
            [encoded[i] for i in chunk],
            ids=[one.id for one in own],
            labels=True,
        )

    def state(self) -> dict[str, Any]:
        return {"mixture": self.mixture.state()}

    def restore(self, state: dict[str, Any]) -> None:
        self.mixture.restore(state["mixture"])
