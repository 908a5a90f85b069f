"""The vision tower of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images of any size as patches, rotary
positions on two axes.

Takes the patches of many images in one stream, in the order in which neighbours become one token
(see `processing/qwen2_vl.py`), and returns a hidden state in the same order. Attention is limited
to the patches of one image, or of a pair of frames in a video; in Qwen2.5-VL, except in a few
blocks, to squares of them. Qwen3-VL adds learned positions, stretched to each image, and takes
features after several blocks.
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
    """Pre-norm attention within each image or window and feed-forward, all with biases."""

    def __init__(self, config: Qwen2VLTowerConfig) -> None:
        super().__init__()
        width = config.width
        self.num_heads, self.gated = config.num_heads, config.gated_ffn
        norm = nn.RMSNorm if config.norm == "rms" else nn.LayerNorm
        self.attn_norm = norm(width, config.norm_eps)
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)
        self.ffn_norm = norm(width, config.norm_eps)
        self.up = Linear(width, config.ffn_width * (1 + config.gated_ffn))
        self.down = Linear(config.ffn_width, width)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], layout: SequenceLayout) -> Tensor:
        heads = self.num_heads
        qkv = self.qkv(self.attn_norm(x)).view(len(x), 3 * heads, -1)
        both, v = qkv.split((2 * heads, heads), 1)  # queries and keys stand side by side
        q, k = rotate(both.float(), *rotary).to(v.dtype).split(heads, 1)
        x = x + self.out(attend(q, k, v, layout, causal=False).flatten(1))
        hidden = self.up(self.ffn_norm(x))
        if self.gated:
            gate, hidden = hidden.chunk(2, -1)
            return x + self.down(self.activation(gate) * hidden)
        return x + self.down(self.activation(hidden))


class Qwen2VLTower(nn.Module):
    """Patch embedding and blocks; what follows the last block belongs to the connector."""

    def __init__(self, config: Qwen2VLTowerConfig) -> None:
        super().__init__()
        self.config = config
        self.patch = Linear(config.patch_width, config.width, bias=config.patch_bias)
        side = config.position_side
        self.positions = nn.Parameter(torch.zeros(side * side, config.width)) if side else None
        self.blocks = nn.ModuleList(Qwen2VLBlock(config) for _ in range(config.num_layers))

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Return features [P, W] of patches [P, C] of images one after another: the last hidden
        state; with `deepstack_blocks` [P, (1 + K) W], those of the K blocks beside it."""
        config = self.config
        x = self.patch(patches)
        if self.positions is not None:
            x = x + self.learned_positions(grids).to(x.dtype)
        rotary = self.rotary(grids, x.device)
        whole = SequenceLayout(
            tuple(rows * columns for time, rows, columns in grids for _ in range(time))
        )
        layout, order = whole, None
        if config.window:
            order, lengths = windows(grids, config.merge, config.window)
            order, layout = order.to(x.device), SequenceLayout(lengths)
            x, rotary = x[order], (rotary[0][order], rotary[1][order])
        features = []
        for number, block in enumerate(self.blocks):
            x = block(x, rotary, whole if number in config.full_blocks else layout)
            if number in config.deepstack_blocks:
                features.append(x)
        if order is not None:
            x = torch.empty_like(x).index_copy(0, order, x)
        return torch.cat((x, *features), -1) if features else x

    def rotary(self, grids: Sequence[Grid], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cos and signed sin, each float32 [P, 1, head_dim]: half turns by row, half by
        column."""
        share = self.config.width // self.config.num_heads // 2
        exponent = torch.arange(0, share, 2, dtype=torch.float32, device=device) / share
        places = torch.cat([patch_places(grid, self.config.merge) for grid in grids]).to(device)
        angles = places[:, :, None] * ROPE_BASE**-exponent  # [P, 2, head_dim / 4]
        return signed_tables(angles.flatten(1))

    def learned_positions(self, grids: Sequence[Grid]) -> Tensor:
        """Return the learned position of each patch, float32 [P, W]: bilinear between the four
        nearest of the table, whose corners are the image's corners."""
        assert self.positions is not None
        side, table = self.config.position_side, self.positions.float()
        found = []
        for grid in grids:
            places = patch_places(grid, self.config.merge).to(table.device)
            last = torch.tensor(grid[1:], device=table.device) - 1
            exact = places.float() * (side - 1) / last.clamp(min=1)  # [P, 2]
            low = exact.floor().long()
            share = exact - low
            rows, columns = (torch.stack((n, (n + 1).clamp(max=side - 1)), 1) for n in low.T)
            weights = [torch.stack((1 - n, n), 1) for n in share.T]
            corners = (rows[:, :, None] * side + columns[:, None]).flatten(1)  # [P, 4]
            shares = (weights[0][:, :, None] * weights[1][:, None]).flatten(1)
            found.append((table[corners] * shares[:, :, None]).sum(1))
        return torch.cat(found)


def patch_places(grid: Grid, merge: int) -> Tensor:
    """Return row and column of each patch, int64 [P, 2], in the order of the stream."""
    time, rows, columns = grid
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    places = places.view(rows // merge, merge, columns // merge, merge, 2).transpose(1, 2)
    return places.reshape(-1, 2).repeat(time, 1)


def windows(grids: Sequence[Grid], merge: int, side: int) -> tuple[Tensor, tuple[int, ...]]:
    """Return the patches of a stream in the order of windows, int64 [P], and the number of patches
    of each window.

    A window is a square of side x side tokens of one frame; those at the right and lower edge are
    what is left.
    """
    order, lengths, first = [], [], 0
    for time, rows, columns in grids:
        tall, wide = rows // merge, columns // merge
        tokens = torch.arange(first, first + time * tall * wide).view(time, tall, wide)
        for frame in tokens:
            cut = [part for band in frame.split(side) for part in band.split(side, 1)]
            order += [part.flatten() for part in cut]
            lengths += [part.numel() * merge**2 for part in cut]
        first += tokens.numel()
    within = torch.arange(merge**2)
    return (torch.cat(order)[:, None] * merge**2 + within).flatten(), tuple(lengths)
