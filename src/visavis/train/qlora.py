"""Frozen linears whose weights are 8- or 4-bit integers while adapters on them train (QLoRA).

Weights are symmetric integers with one scale per group of 64 in a row. Both directions of a step
turn them into numbers for the time of one product; nothing of it is kept for the way back. Knows
no adapter and no objective.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visavis.model.decoder import Decoder

GROUP = 64
LEVELS = {"int8": 127, "int4": 7}


class QuantizedLinear(nn.Module):
    """A frozen linear of integers; computes in the type of its input.

    `codes` is int8 [out, in], or for int4 uint8 [out, in / 2], two codes a byte.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear, kind: Literal["int8", "int4"]) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype, self.kind = linear.weight.dtype, kind
        self.bias = linear.bias
        grouped = F.pad(linear.weight.float(), (0, -self.in_features % GROUP))
        grouped = grouped.unflatten(1, (-1, GROUP))  # [out, groups, 64]
        level = LEVELS[kind]
        scales = (grouped.abs().amax(-1, keepdim=True) / level).clamp(min=1e-12)
        codes = (grouped / scales).round().clamp(-level, level).flatten(1).to(torch.int8)
        if kind == "int4":
            pairs = (codes + 8).to(torch.uint8).unflatten(1, (-1, 2))
            codes = pairs[..., 0] | pairs[..., 1] << 4
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales[..., 0].to(torch.bfloat16))

    @property
    def weight(self) -> Tensor:
        """The weight as numbers [out, in], made anew each time."""
        codes = self.codes
        if self.kind == "int4":
            codes = torch.stack((codes & 15, codes >> 4), -1).flatten(1).to(torch.int8) - 8
        numbers = codes.to(self.dtype).unflatten(1, (-1, GROUP)) * self.scales[..., None]
        return numbers.flatten(1)[:, : self.in_features].to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = _Product.apply(x, self)
        return product if self.bias is None else product + self.bias


class _Product(torch.autograd.Function):
    """x Wᵀ that does not keep W for the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: QuantizedLinear) -> Tensor:
        ctx.linear = linear
        return F.linear(x, linear.weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.linear.weight.to(gradient.dtype), None


def quantize_decoder(decoder: Decoder, kind: Literal["int8", "int4"]) -> None:
    """Replace every linear of every block by integers; embeddings and head stay as they are."""
    for block in decoder.blocks:
        for name, linear in list(block.named_children()):
            if isinstance(linear, nn.Linear):
                setattr(block, name, QuantizedLinear(linear, kind))
