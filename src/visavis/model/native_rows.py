"""Rows of integers as the compiled kernels read them: GGUF's blocks, sixteen rows interleaved.

A value is exactly what the GGUF block of the same type stores. Activations are rounded to 8 bits,
32 to a scale, and multiplied as integers; each row of a product is bitwise what it is alone. Knows
blocks, not the files they come from; the layout is in `native/csrc/formats.h`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from visavis.native.library import FORMATS, NOT_FINITE, Linear, Matrix, check, native

BLOCK_ROWS = 16
GROUP = 32
PLAIN = {torch.float32: "F32", torch.bfloat16: "BF16"}
TILE = 1 << 20  # weights that are floating-point at a time: they stay in the processor's cache
KINDS = tuple(kind for kind in FORMATS if kind not in ("F32", "BF16"))
OWN = {4: "Q4_1", 8: "A8"}  # what groups of ours become; A8: signed 8 bits, a scale and a minimum


def library() -> ctypes.CDLL:
    """Return the compiled library where it is known to be there."""
    found = native()
    assert found is not None
    return found


def can_pack(kind: str, in_features: int) -> bool:
    """Return whether rows of a GGUF type can be `NativeRows` here."""
    found = native()
    return (
        found is not None
        and kind in KINDS
        and found.vv_packed_bytes(FORMATS[kind], 1, in_features) > 0
    )


class NativeRows(nn.Module):
    """Rows of one GGUF type, interleaved.

    Args:
        kind: one of `KINDS`.

    Raises:
        ValueError: rows of this type cannot have `in_features` numbers.
    """

    data: Tensor

    def __init__(self, num_rows: int, in_features: int, kind: str) -> None:
        super().__init__()
        self.num_rows, self.in_features, self.kind = num_rows, in_features, kind
        self.finite = True
        size = library().vv_packed_bytes(FORMATS[kind], num_rows, in_features)
        if not size:
            raise ValueError(f"rows of {in_features} numbers cannot be {kind}")
        # The kernels read from multiples of 64 bytes, where PyTorch's memory begins on a CPU.
        data = torch.empty(size, dtype=torch.uint8)
        data[-(size // -(-num_rows // BLOCK_ROWS)) :] = 0  # the last block may have fewer rows
        self.register_buffer("data", data, persistent=False)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def fill(self, start: int, address: int, stride: int, count: int) -> None:
        """Set `count` rows from `start`. Scales that are no finite numbers set `finite` to False.

        Args:
            address: of their GGUF blocks; rows are `stride` bytes apart.
        """
        assert 0 <= start <= start + count <= self.num_rows
        format, out = FORMATS[self.kind], self.data.data_ptr()
        error = library().vv_pack(format, self.in_features, address, stride, start, count, out)
        if error == NOT_FINITE:
            self.finite = False
        else:
            check(error)

    def matrix(self) -> Matrix:
        """Return the description that the kernels take. It points into this module's memory."""
        return Matrix(self.data.data_ptr(), self.num_rows, self.in_features, FORMATS[self.kind], 0)

    def values(self, numbers: Tensor) -> Tensor:
        """Return rows by their numbers, int64 [n] -> float32 [n, in].

        Raises:
            IndexError: a number is not that of a row.
        """
        numbers = numbers.contiguous()
        out = torch.empty(len(numbers), self.in_features)
        if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < self.num_rows:
            raise IndexError(f"row numbers must be from 0 to {self.num_rows - 1}")
        matrix, where = ctypes.byref(self.matrix()), numbers.data_ptr()
        check(library().vv_unpack(matrix, where, len(numbers), out.data_ptr(), None, None, None))
        return out

    def codes(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return rows as they are stored: value = scale * code + minimum.

        Returns:
            Codes, uint8 [n, in], signed ones of 8 bits as their bytes; scales and minimums of 16
            numbers each, float32 [n, in / 16].
        """
        count = len(numbers)
        codes = torch.empty(count, self.in_features, dtype=torch.uint8)
        scales, minimums = (torch.empty(count, self.in_features // 16) for _ in range(2))
        matrix, found = ctypes.byref(self.matrix()), (codes, scales, minimums)
        addresses = [tensor.data_ptr() for tensor in found]
        where = numbers.contiguous()
        check(library().vv_unpack(matrix, where.data_ptr(), count, None, *addresses))
        return found

    def tiles(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield the weights of some rows after another, transposed [in, n]."""
        step = max(1, TILE // self.in_features)
        for start in range(0, self.num_rows, step):
            numbers = torch.arange(start, min(start + step, self.num_rows))
            yield self.values(numbers).to(dtype).T


class NativeProduct:
    """The product with rows below one another, their bias and low-rank pair added.

    Args:
        low_rank: [r, in] and [out, r], of one of the types of `PLAIN`.
    """

    def __init__(
        self,
        rows: Sequence[NativeRows],
        bias: Tensor | None = None,
        low_rank: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.linear, self.kept = linear_of([part.matrix() for part in rows], bias, low_rank)
        self.kept += (*rows,)
        self.in_features = rows[0].in_features
        self.num_rows = sum(part.num_rows for part in rows)

    def __call__(self, x: Tensor) -> Tensor:  # [T, in] -> float32 [T, rows]
        assert x.shape[1] == self.in_features
        x = x.detach().float().contiguous()
        y = torch.empty(len(x), self.num_rows)
        threads = torch.get_num_threads()
        linear = ctypes.byref(self.linear)
        check(library().vv_product(linear, x.data_ptr(), len(x), y.data_ptr(), threads))
        return y


def plain_matrix(weight: Tensor) -> Matrix:
    """Return a weight [out, in] as it lies in memory, for as long as it does."""
    assert weight.is_contiguous()
    return Matrix(weight.data_ptr(), *weight.shape, FORMATS[PLAIN[weight.dtype]], 0)


def linear_of(
    matrices: Sequence[Matrix],
    bias: Tensor | None,
    low_rank: tuple[Tensor, Tensor] | None,
) -> tuple[Linear, tuple[object, ...]]:
    """Return a linear for the kernels, and what must stay for as long as it is used."""
    parts = (Matrix * len(matrices))(*matrices)
    if bias is not None:
        bias = bias.detach().float().contiguous()
    linear = Linear(parts, len(matrices), None if bias is None else bias.data_ptr())
    kept: tuple[object, ...] = (bias, low_rank)
    if low_rank is not None:
        low, high = (tensor.detach().contiguous() for tensor in low_rank)
        kept = (bias, low, high)
        linear.low, linear.high = (ctypes.pointer(plain_matrix(one)) for one in (low, high))
    return linear, kept


def blocks_of(codes: Tensor, scale: Tensor, minimum: Tensor, bits: int) -> Tensor:
    """Return value = scale * code + minimum as blocks of `OWN[bits]`, uint8 [n, bytes].

    Args:
        codes: uint8 [n, in].
        scale, minimum: float32 [n, in / group], a group being a multiple of 32.
    """
    count, groups = len(codes), codes.shape[1] // GROUP
    if bits == 8:  # signed in the blocks
        minimum = minimum + 128 * scale
    repeats = groups // scale.shape[1]
    halves = [
        one.repeat_interleave(repeats, 1).half()[..., None].view(torch.uint8)
        for one in (scale, minimum)
    ]
    grouped = codes.view(count, groups, GROUP)
    if bits == 8:
        packed = grouped ^ 128
    else:
        packed = grouped[..., : GROUP // 2] | grouped[..., GROUP // 2 :] << 4
    return torch.cat((*halves, packed), -1).flatten(1)
