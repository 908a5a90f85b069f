"""The identity and LLaVA's projectors: `linear`, and `mlp` of any depth; pixel shuffle first.

Each patch is projected separately, after pixel shuffle each block of neighbouring patches.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from visavis.model.config import ConnectorConfig
from visavis.model.connectors.base import Connector
from visavis.model.layers import Linear


class Identity(Connector):
    """Passes features on; the tower is as wide as the decoder."""

    def forward(self, features: Tensor) -> Tensor:
        return features


class MLP(Connector):
    """An optional fold and norm, then linear layers with exact GELU between them."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__(config)
        inside = config.in_width * config.shuffle**2
        self.norm = nn.LayerNorm(inside) if config.input_norm else None
        depth = 1 if config.kind in ("linear", "words") else config.depth
        # weights at 0, 2, 4 …, as in LLaVA
        hidden = config.hidden_width or config.out_width
        self.layers = mlp(inside, hidden, config.out_width, depth, bias=config.bias)

    def forward(self, features: Tensor) -> Tensor:
        if self.config.shuffle > 1:
            features = pixel_shuffle(features, self.config.shuffle)
        if self.norm is not None:
            features = self.norm(features)
        return self.layers(features)

    @staticmethod
    def num_tokens(config: ConnectorConfig, num_patches: int) -> int:
        if config.shuffle == 1:
            return num_patches
        side = -(-round(num_patches**0.5) // config.shuffle)
        return side * side


def mlp(inside: int, hidden: int, outside: int, depth: int, bias: bool = True) -> nn.Sequential:
    """Return `depth` linear layers with exact GELU between them."""
    layers: list[nn.Module] = []
    for number in range(depth):
        width = outside if number == depth - 1 else hidden
        layers += [Linear(inside, width, bias=bias), nn.GELU()]
        inside = width
    return nn.Sequential(*layers[:-1])


def pixel_shuffle(features: Tensor, factor: int) -> Tensor:
    """Fold factor x factor neighbours into channels: [V, G * G, W] -> [V, g * g, W * factor²].

    A grid that does not divide is padded with zeros at the right and bottom, g = ceil(G / factor).
    """
    num, length, width = features.shape
    grid = round(length**0.5)
    side = -(-grid // factor)
    x = features.view(num, grid, grid, width)
    extra = side * factor - grid
    if extra:
        x = F.pad(x, (0, 0, 0, extra, 0, extra))
    x = x.view(num, side, factor, side, factor, width).transpose(2, 3)  # [V, g, g, f, f, W]
    return x.reshape(num, side * side, factor * factor * width)
