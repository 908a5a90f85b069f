"""Packed batch: the model's input, many sequences in one stream without padding."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from visavis.model.image_input import ImageInput


@dataclass
class PackedBatch:
    """Sequences joined into one stream.

    Args:
        token_ids: int64 [T]; image positions hold the model's image token id.
        positions: int64 [T] (or [3, T] for M-RoPE), counted within each sequence.
        lengths: tokens of each sequence; they sum to T.
        image_positions: int64 [S], where in the stream image tokens go, in order.
        visuals: the N images and videos in order of appearance; or
        features: float [N, P, W], the tower's features of N images, computed before; or
        image_tokens: float [S, D], the tokens of all of them, computed before, with
        image_counts: how many of those belong to each, and
        image_means: float [N, W], the mean tower feature of each.
        labels: int64 [T], the token each position should predict next, -100 where none is.
    """

    token_ids: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    image_positions: Tensor | None = None
    visuals: tuple[ImageInput, ...] = ()
    features: Tensor | None = None
    image_tokens: Tensor | None = None
    image_counts: tuple[int, ...] = ()
    image_means: Tensor | None = None
    labels: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def owners(self) -> Tensor:
        """Which sequence each token belongs to, int64 [T]."""
        device = self.token_ids.device
        counts = torch.tensor(self.lengths, device=device)
        return torch.repeat_interleave(torch.arange(len(counts), device=device), counts)

    @property
    def is_image(self) -> Tensor:
        """Which tokens are image placeholders, bool [T]."""
        mask = torch.zeros_like(self.token_ids, dtype=torch.bool)
        if self.image_positions is not None:
            mask[self.image_positions] = True
        return mask

    @property
    def image_owners(self) -> Tensor:
        """Which sequence each image belongs to, int64 [N]; needs `image_tokens`."""
        if self.image_positions is None:
            return self.token_ids.new_zeros(0)
        assert self.image_counts
        firsts = torch.tensor((0, *self.image_counts[:-1]), device=self.token_ids.device).cumsum(0)
        return self.owners[self.image_positions[firsts]]

    def select(self, kept: Tensor) -> PackedBatch:
        """Return the batch of the sequences where `kept` (bool [B]) holds; needs `image_tokens`."""
        tokens = kept[self.owners]  # bool [T]
        lengths = [n for n, one in zip(self.lengths, kept.tolist(), strict=True) if one]
        chosen = replace(
            self,
            token_ids=self.token_ids[tokens],
            positions=self.positions[..., tokens],
            lengths=tuple(lengths),
        )
        images = kept[self.image_owners]  # bool [N]
        if not images.any():
            nothing: dict[str, Any] = dict.fromkeys(("image_positions", "image_tokens"))
            return replace(chosen, **nothing, image_counts=(), image_means=None)
        assert self.image_positions is not None and self.image_tokens is not None
        moved = tokens.cumsum(0) - 1  # where each kept token stands now
        means = None if self.image_means is None else self.image_means[images]
        rows = tokens[self.image_positions]  # bool [S]
        counts = zip(self.image_counts, images.tolist(), strict=True)
        return replace(
            chosen,
            image_positions=moved[self.image_positions[rows]],
            image_tokens=self.image_tokens[rows],
            image_counts=tuple(n for n, one in counts if one),
            image_means=means,
        )

    def between(self, start: int, end: int) -> PackedBatch:
        """Return the tokens from `start` to before `end` of a batch of one sequence; needs
        `image_tokens`."""
        assert len(self.lengths) == 1
        rest: dict[str, Any] = {
            "token_ids": self.token_ids[start:end],
            "positions": self.positions[..., start:end],
            "lengths": (end - start,),
        }
        if self.image_positions is not None and self.image_tokens is not None:
            kept = (self.image_positions >= start) & (self.image_positions < end)
            if not kept.any():
                rest |= dict.fromkeys(("image_positions", "image_tokens", "image_means"))
            else:
                rest["image_positions"] = self.image_positions[kept] - start
                rest["image_tokens"] = self.image_tokens[kept]
            rest["image_counts"] = ()  # an image may be cut in two
        return replace(self, **rest)

    def to(self, device: torch.device | str) -> PackedBatch:
        """Return the batch with its tensors on a device."""
        moved: dict[str, Any] = {
            field.name: value.to(device)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        moved["visuals"] = tuple(
            ImageInput(one.pixels.to(device), one.shape) for one in self.visuals
        )
        return replace(self, **moved)
