"""Qwen2-VL's merger: four neighbouring patches become one token.

The patches of one token are adjacent in the stream, so it can hold images of any size.
"""

from __future__ import annotations

from torch import Tensor, nn

from visavis.model.config import ConnectorConfig
from visavis.model.connectors.base import Connector
from visavis.model.connectors.mlp import mlp

NORM_EPS = 1e-6


class Merger(Connector):
    """A norm of each patch, a fold of shuffle x shuffle of them, two linear layers with GELU."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__(config)
        inside = config.in_width * config.shuffle**2
        self.norm = nn.LayerNorm(config.in_width, NORM_EPS)
        self.layers = mlp(inside, inside, config.out_width, depth=2)

    def forward(self, features: Tensor) -> Tensor:  # [V, P, W] -> [V, P / shuffle², D]
        folded = self.norm(features).unflatten(1, (-1, self.config.shuffle**2))
        return self.layers(folded.flatten(2))

    @staticmethod
    def num_tokens(config: ConnectorConfig, num_patches: int) -> int:
        return num_patches // config.shuffle**2
