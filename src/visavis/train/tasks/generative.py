"""Next-token loss on answers and captions. Only learned positions reach the vocabulary matrix."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visavis.model.batch import PackedBatch
from visavis.model.vlm import VLM
from visavis.processing.pack import next_token_labels, pack
from visavis.train.examples import Example, Sampler
from visavis.train.features import TowerFeatures


def next_token_loss(vlm: VLM, batch: PackedBatch) -> Tensor:
    """Return the mean cross entropy over positions whose label is not -100."""
    assert batch.labels is not None
    hidden = vlm(batch)[-1]  # [T, D]
    learned = batch.labels != -100
    return F.cross_entropy(vlm.decoder.logits(hidden[learned]), batch.labels[learned])


def pack_examples(
    examples: Sequence[Example], features: TowerFeatures | None, device: torch.device
) -> PackedBatch:
    """Lay examples end to end, with labels and the stored features of their pictures."""
    encoded = [example.encoded for example in examples]
    batch = pack(encoded)
    batch.labels = next_token_labels(encoded)
    rows = [example.row for example in examples if example.row is not None]
    if rows:
        assert features is not None
        batch.features = features[rows]
    return batch.to(device)


class GenerativeTask:
    """Packs drawn conversations up to a number of tokens."""

    def __init__(
        self,
        pools: Mapping[str, Sequence[Sequence[Example]]],
        weights: Mapping[str, float],
        features: TowerFeatures | None,
        *,
        tokens: int,
        weight: float,
        seed: int,
    ) -> None:
        """
        Args:
            pools: per source, examples; each is a list of variants (plain and mirrored picture)
                of which a draw takes one.
        """
        self.pools, self.features = pools, features
        self.tokens, self.weight = tokens, weight
        self.sampler = Sampler({name: len(pool) for name, pool in pools.items()}, weights, seed)
        self.variant = random.Random(seed + 1)

    def losses(self, vlm: VLM) -> Iterator[tuple[str, Tensor, int]]:
        examples: list[Example] = []
        used = 0
        while used < self.tokens:
            name, number = self.sampler.next()
            example = self.variant.choice(self.pools[name][number])
            examples.append(example)
            used += len(example.encoded.token_ids)
        batch = pack_examples(examples, self.features, vlm.decoder.embed.weight.device)
        yield "generative", self.weight * next_token_loss(vlm, batch), used

    def state(self) -> dict[str, Any]:
        return {"sampler": self.sampler.state(), "variant": self.variant.getstate()}

    def restore(self, state: dict[str, Any]) -> None:
        self.sampler.restore(state["sampler"])
        self.variant.setstate(state["variant"])
