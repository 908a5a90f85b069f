"""One linear layer on each side of frozen vectors, trained with InfoNCE: seconds, not hours.

Finds the projections W_i x + b_i and W_t y + b_t under which matching pictures and texts agree.
Used to start a connector, to fit the embedding head and as the baseline every model must beat.
Inputs are standardised for training; the returned layers take the raw vectors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visavis.train.objectives import Contrast, contrastive_loss


@dataclass(frozen=True)
class PairSettings:
    """How a pair of layers is trained; defaults are the baseline's."""

    dim: int = 256
    epochs: int = 20
    batch: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    dropout: float = 0.3
    logit_scale: float = 20.0
    alpha: float = 0.0
    seed: int = 0


@dataclass
class Pair:
    """Two affine maps from raw vectors to the shared space (not yet normalised)."""

    image_weight: Tensor  # [dim, image width]
    image_bias: Tensor  # [dim]
    text_weight: Tensor  # [dim, text width]
    text_bias: Tensor  # [dim]

    def images(self, x: Tensor) -> Tensor:
        return F.normalize(F.linear(x, self.image_weight, self.image_bias), dim=-1)

    def texts(self, y: Tensor) -> Tensor:
        return F.normalize(F.linear(y, self.text_weight, self.text_bias), dim=-1)


def fit_pair(
    images: Tensor,  # [V, N, image width]: V views of each picture
    texts: Tensor,  # [U, N, text width]: U texts of each picture
    settings: PairSettings,
    *,
    groups: Tensor | None = None,  # int64 [N]: pairs of one group are no negatives of each other
) -> Pair:
    """Train both layers; each step draws one view and one text of each picture."""
    generator = torch.Generator().manual_seed(settings.seed)
    image_scale, text_scale = _Scale(images), _Scale(texts)
    images, texts = image_scale(images), text_scale(texts)
    num_pairs = images.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        image_layer = nn.Linear(images.shape[-1], settings.dim)
        text_layer = nn.Linear(texts.shape[-1], settings.dim)
    parameters = [*image_layer.parameters(), *text_layer.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    batch = min(settings.batch, num_pairs)
    total = settings.epochs * (num_pairs // batch)
    step = 0
    for _ in range(settings.epochs):
        order = torch.randperm(num_pairs, generator=generator)
        for start in range(0, num_pairs - batch + 1, batch):
            chosen = order[start : start + batch]
            x = _draw(images, chosen, settings.dropout, generator)
            y = _draw(texts, chosen, settings.dropout, generator)
            excluded = None
            if groups is not None:
                excluded = groups[chosen][:, None] == groups[chosen][None]
            loss = contrastive_loss(
                F.normalize(text_layer(y), dim=-1),
                F.normalize(image_layer(x), dim=-1),
                Contrast(symmetric=True, alpha=settings.alpha),
                scale=settings.logit_scale,
                excluded=excluded,
            )
            rate = min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / total))
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * rate
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    return Pair(*image_scale.unfold(image_layer), *text_scale.unfold(text_layer))


def stack_pairs(pairs: list[Pair]) -> Pair:
    """Return one pair whose similarity is the mean of the given ones' (nearly: before L2)."""
    return Pair(
        torch.cat([pair.image_weight for pair in pairs]),
        torch.cat([pair.image_bias for pair in pairs]),
        torch.cat([pair.text_weight for pair in pairs]),
        torch.cat([pair.text_bias for pair in pairs]),
    )


class _Scale:
    """Standardises vectors, and folds that into a layer afterwards."""

    def __init__(self, vectors: Tensor) -> None:
        flat = vectors.flatten(0, -2)
        self.mean, self.deviation = flat.mean(0), flat.std(0) + 1e-4

    def __call__(self, vectors: Tensor) -> Tensor:
        return (vectors - self.mean) / self.deviation

    def unfold(self, layer: nn.Linear) -> tuple[Tensor, Tensor]:
        """Return weight and bias that take raw vectors."""
        weight = layer.weight.detach() / self.deviation
        return weight, layer.bias.detach() - weight @ self.mean


def _draw(vectors: Tensor, chosen: Tensor, dropout: float, generator: torch.Generator) -> Tensor:
    """Pick one of the views of each chosen pair and drop some of its numbers."""
    view = torch.randint(vectors.shape[0], (len(chosen),), generator=generator)
    picked = vectors[view, chosen]
    kept = torch.rand(picked.shape, generator=generator) >= dropout
    return picked * kept / (1 - dropout)
