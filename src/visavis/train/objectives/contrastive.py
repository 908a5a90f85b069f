"""A query attracts its target and repels everything else of the step, on all processes.

Exact for any batch on any memory: chunks by tokens go through `gradcache.py`, their pictures read
when their turn comes. Targets that say the same are no negatives of each other. Knows neither the
loop nor where samples come from.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from visavis.data.examples import ContrastiveExample, estimated_tokens
from visavis.data.sampler import SourceSampler, dealt
from visavis.errors import TrainError
from visavis.inputs import Prompt, Text
from visavis.model.batch import PackedBatch
from visavis.processing.images import content_hash
from visavis.train.data_loader import DataLoader
from visavis.train.distributed import gather_rows
from visavis.train.gradcache import cached_backward, token_chunks
from visavis.train.losses import Contrast, contrastive_loss
from visavis.train.objectives import Devices, Part, Task

MAX_SCALE = 100.0


class ContrastiveTask:
    """Draws queries with their targets.

    Args:
        sources: samples by the names that `mixture` draws.
        batch: queries of a step, of all processes together.
        chunk_tokens: tokens of one pass through the model.
        scale: inverse temperature to start with, or for good.
        learned_scale: train it, as CLIP does; at most 100.
        negatives: at most so many hard negatives of each query; None: all it has.
    """

    def __init__(
        self,
        sources: Mapping[str, Sequence[Any]],
        mixture: SourceSampler,
        batcher: DataLoader,
        settings: Contrast,
        *,
        batch: int,
        chunk_tokens: int,
        scale: float,
        pooling: str,
        learned_scale: bool = False,
        negatives: int | None = None,
        weight: float = 1.0,
        name: str = "contrastive",
    ) -> None:
        self.sources, self.mixture, self.batcher = sources, mixture, batcher
        self.settings, self.batch, self.chunk_tokens = settings, batch, chunk_tokens
        self.pooling, self.negatives = pooling, negatives
        # Beside the model: each process computes its whole gradient, so none is exchanged.
        start = torch.tensor(math.log(scale), device=batcher.device)
        self.log_scale = nn.Parameter(start, requires_grad=learned_scale)
        self.weight, self.name = weight, name

    def step(self, trainee: nn.Module, devices: Devices, *, last: bool = True) -> list[Part]:
        with self.batcher.waiting():
            samples = self._own(devices)
        queries = [sample.query for sample in samples]
        targets = [sample.target for sample in samples]
        hard = [(one, wrong) for one in samples for wrong in one.negatives[: self.negatives]]
        if self.batch < 2 and not devices.sum(len(hard)):
            raise TrainError(
                f"a step draws one query, {samples[0].id!r}, which has no hard negatives: there is "
                "nothing it could be told apart from. Raise `batch` under `contrastive`, or mine "
                "negatives."
            )
        prompts = [*queries, *targets, *(wrong for _, wrong in hard)]
        owners = [*samples, *samples, *(one for one, _ in hard)]
        with self.batcher.waiting():
            item = self.batcher.item
            encoded = [item(one.id, one.query, one.instruction) for one in samples]
            encoded += [
                item(owner.id, prompt, owner.target_instruction)
                for owner, prompt in zip(
                    owners[len(samples) :], prompts[len(samples) :], strict=True
                )
            ]
        chunks = token_chunks([len(one.token_ids) for one in encoded], self.chunk_tokens)
        chunks += [[]] * (devices.passes(len(chunks)) - len(chunks))
        digests = self.batcher.pool.submit(_digests, prompts[len(samples) :])
        groups = _numbers([one.group or one.id for one in samples]).to(self.batcher.device)
        where = torch.tensor([len(queries), len(targets), len(hard)]).cumsum(0).tolist()

        def loss_of(vectors: Tensor) -> Tensor:
            rows = gather_rows(vectors[: where[0]])
            positive, negative = vectors[where[0] : where[1]], vectors[where[1] :]
            columns = torch.cat((gather_rows(positive), gather_rows(negative)))
            keys = self.batcher.result(digests).to(self.batcher.device)
            key = torch.cat((gather_rows(keys[: len(targets)]), gather_rows(keys[len(targets) :])))
            group = gather_rows(groups)

            def excluded(block: slice) -> Tensor:  # [n, M] of [n, 1, 2] and [1, M, 2]
                same = (key[block, None] == key[None]).all(-1)
                same[:, : len(rows)] |= (group[block, None] == group[None]).all(-1)
                return same

            scale = self.log_scale.exp().clamp(max=MAX_SCALE)
            loss = contrastive_loss(rows, columns, self.settings, scale=scale, excluded=excluded)
            return loss * self.weight

        def packed(chunk: Sequence[int]) -> PackedBatch:
            if not chunk:
                return self.batcher.nothing()
            return self.batcher.pack(
                [prompts[i] for i in chunk],
                [encoded[i] for i in chunk],
                ids=[owners[i].id for i in chunk],
            )

        # Each chunk is encoded twice: all without gradients, then all with.
        batches = self.batcher.prefetch(partial(packed, chunk) for chunk in chunks + chunks)

        def encode(chunk: Sequence[int]) -> Tensor:
            return trainee(next(batches), "vectors", self.pooling)[: len(chunk)]

        loss = cached_backward(
            chunks,
            encode,
            loss_of,
            backward=devices.backward,
            no_sync=devices.no_sync,
            sync_last=last,
            factor=devices.world,
        )
        tokens = int(devices.sum(sum(len(one.token_ids) for one in encoded)))
        ids = tuple(one.id for one in samples)
        mean = float(loss) / self.weight
        return [Part(self.name, mean, tokens, ids, self.batcher.take_waited())]

    def _own(self, devices: Devices) -> list[ContrastiveExample]:
        """Draw a step's queries; return those of this process.

        Raises:
            TrainError: it has none, or a sample is no query with its target.
        """
        if self.batch < devices.world:
            raise TrainError(
                f"a step draws {self.batch} queries for {devices.world} processes, expected at "
                "least one each; raise `batch` under `contrastive`."
            )
        drawn = self.mixture.batch(self.batch)
        samples = [self.sources[name][number] for name, number in drawn]
        for sample in samples:
            if not isinstance(sample, ContrastiveExample):
                raise TrainError(
                    f"the sample {sample.id!r} is a conversation, expected a query with its "
                    "target; name its source under `generative`."
                )
        if devices.world == 1:
            return samples
        per_image = self.batcher.encoder.config.tokens_per_image
        sizes = [estimated_tokens(sample, per_image) for sample in samples]
        return [samples[i] for i in dealt(sizes, devices.world)[devices.rank]]

    def state(self) -> dict[str, Any]:
        return {"mixture": self.mixture.state(), "log_scale": self.log_scale.item()}

    def restore(self, state: dict[str, Any]) -> None:
        self.mixture.restore(state["mixture"])
        self.log_scale.data.fill_(state["log_scale"])


def _digests(prompts: Sequence[Prompt]) -> Tensor:
    """Return int64 [N, 2], equal where texts and pictures are."""
    return _numbers(
        [
            "\n".join(
                part.text if isinstance(part, Text) else content_hash(part)
                for message in prompt.messages
                for part in message.parts
            )
            for prompt in prompts
        ]
    )


def _numbers(texts: Sequence[str]) -> Tensor:
    """Return int64 [N, 2], equal where texts are."""
    digests = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts]
    if not digests:
        return torch.zeros(0, 2, dtype=torch.int64)
    return torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.int64).view(-1, 2)


class JointTask:
    """Objectives one after the other; gradients add up."""

    def __init__(self, parts: Sequence[Task]) -> None:
        self.parts = parts

    def step(self, trainee: nn.Module, devices: Devices, *, last: bool = True) -> list[Part]:
        done = []
        for number, part in enumerate(self.parts):
            final = last and number == len(self.parts) - 1
            done += part.step(trainee, devices, last=final)
        return done

    def state(self) -> dict[str, Any]:
        return {str(number): part.state() for number, part in enumerate(self.parts)}

    def restore(self, state: dict[str, Any]) -> None:
        for number, part in enumerate(self.parts):
            part.restore(state[str(number)])
