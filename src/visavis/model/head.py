"""The embedding head: pooled hidden states to one unit vector per sequence.

    e = L2( Σ_kind W_kind · mean over that kind's tokens of [h_l1; h_l2; …] + b_kind )

The kinds are text and image tokens. A sequence with both sums their two projections. Knows which
rows belong to which sequence only through the indices it is given.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visavis.model.config import HeadConfig
from visavis.model.layers import Linear


class EmbeddingHead(nn.Module):
    """Two linear projections, one per kind of token."""

    def __init__(self, config: HeadConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.text = Linear(len(config.layers) * width, config.dim)
        self.image = Linear(len(config.layers) * width, config.dim)

    def forward(self, hidden: Tensor, lengths: tuple[int, ...], is_image: Tensor) -> Tensor:
        """Return unit vectors, float32 [B, dim].

        Args:
            hidden: chosen layers side by side, [T, layers * D].
            lengths: tokens of each sequence.
            is_image: bool [T].
        """
        total = hidden.new_zeros(len(lengths), self.config.dim)
        for projection, chosen in ((self.text, ~is_image), (self.image, is_image)):
            mean, present = mean_per_sequence(hidden, lengths, chosen)
            total = total + projection(mean) * present
        return F.normalize(total, dim=-1)


def mean_per_sequence(
    hidden: Tensor, lengths: tuple[int, ...], chosen: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the mean of chosen rows per sequence [B, C] and whether there were any [B, 1]."""
    owner = torch.repeat_interleave(
        torch.arange(len(lengths), device=hidden.device),
        torch.tensor(lengths, device=hidden.device),
    )
    sums = hidden.new_zeros(len(lengths), hidden.shape[1])
    sums = sums.index_add(0, owner[chosen], hidden[chosen])
    counts = torch.bincount(owner[chosen], minlength=len(lengths))[:, None].to(hidden.dtype)
    return sums / counts.clamp(min=1), (counts > 0).to(hidden.dtype)
