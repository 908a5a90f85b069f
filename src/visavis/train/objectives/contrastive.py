"""Contrastive training: InfoNCE with in-batch negatives of all processes and hard negatives.

Exact for any batch size: chunks by tokens go through `train/gradcache.py`, and a chunk's images are
read when it is encoded. `losses.FalseNegatives` decides which in-batch targets are not negatives.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from visavis.data.examples import ContrastiveExample
from visavis.data.sampler import SourceSampler
from visavis.errors import TrainError
from visavis.inputs import Prompt
from visavis.model.batch import PackedBatch
from visavis.model.image_tokens import typical_tokens
from visavis.processing.images import content_hash
from visavis.processing.prompt_encoder import PreparedPrompt
from visavis.train.data_loader import DataLoader
from visavis.train.distributed import gather_rows
from visavis.train.gradcache import cached_backward, token_chunks
from visavis.train.losses import Contrast, FalseNegatives, contrastive_loss, numbered
from visavis.train.objectives import Devices, Part, Task, draw

MAX_SCALE = 100.0


class ContrastiveTask:
    """Draws queries with their targets.

    Args:
        sources: samples by the names that `sampler` draws.
        batch: queries of a step, of all processes together.
        chunk_tokens: tokens of one pass through the model.
        scale: inverse temperature to start with, or for good.
        learned_scale: train it, as CLIP does; at most 100.
        negatives: maximum number of hard negatives per query; None: all.
    """

    def __init__(
        self,
        sources: Mapping[str, Sequence[Any]],
        sampler: SourceSampler,
        loader: DataLoader,
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
        self.sources, self.sampler, self.loader = sources, sampler, loader
        self.settings, self.batch, self.chunk_tokens = settings, batch, chunk_tokens
        self.pooling, self.negatives = pooling, negatives
        # Beside the model: each process computes its whole gradient, so none is exchanged.
        start = torch.tensor(math.log(scale), device=loader.device)
        self.log_scale = nn.Parameter(start, requires_grad=learned_scale)
        self.weight, self.name = weight, name

    def step(self, trainee: nn.Module, devices: Devices, *, last: bool = True) -> list[Part]:
        with self.loader.waiting():
            samples = draw(
                self.sampler,
                self.sources,
                ContrastiveExample,
                devices,
                batch=self.batch,
                tokens_per_image=typical_tokens(self.loader.encoder.config),
            )
            items = self._items(samples)
        if self.batch < 2 and not devices.sum(len(items) - 2 * len(samples)):
            raise TrainError(
                f"a step draws one query, {samples[0].id!r}, which has no hard negatives: there is "
                "nothing to contrast its target with. Raise `batch` under `contrastive`, or mine "
                "negatives."
            )
        chunks = token_chunks([len(one.encoded.token_ids) for one in items], self.chunk_tokens)
        chunks += [[]] * (devices.passes(len(chunks)) - len(chunks))
        keys = self.loader.pool.submit(_keys, samples, items[len(samples) :])
        # Each chunk is encoded twice: all without gradients, then all with.
        makers = [partial(self._packed, [items[i] for i in chunk]) for chunk in chunks]
        batches = self.loader.prefetch(makers + makers)
        loss = cached_backward(
            chunks,
            lambda chunk: trainee(next(batches), "vectors", self.pooling)[: len(chunk)],
            lambda vectors: self._loss(vectors, len(samples), keys),
            backward=devices.backward,
            no_sync=devices.no_sync,
            sync_last=last,
            factor=devices.world,
        )
        tokens = int(devices.sum(sum(len(one.encoded.token_ids) for one in items)))
        ids = tuple(one.id for one in samples)
        mean = float(loss) / self.weight
        return [Part(self.name, mean, tokens, ids, self.loader.take_waited())]

    def _items(self, samples: Sequence[ContrastiveExample]) -> list[_Item]:
        """Return the items to encode: all queries, then all targets, then all hard negatives."""
        queries = [(one.id, one.query, one.instruction) for one in samples]
        targets = [(one.id, one.target, one.target_instruction) for one in samples]
        hard = [
            (one.id, wrong, one.target_instruction)
            for one in samples
            for wrong in one.negatives[: self.negatives]
        ]
        return [
            _Item(id, prompt, self.loader.item(id, prompt, instruction))
            for id, prompt, instruction in (*queries, *targets, *hard)
        ]

    def _packed(self, items: Sequence[_Item]) -> PackedBatch:
        if not items:
            return self.loader.nothing()
        return self.loader.pack(
            [one.prompt for one in items],
            [one.encoded for one in items],
            ids=[one.id for one in items],
        )

    def _loss(self, vectors: Tensor, num: int, keys: Future[_Keys]) -> Tensor:
        """Return the weighted loss of all processes' vectors.

        Args:
            vectors: of this process: `num` queries, their targets, then hard negatives.
        """
        queries, groups, targets = (one.to(self.loader.device) for one in self.loader.result(keys))
        rows = gather_rows(vectors[:num])
        columns = torch.cat((gather_rows(vectors[num : 2 * num]), gather_rows(vectors[2 * num :])))
        excluded = FalseNegatives(
            numbered(gather_rows(queries)),
            numbered(gather_rows(groups)),
            numbered(torch.cat((gather_rows(targets[:num]), gather_rows(targets[num:])))),
        )
        scale = self.log_scale.exp().clamp(max=MAX_SCALE)
        loss = contrastive_loss(rows, columns, self.settings, scale=scale, excluded=excluded)
        return loss * self.weight

    def state(self) -> dict[str, Any]:
        return {"mixture": self.sampler.state(), "log_scale": self.log_scale.item()}

    def restore(self, state: dict[str, Any]) -> None:
        self.sampler.restore(state["mixture"])
        self.log_scale.data.fill_(state["log_scale"])


@dataclass(frozen=True)
class _Item:
    """A query, target or hard negative of the sample `id`."""

    id: str
    prompt: Prompt
    encoded: PreparedPrompt


_Keys: TypeAlias = tuple[Tensor, Tensor, Tensor]


def _keys(samples: Sequence[ContrastiveExample], found: Sequence[_Item]) -> _Keys:
    """Return keys of queries, of groups and of targets with hard negatives, int64 [N, 2] each."""
    queries = [one.query.content_key(content_hash, instruction=one.instruction) for one in samples]
    groups = [f"group {one.group}" if one.group else f"id {one.id}" for one in samples]
    targets = [one.prompt.content_key(content_hash) for one in found]
    return _hashed(queries), _hashed(groups), _hashed(targets)


def _hashed(texts: Sequence[str]) -> Tensor:
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
