"""Qwen2-VL's vision tower: images of any size as patches, rotary positions on two axes.

Takes the patches of many images in one stream, in the order in which neighbours become one token
(see `processing/qwen2_vl.py`), and returns a hidden state in the same order. Attention is limited
to the patches of one image, or of a pair of frames in a video.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from visavis.model.attention import SequenceLayout, attend
from visavis.model.config import Qwen2VLTowerConfig
from visavis.model.decoder import ACTIVATIONS
from visavis.model.layers import Linear
from visavis.model.rope import rotate, signed_tables

ROPE_BASE = 10000.0

Grid = tuple[int, int, int]  # of one image or video: temporal patches, rows, columns


class Qwen2VLBlock(nn.Module):
    """Pre-norm attention within each image and feed-forward, all with biases."""

    def __init__(self, config: Qwen2VLTowerConfig) -> None:
        super().__init__()
        width = config.width
        self.num_heads = config.num_heads
        self.attn_norm = nn.LayerNorm(width, config.norm_eps)
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)
        self.ffn_norm = nn.LayerNorm(width, config.norm_eps)
        self.up = Linear(width, config.ffn_width)
        self.down = Linear(config.ffn_width, width)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], layout: SequenceLayout) -> Tensor:
        heads = self.num_heads
        qkv = self.qkv(self.attn_norm(x)).view(len(x), 3 * heads, -1)
        both, v = qkv.split((2 * heads, heads), 1)  # queries and keys stand side by side
        q, k = rotate(both.float(), *rotary).to(v.dtype).split(heads, 1)
        x = x + self.out(attend(q, k, v, layout, causal=False).flatten(1))
        return x + self.down(self.activation(self.up(self.ffn_norm(x))))


class Qwen2VLTower(nn.Module):
    """Patch embedding and blocks; what follows the last block belongs to the connector."""

    def __init__(self, config: Qwen2VLTowerConfig) -> None:
        super().__init__()
        self.config = config
        self.patch = Linear(config.patch_width, config.width, bias=False)
        self.blocks = nn.ModuleList(Qwen2VLBlock(config) for _ in range(config.num_layers))

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Return the last hidden state, [P, W], of patches [P, C] of images one after another."""
        x = self.patch(patches)
        rotary = self.rotary(grids, x.device)
        layout = SequenceLayout(
            tuple(rows * columns for time, rows, columns in grids for _ in range(time))
        )
        for block in self.blocks:
            x = block(x, rotary, layout)
        return x

    def rotary(self, grids: Sequence[Grid], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cos and signed sin, each float32 [P, 1, head_dim]: half turns by row, half by
        column."""
        share = self.config.width // self.config.num_heads // 2
        exponent = torch.arange(0, share, 2, dtype=torch.float32, device=device) / share
        places = torch.cat([patch_places(grid, self.config.merge) for grid in grids]).to(device)
        angles = places[:, :, None] * ROPE_BASE**-exponent  # [P, 2, head_dim / 4]
        return signed_tables(angles.flatten(1))


def patch_places(grid: Grid, merge: int) -> Tensor:
    """Return row and column of each patch, int64 [P, 2], in the order of the stream."""
    time, rows, columns = grid
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    places = places.view(rows // merge, merge, columns // merge, merge, 2).transpose(1, 2)
    return places.reshape(-1, 2).repeat(time, 1)
