"""Matching text and picture attract: the loss of `objectives.py` on drawn records.

Knows neither the loop nor where pairs come from beyond the pool it is given.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from visavis.model.vlm import VLM
from visavis.processing.pack import pack
from visavis.train.examples import Encoder, Sampler, text_to_match
from visavis.train.objectives import Contrast, contrastive_loss

if TYPE_CHECKING:
    from visavis.data.records import Record
    from visavis.train.features import TowerFeatures
    from visavis.train.recipe import Contrastive


@dataclass(frozen=True)
class Matched:
    """A record with the feature rows of its picture (plain, perhaps mirrored).

    Records of one `group` describe the same thing and are no negatives of each other.
    """

    record: Record
    rows: tuple[int, ...]
    group: str


class ContrastiveTask:
    """Draws records and matches one text of each with its picture, both ways."""

    def __init__(
        self,
        pools: Mapping[str, Sequence[Matched]],
        weights: Mapping[str, float],
        features: TowerFeatures,
        encoder: Encoder,
        *,
        settings: Contrastive,
        seed: int,
    ) -> None:
        self.pools, self.features, self.encoder = pools, features, encoder
        self.settings = settings
        self.sampler = Sampler({name: len(pool) for name, pool in pools.items()}, weights, seed)
        self.draw = random.Random(seed + 1)

    def losses(self, vlm: VLM) -> Iterator[tuple[str, Tensor, int]]:
        drawn = [self.sampler.next() for _ in range(self.settings.pairs)]
        chosen = [self.pools[name][number] for name, number in drawn]
        texts = [
            self.encoder.text(text_to_match(one.record, self.draw), self.settings.max_text_tokens)
            for one in chosen
        ]
        pictures = [self.encoder.picture()] * len(chosen)
        text_batch, picture_batch = pack(texts), pack(pictures)
        picture_batch.features = self.features[[self.draw.choice(one.rows) for one in chosen]]
        device = vlm.decoder.embed.weight.device
        owner = {key: n for n, key in enumerate({one.group for one in chosen})}
        groups = torch.tensor([owner[one.group] for one in chosen], device=device)
        loss = contrastive_loss(
            vlm.embed(text_batch.to(device)),
            vlm.embed(picture_batch.to(device)),
            Contrast(symmetric=True, alpha=self.settings.alpha),
            scale=self.settings.logit_scale,
            excluded=groups[:, None] == groups[None],
        )
        tokens = text_batch.num_tokens + picture_batch.num_tokens
        yield "contrastive", self.settings.weight * loss, tokens

    def state(self) -> dict[str, Any]:
        return {"sampler": self.sampler.state(), "draw": self.draw.getstate()}

    def restore(self, state: dict[str, Any]) -> None:
        self.sampler.restore(state["sampler"])
        self.draw.setstate(state["draw"])
