"""TinyLLaVA's `mof_mlp`: two towers' features, each through an MLP of its own, interleaved."""

from __future__ import annotations

import torch
from torch import Tensor

from visavis.model.config import ConnectorConfig
from visavis.model.connectors.base import Connector
from visavis.model.connectors.mlp import mlp


class MixtureMLP(Connector):
    """Reads a mixture tower: its two halves stand side by side in the channels.

    Features (a0, b0) (a1, b1) … become tokens a0 b0 a1 b1 ….
    """

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__(config)
        half, width = config.in_width // 2, config.out_width
        self.first = mlp(half, width, width, config.depth)
        self.second = mlp(half, width, width, config.depth)

    def forward(self, features: Tensor) -> Tensor:  # [V, P, W] -> [V, 2 P, D]
        first, second = features.chunk(2, -1)
        return torch.stack((self.first(first), self.second(second)), 2).flatten(1, 2)

    @staticmethod
    def num_tokens(config: ConnectorConfig, num_patches: int) -> int:
        return 2 * num_patches
