"""EmbeddingGemma 2's connector: squares of patches averaged, scaled, normalised and projected."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from visavis.model.config import ConnectorConfig
from visavis.model.connectors.base import Connector
from visavis.model.layers import Linear

EPS = 1e-6


class PooledProjection(Connector):
    """The patches of a square stand next to one another, as in Qwen2-VL's stream."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__(config)
        self.layer = Linear(config.in_width, config.out_width, bias=False)

    def forward(self, features: Tensor) -> Tensor:  # [V, P, W] -> [V, P / shuffle², D]
        width = features.shape[-1]
        squares = features.unflatten(1, (-1, self.config.shuffle**2)).float().mean(2)
        normed = F.rms_norm(squares * width**0.5, (width,), eps=EPS)
        tokens: Tensor = self.layer(normed.to(self.layer.weight.dtype))
        return tokens

    @staticmethod
    def num_tokens(config: ConnectorConfig, num_patches: int) -> int:
        return num_patches // config.shuffle**2
