"""Connectors: tower features [N, P, W] to image tokens [N, P', D] in the decoder's width.

`linear` and `mlp` are LLaVA's projectors; pixel shuffle folds neighbouring patches first. Knows
neither where the features come from nor where the tokens go.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from visavis.model.config import ConnectorConfig
from visavis.model.layers import Linear


class Connector(nn.Module):
    """An optional fold and norm, then linear layers with exact GELU between them."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.config = config
        inside = config.in_width * config.shuffle**2
        hidden = config.hidden_width or config.out_width
        self.norm = nn.LayerNorm(inside) if config.input_norm else None
        depth = 1 if config.kind == "linear" else config.depth
        layers: list[nn.Module] = []
        for number in range(depth):
            outside = config.out_width if number == depth - 1 else hidden
            layers += [Linear(inside, outside), nn.GELU()]
            inside = outside
        self.layers = nn.Sequential(*layers[:-1])  # weights at 0, 2, 4 …, as in LLaVA

    def forward(self, features: Tensor) -> Tensor:
        if self.config.shuffle > 1:
            features = pixel_shuffle(features, self.config.shuffle)
        if self.norm is not None:
            features = self.norm(features)
        return self.layers(features)


def pixel_shuffle(features: Tensor, factor: int) -> Tensor:
    """Fold factor x factor neighbours into channels: [N, G * G, W] -> [N, g * g, W * factor²].

    A grid that does not divide is padded with zeros at the right and bottom, g = ceil(G / factor).
    """
    num, length, width = features.shape
    grid = round(length**0.5)
    side = -(-grid // factor)
    x = features.view(num, grid, grid, width)
    extra = side * factor - grid
    if extra:
        x = F.pad(x, (0, 0, 0, extra, 0, extra))
    x = x.view(num, side, factor, side, factor, width).transpose(2, 3)  # [N, g, g, f, f, W]
    return x.reshape(num, side * side, factor * factor * width)
