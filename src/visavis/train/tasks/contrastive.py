"""Symmetric InfoNCE with hardness weighting (LLaVE): matching text and picture attract.

    z_ij = k s_ij + [i != j] a sg(s_ij)        L = mean of both directions' cross entropy

`k` is the logit scale, `a` the hardness weight, `sg` stop-gradient. Knows neither the loop nor
where pairs come from beyond the pool it is given.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visavis.model.vlm import VLM
from visavis.processing.pack import pack
from visavis.train.examples import Encoder, Sampler, text_to_match

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


def hardness_weighted_infonce(
    queries: Tensor,  # [N, D], unit rows
    targets: Tensor,  # [N, D], unit rows
    *,
    logit_scale: float = 50.0,
    alpha: float = 9.0,
    excluded: Tensor | None = None,  # bool [N, N]: pairs that are no negatives
) -> Tensor:
    """Return the symmetric loss; float32 whatever the inputs are."""
    similarity = queries.float() @ targets.float().T  # [N, N]
    return loss_of_similarities(
        similarity, logit_scale=logit_scale, alpha=alpha, excluded=excluded
    ).mean()


def loss_of_similarities(
    similarity: Tensor, *, logit_scale: float, alpha: float, excluded: Tensor | None = None
) -> Tensor:
    """Return the losses of both directions, [2]: rows to columns, columns to rows."""
    off_diagonal = 1.0 - torch.eye(len(similarity), device=similarity.device)
    logits = logit_scale * similarity + alpha * off_diagonal * similarity.detach()
    if excluded is not None:
        logits = logits.masked_fill(excluded & off_diagonal.bool(), -torch.inf)
    rows = torch.arange(len(similarity), device=similarity.device)
    return torch.stack([F.cross_entropy(logits, rows), F.cross_entropy(logits.T, rows)])


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
        loss = hardness_weighted_infonce(
            vlm.embed(text_batch.to(device)),
            vlm.embed(picture_batch.to(device)),
            logit_scale=self.settings.logit_scale,
            alpha=self.settings.alpha,
            excluded=groups[:, None] == groups[None],
        )
        tokens = text_batch.num_tokens + picture_batch.num_tokens
        yield "contrastive", self.settings.weight * loss, tokens

    def state(self) -> dict[str, Any]:
        return {"sampler": self.sampler.state(), "draw": self.draw.getstate()}

    def restore(self, state: dict[str, Any]) -> None:
        self.sampler.restore(state["sampler"])
        self.draw.setstate(state["draw"])
