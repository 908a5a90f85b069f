"""Linear layers whose weights stay 4-bit (or 8-bit) integers with a scale and minimum per group.

Two regimes on the CPU: decode is bound by memory, so PyTorch's packed int4 kernel reads the
integers; prefill and embedding are bound by arithmetic, so a bfloat16 copy of the weights goes
through the dense product. The caller says which (`packed_kernels`), never the number of rows: a
vector must not depend on what else is in its batch. Knows codes and scales, not their files.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP = 32
ROWS = 1024  # packed together: a multiple of the kernel's tiles, which are of 64 rows at most
_regime = threading.local()


@contextmanager
def packed_kernels() -> Iterator[None]:
    """Within this block, and in this thread, packed linears read their integers."""
    before, _regime.packed = decoding(), True
    try:
        yield
    finally:
        _regime.packed = before


def decoding() -> bool:
    """Return whether this thread is in a `packed_kernels` block: extending sequences by a token."""
    return bool(getattr(_regime, "packed", False))


class PackedLinear(nn.Module):
    """A linear layer without bias from group-wise integer codes.

    value = scale * code + minimum, codes 0 to 15. 8-bit codes are two 4-bit digits: the input is
    read twice, once against each digit, so their group scales stay exact too. A low-rank pair is
    added to the integers as it is, where merging would need more bits.
    """

    packed: Tensor
    scales: Tensor
    dense: Tensor
    low: Tensor | None
    high: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        minimum: Tensor,
        dense: Tensor,
        low_rank: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """
        Args:
            codes: uint8 [out, in], 0 to 15, or 0 to 255.
            scale, minimum: float32 [out, in / 32].
            dense: bfloat16 [out, in], the whole weight for prefill and embedding.
            low_rank: [r, in] and [out, r], whose product `dense` holds beyond the codes.
        """
        super().__init__()
        self.digits = 1 + (int(codes.max()) > 15)
        if self.digits == 2:  # 16 * high + low
            minimum = torch.cat((minimum, torch.zeros_like(minimum)), 1)
            scale = torch.cat((16 * scale, scale), 1)
        packed = _pack(codes, self.digits)
        # the kernel computes (code - 8) * scale + zero
        both = torch.stack((scale, minimum + 8 * scale), -1)  # [out, in / 32, 2]
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer(
            "scales", both.transpose(0, 1).contiguous().bfloat16(), persistent=False
        )
        self.register_buffer("dense", dense, persistent=False)
        assert low_rank is None or self.digits == 1
        low, high = low_rank if low_rank is not None else (None, None)
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("high", high, persistent=False)

    @property
    def num_weights(self) -> int:
        return self.dense.numel()

    @property
    def num_bytes(self) -> int:
        """What one product of a decoded token reads."""
        read = (self.packed, self.scales, self.low, self.high)
        return sum(part.nbytes for part in read if part is not None)

    def forward(self, x: Tensor) -> Tensor:  # bfloat16 [T, in] -> [T, out]
        if not getattr(_regime, "packed", False):
            return F.linear(x, self.dense)
        return self.product()(x)

    def product(self) -> Callable[[Tensor], Tensor]:
        """Return the packed product as a function, with the weights bound."""
        packed, scales, low, high = self.packed, self.scales, self.low, self.high
        kernel = torch.ops.aten._weight_int4pack_mm_for_cpu.default

        def base(x: Tensor) -> Tensor:
            return kernel(x, packed, GROUP, scales)

        if self.digits == 2:
            return lambda x: base(torch.cat((x, x), 1))
        if low is None or high is None:
            return base
        down, up = low.T, high.T
        return lambda x: torch.addmm(base(x), x @ down, up)


def _pack(codes: Tensor, digits: int) -> Tensor:
    """Return codes [out, in] as the kernel reads them, some rows at a time to take less memory."""
    width = codes.shape[1] * digits
    packed = torch.empty(len(codes), width // 2, dtype=torch.uint8)
    for some, place in zip(codes.split(ROWS), packed.split(ROWS), strict=True):
        parts = some if digits == 1 else torch.cat((some >> 4, some & 15), 1)
        place.copy_(torch.ops.aten._convert_weight_to_int4pack_for_cpu(parts.int(), 1))
    return packed
