"""RICE-ViT, the vision tower of LLaVA-OneVision-1.5: Qwen2-VL's, with a class token before each
image or frame, and a norm before the first block.

The class token's place is a learned vector of angles. It is read by its patches and left out of
what the tower returns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from visavis.model.attention import SequenceLayout
from visavis.model.config import Qwen2VLTowerConfig
from visavis.model.rope import signed_tables
from visavis.model.vision.qwen2_vl import Grid, Qwen2VLTower


class RiceTower(Qwen2VLTower):
    """Patch embedding, class token, norm and blocks."""

    def __init__(self, config: Qwen2VLTowerConfig) -> None:
        super().__init__(config)
        angles = config.width // config.num_heads // 2
        self.class_token = nn.Parameter(torch.zeros(config.width))
        self.class_angles = nn.Parameter(torch.zeros(angles))
        self.pre_norm = nn.LayerNorm(config.width, config.norm_eps)

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Return the last hidden state, [P, W], of patches [P, C] of images one after another."""
        lengths = [rows * columns for time, rows, columns in grids for _ in range(time)]
        first = self.class_token[None]
        x = self.pre_norm(_before_each(first, self.patch(patches), lengths))
        angles = signed_tables(self.class_angles.float()[None])
        tables = self.rotary(grids, x.device)
        cos, sin = (
            _before_each(own, table, lengths) for own, table in zip(angles, tables, strict=True)
        )
        layout = SequenceLayout(tuple(length + 1 for length in lengths))
        for block in self.blocks:
            x = block(x, (cos, sin), layout)
        return torch.cat([frame[1:] for frame in x.split(list(layout.lengths))])


def _before_each(first: Tensor, rows: Tensor, lengths: Sequence[int]) -> Tensor:
    """Put one row before each run of rows."""
    return torch.cat([part for run in rows.split(list(lengths)) for part in (first, run)])
