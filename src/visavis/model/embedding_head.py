"""Embedding head: pooled hidden states to one unit vector per sequence.

    e = L2( Σ_kind W_kind · mean over that kind's tokens of [h_l1; h_l2; …] + b_kind )

The kinds are text and image tokens. A sequence with both sums their two projections. The image
side may read the mean feature of the vision tower instead of hidden states, and the text side the
vector of a text tower (a dual encoder). The caller computes the means.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visavis.model.config import HeadConfig
from visavis.model.layers import Linear

Pooled = tuple[Tensor, Tensor]  # means [B, C], and 1 or 0 for whether there is one [B, 1]


class ClassNames(nn.Module):
    """From a tower's mean feature x to the names of what its classifier recognises, and more.

        p = softmax((C x + c) / temperature), the `top` largest, renormalised to 1
        v = L2(p N) + W x + b

    C and c are the tower's own classifier, N holds a text vector of each class name; W and b are
    learned. Classes that no training image shows keep the place that their names give them, as in
    ConSE (Norouzi et al., "Zero-Shot Learning by Convex Combination of Semantic Embeddings", 2014).
    """

    temperature = 2.0
    top = 20

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.classify = Linear(config.tower_width, config.num_classes)
        self.names = nn.Parameter(torch.zeros(config.num_classes, config.dim))
        self.learned = Linear(config.tower_width, config.dim)

    def forward(self, x: Tensor) -> Tensor:  # [B, tower_width] -> [B, dim], not normalised
        return self.named(x) + self.learned(x)

    def named(self, x: Tensor) -> Tensor:
        """Return the mean of the likeliest classes' names by their probability, normalised."""
        scores = (self.classify(x) / self.temperature).softmax(-1)
        likely = scores.topk(min(self.top, scores.shape[-1]), -1)
        weights = likely.values / likely.values.sum(-1, keepdim=True)
        names: Tensor = self.names[likely.indices]  # [B, top, dim]
        return F.normalize((weights[..., None] * names).sum(1), dim=-1)


class EmbeddingHead(nn.Module):
    """Two linear projections, one per kind of token."""

    def __init__(self, config: HeadConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.text = Linear(config.text_width or len(config.layers) * width, config.dim)
        self.image: nn.Module = Linear(config.tower_width or len(config.layers) * width, config.dim)
        if config.num_classes:
            self.image = ClassNames(config)

    def forward(self, text: Pooled, image: Pooled) -> Tensor:
        """Return unit vectors, float32 [B, dim], of what was pooled per sequence."""
        with torch.autocast(text[0].device.type, enabled=False):  # vectors stay float32
            projected = self.text(text[0]) * text[1] + self.image(image[0]) * image[1]
            return F.normalize(projected, dim=-1)


class DualHead(nn.Module):
    """Projections of a dual encoder without decoder, and the scale of its cosines.

    CLIP projects both sides; SigLIP only texts, with a bias, and its scores have one too.
    """

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        sigmoid = config.scores == "sigmoid"
        self.text = Linear(config.text_width, config.dim, bias=sigmoid)
        self.image = None if sigmoid else Linear(config.tower_width, config.dim, bias=False)
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.logit_bias = nn.Parameter(torch.zeros(())) if sigmoid else None

    def texts(self, states: Tensor) -> Tensor:
        """Return unit vectors of the text tower's states, float32 [B, dim]."""
        return F.normalize(self.text(states), dim=-1)

    def images(self, features: Tensor) -> Tensor:
        """Return unit vectors of the vision tower's pooled features, float32 [V, dim]."""
        return F.normalize(features if self.image is None else self.image(features), dim=-1)

    def probabilities(self, cosines: Tensor) -> Tensor:
        """Return how likely each text is to belong to an image, from cosines [images, texts].

        CLIP: softmax(e^s cos) over the texts. SigLIP: sigmoid(e^s cos + b) of each pair.
        """
        logits = cosines * self.logit_scale.exp()
        if self.logit_bias is None:
            return logits.softmax(-1)
        return (logits + self.logit_bias).sigmoid()


def mean_per_group(rows: Tensor, owners: Tensor, num: int) -> Pooled:
    """Return the mean of each group's rows and whether it has any.

    Args:
        rows: [M, C].
        owners: int64 [M], the group of each row, 0 to `num` - 1.
    """
    sums = rows.new_zeros(num, rows.shape[1]).index_add(0, owners, rows)
    counts = torch.bincount(owners, minlength=num)[:, None].to(rows.dtype)
    return sums / counts.clamp(min=1), (counts > 0).to(rows.dtype)
