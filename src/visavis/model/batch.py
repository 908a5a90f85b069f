"""What goes through the model: many sequences in one stream, no padding anywhere."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class PackedBatch:
    """Sequences laid end to end.

    Args:
        token_ids: int64 [T]; image positions hold the model's image token id.
        positions: int64 [T] (or [3, T] for M-RoPE), counted within each sequence.
        lengths: tokens of each sequence; they sum to T.
        image_positions: int64 [S], where in the stream image tokens go, in order.
        pixels: float [N, 3, size, size], the images in order of appearance; or
        features: float [N, P, W], the tower's features of those images, computed before; or
        image_tokens: float [N, P', D], the connector's output for them, computed before.
        image_means: float [N, W], with `image_tokens`: the mean tower feature of each image.
        labels: int64 [T], the token each position should predict next, -100 where none is.
    """

    token_ids: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    image_positions: Tensor | None = None
    pixels: Tensor | None = None
    features: Tensor | None = None
    image_tokens: Tensor | None = None
    image_means: Tensor | None = None
    labels: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    def to(self, device: torch.device | str) -> PackedBatch:
        """Return the batch with its tensors on a device."""
        moved: dict[str, Any] = {
            field.name: value.to(device)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)
