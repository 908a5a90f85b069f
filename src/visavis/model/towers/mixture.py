"""A mixture of two ViTs that see the same pixels (TinyLLaVA's `mof`: CLIP and DINOv2).

The pixels are normalised once, for the first of them. Knows no connector.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visavis.model.config import MixtureConfig
from visavis.model.towers.vit import ViT


class Mixture(nn.Module):
    """Hidden states of both towers side by side in the channels."""

    def __init__(self, config: MixtureConfig) -> None:
        super().__init__()
        self.config = config
        self.first, self.second = ViT(config.first), ViT(config.second)

    def forward(self, pixels: Tensor, layer: int = -1) -> Tensor:
        """Return hidden states [V, prefix + P, W1 + W2]; see `ViT`."""
        return torch.cat((self.first(pixels, layer), self.second(pixels, layer)), -1)
