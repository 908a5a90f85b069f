"""TinyLLaVA's `resampler`, Flamingo's Perceiver: learned queries read any number of patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visavis.model.config import ConnectorConfig
from visavis.model.connectors.base import Connector
from visavis.model.layers import Linear

HEADS, HEAD_DIM = 8, 64


class Resampler(Connector):
    """Projects patches to the decoder's width; then the queries attend to them and themselves."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__(config)
        width = config.out_width
        self.queries = new_queries(config.num_queries, width, std=1.0)
        self.input = Linear(config.in_width, width)
        self.blocks = nn.ModuleList(ResamplerBlock(width) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, features: Tensor) -> Tensor:  # [V, P, W] -> [V, Q, D]
        features = self.input(features)
        queries = self.queries.expand(len(features), -1, -1)
        for block in self.blocks:
            queries = block(queries, features)
        return self.norm(queries)

    @staticmethod
    def num_tokens(config: ConnectorConfig, num_patches: int) -> int:
        return config.num_queries


class ResamplerBlock(nn.Module):
    """Pre-norm attention and feed-forward, no biases but in the norms."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inside = HEADS * HEAD_DIM
        self.feature_norm = nn.LayerNorm(width)
        self.query_norm = nn.LayerNorm(width)
        self.q = Linear(width, inside, bias=False)
        self.kv = Linear(width, 2 * inside, bias=False)
        self.out = Linear(inside, width, bias=False)
        self.ffn_norm = nn.LayerNorm(width)
        self.up = Linear(width, 4 * width, bias=False)
        self.down = Linear(4 * width, width, bias=False)

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:  # [V, Q, D], [V, P, D]
        normed = self.query_norm(queries)
        seen = torch.cat((self.feature_norm(features), normed), 1)  # [V, P + Q, D]
        keys, values = self.kv(seen).chunk(2, -1)
        queries = queries + self.out(attend_across(self.q(normed), keys, values, HEADS))
        return queries + self.down(F.gelu(self.up(self.ffn_norm(queries))))


def attend_across(queries: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """Let queries [V, Q, W] attend to keys and values [V, P, W], `heads` apart -> [V, Q, W]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (queries, keys, values))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def new_queries(number: int, width: int, std: float) -> nn.Parameter:
    """Return learned queries [number, width], normal unless on the meta device."""
    queries = torch.empty(number, width)
    return nn.Parameter(queries if queries.is_meta else queries.normal_(std=std))
