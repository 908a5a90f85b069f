"""The embedding head: pooled hidden states to one unit vector per sequence.

    e = L2( Σ_kind W_kind · mean over that kind's tokens of [h_l1; h_l2; …] + b_kind )

The kinds are text and image tokens. A sequence with both sums their two projections. The image
side may also read the mean feature of the vision tower. Knows which rows belong to which sequence
only through the indices it is given.
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
        self.image = Linear(len(config.layers) * width + config.tower_width, config.dim)

    def forward(
        self,
        hidden: Tensor,
        lengths: tuple[int, ...],
        is_image: Tensor,
        tower_means: Tensor | None = None,
    ) -> Tensor:
        """Return unit vectors, float32 [B, dim].

        Args:
            hidden: chosen layers side by side, [T, layers * D].
            lengths: tokens of each sequence.
            is_image: bool [T].
            tower_means: mean tower feature of each sequence's images [B, tower_width], where the
                config asks for it.
        """
        text, has_text = mean_per_sequence(hidden, lengths, ~is_image)
        image, has_image = mean_per_sequence(hidden, lengths, is_image)
        if self.config.tower_width:
            if tower_means is None:  # text alone
                tower_means = image.new_zeros(len(lengths), self.config.tower_width)
            image = torch.cat((image, tower_means), 1)
        return F.normalize(self.text(text) * has_text + self.image(image) * has_image, dim=-1)


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
