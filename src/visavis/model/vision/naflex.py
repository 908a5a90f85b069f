"""SigLIP 2's tower for images of any aspect ratio (NaFlex).

Takes the patches of all images as one stream, each image's rows one after another; learned
positions are resized to its rows and columns. Tschannen et al., "SigLIP 2" (2025).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visavis.model.attention import SequenceLayout
from visavis.model.embedder_config import NaFlexConfig
from visavis.model.layers import Linear
from visavis.model.vision.vit import AttentionPool, ViTBlock

Grid = tuple[int, int, int]  # frames, rows and columns of patches


class NaFlexTower(nn.Module):
    """Patch embedding, resized positions, blocks, final norm and attention pooling."""

    def __init__(self, config: NaFlexConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.patch = Linear(3 * config.patch_size**2, width)
        self.positions = nn.Parameter(torch.zeros(config.num_positions, width))
        self.blocks = nn.ModuleList(ViTBlock(config) for _ in range(config.num_layers))
        self.post_norm = nn.LayerNorm(width, config.norm_eps)
        self.pool = AttentionPool(config)

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Return the last hidden states after the final norm, [P, W].

        Args:
            patches: [P, 3 * patch_size²], of all frames of all images.
            grids: of each image or video; each frame is seen alone.
        """
        positions = [self._positions(*grid[1:]).repeat(grid[0], 1) for grid in grids]
        x = self.patch(patches) + torch.cat(positions)
        layout = SequenceLayout(frame_lengths(grids))
        for block in self.blocks:
            x = block(x, layout)
        found: Tensor = self.post_norm(x)
        return found

    def pooled(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Return one vector per frame, [sum of frames, W]."""
        frames = self(patches, grids).split(frame_lengths(grids))
        return torch.cat([self.pool(frame[None]) for frame in frames])

    def _positions(self, rows: int, columns: int) -> Tensor:
        """Return the learned positions on a grid, bilinear and antialiased, [rows * columns, W]."""
        side = round(len(self.positions) ** 0.5)
        image = self.positions.view(1, side, side, -1).permute(0, 3, 1, 2).float()
        image = F.interpolate(
            image, (rows, columns), mode="bilinear", align_corners=False, antialias=True
        )
        return image[0].flatten(1).T.to(self.positions.dtype)


def frame_lengths(grids: Sequence[Grid]) -> tuple[int, ...]:
    """Return the patches of each frame of each image or video."""
    return tuple(rows * columns for frames, rows, columns in grids for _ in range(frames))
