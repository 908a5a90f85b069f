"""Low-rank adapters on the decoder's linears (Hu et al. 2021), added for training; merged on load.

Each adapted linear computes W x + scale * B A x with W frozen. Tensors are named
`<linear>.lora_a` [r, in] and `<linear>.lora_b` [out, r], as `checkpoints/native.py` reads them.
Knows no objective and no optimiser.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visavis.errors import TrainError
from visavis.model.decoder import Decoder

TARGETS = ("qkv", "out", "up", "down")


class LoRALinear(nn.Linear):
    """A linear whose own weight is frozen; the adapter is float32 and computes in its dtype."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = scale
        self.lora_a = nn.Parameter(torch.empty(rank, linear.in_features))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.lora_a.to(x.dtype))  # [T, r]
        return super().forward(x) + self.scale * F.linear(low, self.lora_b.to(x.dtype))


def add_lora(
    decoder: Decoder, *, rank: int, scale: float, targets: Sequence[str] = TARGETS
) -> list[LoRALinear]:
    """Replace the named linears of every block by adapted ones; the output does not change yet.

    Raises:
        TrainError: a target names no linear of a block.
    """
    added = []
    for block in decoder.blocks:
        for target in targets:
            linear = getattr(block, target, None)
            if not isinstance(linear, nn.Linear):
                raise TrainError(
                    f"lora target {target!r} is no linear of a decoder block; "
                    f"expected some of {', '.join(TARGETS)}."
                )
            adapted = LoRALinear(linear, rank, scale)
            setattr(block, target, adapted)
            added.append(adapted)
    return added
