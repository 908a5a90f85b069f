"""TinyLLaVA's `qformer`, BLIP-2's: a BERT of learned queries that reads patches every second block.

Only the path of the queries is implemented, without BLIP-2's text side and BERT's dropout.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from visavis.model.config import ConnectorConfig
from visavis.model.connectors.base import Connector
from visavis.model.connectors.resampler import attend_across, new_queries
from visavis.model.layers import Linear

HEAD_DIM = 64
NORM_EPS = 1e-12
QUERY_STD = 0.02
CROSS_EVERY = 2  # blocks 0, 2, 4 … read the patches


class QFormer(Connector):
    """Queries of `hidden_width` through `depth` blocks, then one linear layer to the decoder."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__(config)
        self.queries = new_queries(config.num_queries, config.hidden_width, QUERY_STD)
        self.blocks = nn.ModuleList(QFormerBlock(config, i) for i in range(config.depth))
        self.output = Linear(config.hidden_width, config.out_width)

    def forward(self, features: Tensor) -> Tensor:  # [V, P, W] -> [V, Q, D]
        queries = F.layer_norm(self.queries, self.queries.shape[-1:], eps=NORM_EPS)
        queries = queries.expand(len(features), -1, -1)
        for block in self.blocks:
            queries = block(queries, features)
        return self.output(queries)

    @staticmethod
    def num_tokens(config: ConnectorConfig, num_patches: int) -> int:
        return config.num_queries


class QFormerBlock(nn.Module):
    """Self-attention, cross-attention in every second block, feed-forward; a norm after each."""

    def __init__(self, config: ConnectorConfig, layer: int) -> None:
        super().__init__()
        width = config.hidden_width
        self.attention = Attention(width, width)
        reads = layer % CROSS_EVERY == 0
        self.cross_attention = Attention(width, config.in_width) if reads else None
        self.up = Linear(width, 4 * width)
        self.down = Linear(4 * width, width)
        self.norm = nn.LayerNorm(width, NORM_EPS)

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:  # [V, Q, H], [V, P, W]
        queries = self.attention(queries, queries)
        if self.cross_attention is not None:
            queries = self.cross_attention(queries, features)
        return self.norm(queries + self.down(F.gelu(self.up(queries))))


class Attention(nn.Module):
    """BERT's attention with its residual and norm."""

    def __init__(self, width: int, key_width: int) -> None:
        super().__init__()
        self.q = Linear(width, width)
        self.k = Linear(key_width, width)
        self.v = Linear(key_width, width)
        self.out = Linear(width, width)
        self.norm = nn.LayerNorm(width, NORM_EPS)

    def forward(self, queries: Tensor, seen: Tensor) -> Tensor:
        heads = queries.shape[-1] // HEAD_DIM
        mixed = attend_across(self.q(queries), self.k(seen), self.v(seen), heads)
        return self.norm(queries + self.out(mixed))
