"""Qwen2-VL's merger: four neighbouring patches become one token.

The patches of one token are adjacent in the stream, so it can hold images of any size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visavis.model.config import ConnectorConfig
from visavis.model.connectors.base import Connector
from visavis.model.connectors.mlp import mlp

NORM_EPS = 1e-6


class Merger(Connector):
    """A norm of each patch, a fold of shuffle x shuffle of them, two linear layers with GELU.

    With `deepstack` K there are K mergers more, whose norm follows the fold (Qwen3-VL): the
    features of K blocks of the tower, side by side with the last ones, become K tokens side by
    side with the first, [V, n, (1 + K) D]; see `VLM.embed_inputs`.
    """

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__(config)
        norm = nn.RMSNorm if config.rms_norm else nn.LayerNorm
        inside = config.in_width * config.shuffle**2
        self.norm = norm(config.in_width, config.norm_eps)
        self.layers = mlp(inside, inside, config.out_width, depth=2)
        self.deepstack = nn.ModuleList(_FoldedMerger(config) for _ in range(config.deepstack))

    def forward(self, features: Tensor) -> Tensor:  # [V, P, W] -> [V, P / shuffle², D]
        first, *others = features.chunk(1 + self.config.deepstack, -1)
        folded = _fold(self.norm(first), self.config)
        tokens = [self.layers(folded)]
        for merger, own in zip(self.deepstack, others, strict=True):
            tokens.append(merger(own))
        return torch.cat(tokens, -1) if others else tokens[0]

    @staticmethod
    def num_tokens(config: ConnectorConfig, num_patches: int) -> int:
        return num_patches // config.shuffle**2


class _FoldedMerger(nn.Module):
    """The merger of an inner block: the fold, a norm of it, two linear layers with GELU."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.config = config
        inside = config.in_width * config.shuffle**2
        self.norm = nn.LayerNorm(inside, NORM_EPS)
        self.layers = mlp(inside, inside, config.out_width, depth=2)

    def forward(self, features: Tensor) -> Tensor:  # [V, P, W] -> [V, P / shuffle², D]
        tokens: Tensor = self.layers(self.norm(_fold(features, self.config)))
        return tokens


def _fold(features: Tensor, config: ConnectorConfig) -> Tensor:
    """Return the patches of each token side by side, [V, P / shuffle², shuffle² W]."""
    return features.unflatten(1, (-1, config.shuffle**2)).flatten(2)
