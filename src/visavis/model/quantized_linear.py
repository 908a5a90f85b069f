"""Quantized linear layers and embeddings: weights of 4 or 8 bits in groups of 32 or 64.

There are two kernels on the CPU. Decode has few rows, so PyTorch's packed int4 kernel multiplies
the integers directly. Prefill and embedding have many, so weights are converted to floating-point,
a tile at a time (`QuantizedRows.tiles`) or, in small models, once (`QuantizedLinear.dense`), and
go through the dense product. The caller chooses the kernel (`packed_kernels`), independent of the
number of rows: they round differently, and a result must not depend on the rest of its batch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visavis.model.native_rows import NativeProduct, NativeRows, blocks_of

GROUP = 32
ROWS = 64  # packed rows start at multiples of this: whole blocks of the kernel, on any processor
TILE = 1 << 20  # weights that are floating-point at a time: they stay in the processor's cache
_regime = threading.local()

Product = Callable[[Tensor], Tensor]


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


class Groups(NamedTuple):
    """Rows of integers, some of a row to a group.

        4 bits: value = scale * (code - 8) + zero
        8 bits: value = scale * (code - 136) + 17 * zero

    The second is what two 4-bit digits give, 16 * (high - 8) + (low - 8), that share scale and
    zero. Both are stored in bfloat16, as the packed kernel reads them.
    """

    codes: Tensor  # uint8 [n, in]
    scales: Tensor  # bfloat16 [n, in / group, 2]: scale, zero
    bits: int

    @staticmethod
    def of(codes: Tensor, scale: Tensor, minimum: Tensor, bits: int) -> Groups:
        """Return groups of value = scale * code + minimum, both float32 [n, in / group]."""
        zero = (minimum + (8 if bits == 4 else 136) * scale) / (1 if bits == 4 else 17)
        return Groups(codes, torch.stack((scale, zero), -1).bfloat16(), bits)

    @property
    def group(self) -> int:
        return self.codes.shape[1] // self.scales.shape[1]

    def between(self, start: int, end: int) -> Groups:
        return Groups(self.codes[start:end], self.scales[start:end], self.bits)

    def affine(self) -> tuple[Tensor, Tensor]:
        """Return scale and minimum of value = scale * code + minimum, float32 [n, in / group]."""
        scale, zero = self.scales.float().unbind(-1)
        return scale, zero - 8 * scale if self.bits == 4 else 17 * zero - 136 * scale

    def values(self) -> Tensor:
        """Return the rows, float32 [n, in]."""
        scale, minimum = self.affine()
        grouped = self.codes.float().unflatten(1, (scale.shape[1], -1))
        return torch.addcmul(minimum[..., None], grouped, scale[..., None]).flatten(1)


def quantize(values: Tensor, bits: int, group: int = GROUP) -> Groups:
    """Return rows [n, in] as integers: each group's numbers on an even grid from its smallest to
    its largest. Codes are rounded for scales as they are stored."""
    grouped = values.float().unflatten(1, (-1, group))
    low, high = grouped.aminmax(dim=-1)
    top = 2**bits - 1
    scale = (high - low) / (15 if bits == 4 else 254.5)  # room for the rounding of 8 bits' scales
    empty = torch.empty(0, dtype=torch.uint8)
    stored = Groups.of(empty, scale, (low + high - top * scale) / 2, bits)
    scale, minimum = stored.affine()
    inverse = torch.where(scale > 0, 1 / scale, 0)  # groups of one number are their minimum
    codes = (grouped - minimum[..., None]).mul_(inverse[..., None]).round_().clamp_(0, top)
    return stored._replace(codes=codes.flatten(1).to(torch.uint8))


@cache
def kernel_layout() -> tuple[int, bool]:
    """Return how the packed kernel of this processor lays rows out: how many make a block, and
    whether a byte holds neighbouring rows (or rows half a block apart).

    A block is [in, rows / 2] bytes. Found by packing row numbers and looking where they are.
    """
    numbers = torch.arange(ROWS).repeat_interleave(GROUP).view(ROWS, GROUP)
    digits = [_pack(part & 15).flatten().long() for part in (numbers, numbers >> 4)]
    halves = ((digits[0] & 15) + 16 * (digits[1] & 15), (digits[0] >> 4) + 16 * (digits[1] >> 4))
    found = torch.stack(halves)  # [2, bytes]: the rows whose digits a byte holds
    for rows in (64, 32):
        blocks = torch.arange(ROWS).view(-1, rows)  # [blocks, rows]
        for neighbours in (False, True):
            pairs = blocks.unflatten(1, (-1, 2)).mT if neighbours else blocks.unflatten(1, (2, -1))
            places = pairs[:, :, None].expand(-1, -1, GROUP, -1).transpose(0, 1)
            if torch.equal(places.flatten(1), found):
                return rows, neighbours
    raise RuntimeError(
        f"PyTorch {torch.__version__} packs 4-bit weights in an order that is not known here; use "
        "precision='bf16' or 'f32', or another version of PyTorch."
    )


def _pack(codes: Tensor) -> Tensor:
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    return packed


@cache
def has_kernel() -> bool:
    """Return whether this PyTorch has the product of packed 4-bit weights, and it is right.

    The operators are private: they may go, or lay weights out anew. So one product is tried.
    """
    weight, x = torch.linspace(-1, 1, 64 * 64).sin().view(64, 64), torch.linspace(-1, 1, 64)
    groups = quantize(weight, 4)
    try:
        found = QuantizedRows.of(groups).product(torch.float32)(x.bfloat16()[None])[0]
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    return bool((found - groups.values() @ x).abs().max() < 0.1)


class QuantizedRows(nn.Module):
    """Rows of 4 or of 8 bits, in the order in which the packed kernel reads them."""

    digits: Tensor
    scales: Tensor

    def __init__(self, num_rows: int, in_features: int, bits: int, group: int = GROUP) -> None:
        super().__init__()
        self.num_rows, self.in_features, self.bits, self.group = num_rows, in_features, bits, group
        padded = -(-num_rows // ROWS) * ROWS
        digits = torch.zeros(bits // 4, padded, in_features // 2, dtype=torch.uint8)
        scales = torch.zeros(in_features // group, padded, 2, dtype=torch.bfloat16)
        self.register_buffer("digits", digits, persistent=False)  # highest first
        self.register_buffer("scales", scales, persistent=False)

    @staticmethod
    def of(groups: Groups) -> QuantizedRows:
        num_rows, in_features = groups.codes.shape
        rows = QuantizedRows(num_rows, in_features, groups.bits, groups.group)
        rows.fill(0, groups)
        return rows

    def fill(self, start: int, groups: Groups) -> None:
        """Set the rows from `start`, a multiple of 64."""
        count = len(groups.codes)
        assert start % ROWS == 0 and groups.bits == self.bits
        codes = F.pad(groups.codes, (0, 0, 0, -count % ROWS))
        at = slice(start, start + len(codes))
        parts = (codes,) if self.bits == 4 else (codes >> 4, codes & 15)
        for digit, part in zip(self.digits, parts, strict=True):
            digit[at] = _pack(part).view_as(digit[at])
        self.scales[:, start : start + count] = groups.scales.transpose(0, 1)

    def groups(self, numbers: Tensor) -> Groups:
        """Return some rows by their numbers, int64 [n]."""
        size, neighbours = kernel_layout()
        place = numbers % size
        half = size // 2
        byte, nibble = (place // 2, place % 2) if neighbours else (place % half, place // half)
        blocks = self.digits.view(len(self.digits), -1, self.in_features, half)
        found = blocks[:, numbers // size, :, byte]  # [n, digits, in]
        found = (found >> (4 * nibble)[:, None, None].to(torch.uint8)) & 15
        codes = found[:, 0] if self.bits == 4 else found[:, 0] << 4 | found[:, 1]
        return Groups(codes, self.scales[:, numbers].transpose(0, 1), self.bits)

    def product(self, dtype: torch.dtype) -> Product:
        """Return the packed product, bfloat16 [T, in] -> `dtype` [T, rows], with weights bound."""
        count, scales, group = self.num_rows, self.scales, self.group
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu.default
        high, low = self.digits[0], self.digits[-1]

        def four(x: Tensor) -> Tensor:
            return multiply(x, high, group, scales)

        def eight(x: Tensor) -> Tensor:
            rest = multiply(x, low, group, scales).to(dtype)
            return rest.add_(multiply(x, high, group, scales), alpha=16)

        product = eight if self.bits == 8 else four
        if self.bits == 4 and dtype != torch.bfloat16:
            product = lambda x: four(x).to(dtype)  # noqa: E731
        return product if count == scales.shape[1] else lambda x: product(x)[:, :count]

    def tiles(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield the weights of some rows after another, transposed [in, n]."""
        size, neighbours = kernel_layout()
        inside, half = self.in_features, size // 2
        pair = (half, 2) if neighbours else (2, half)
        blocks = self.digits.view(len(self.digits), -1, inside, half)
        step = max(1, TILE // (size * inside))
        for first in range(0, blocks.shape[1], step):
            found = blocks[:, first : first + step].transpose(1, 2)  # [digits, in, blocks, half]
            count = found.shape[2]
            tile = torch.empty(inside, count, *pair, dtype=dtype)
            halves = tile.unbind(3 if neighbours else 2)
            high = (found[0] ^ 0x88).view(torch.int8)  # each 4 bits: the digit minus 8
            if self.bits == 4:
                halves[0].copy_(high << 4 >> 4)
                halves[1].copy_(high >> 4)
            else:
                low = found[1].view(torch.int8)
                halves[0].copy_(high << 4 | low & 15)
                halves[1].copy_(high & -16 | low >> 4 & 15)
            # A pair is read as one integer: several times as fast as every second number.
            pairs = self.scales[:, first * size : (first + count) * size].view(torch.int32)[..., 0]
            scale, zero = ((pairs << 16).view(torch.float32), (pairs & -65536).view(torch.float32))
            if self.bits == 8:  # what the tile holds is code - 128
                zero = 17 * zero - 8 * scale
            grouped = tile.view(-1, self.group, count * size)
            scale, zero = scale[:, None].to(dtype), zero[:, None].to(dtype)
            torch.addcmul(zero, grouped, scale, out=grouped)
            yield tile.view(inside, -1)[:, : self.num_rows - first * size]


Rows = QuantizedRows | NativeRows
REGROUPED = {"Q2_K": (4, 32), "Q3_K": (8, 64), "Q6_K": (8, 64)}  # groups of 16: bits, group


def fill_rows(rows: Rows, start: int, groups: Groups) -> None:
    """Set rows from `start`, a multiple of 64."""
    if isinstance(rows, QuantizedRows):
        rows.fill(start, groups)
        return
    blocks = blocks_of(groups.codes, *groups.affine(), groups.bits)
    rows.fill(start, blocks.data_ptr(), blocks.shape[1], len(blocks))


def is_finite(rows: Rows) -> bool:
    """Return whether all scales are numbers."""
    return rows.finite if isinstance(rows, NativeRows) else bool(rows.scales.isfinite().all())


def groups_of(rows: Rows, numbers: Tensor) -> Groups:
    """Return some rows by their numbers, int64 [n]. Those of the kernels keep their codes, but for
    types of groups of 16, whose values are rounded anew."""
    if isinstance(rows, QuantizedRows):
        return rows.groups(numbers)
    if rows.kind in REGROUPED:
        return quantize(rows.values(numbers), *REGROUPED[rows.kind])
    codes, scale, minimum = (part for part in rows.codes(numbers))
    scale, minimum = scale[:, ::2], minimum[:, ::2]
    if rows.kind in ("Q8_0", "A8"):  # signed
        return Groups.of(codes ^ 128, scale, minimum - 128 * scale, 8)
    if rows.kind in ("Q5_0", "Q5_1", "Q5_K"):  # the middle of 8 bits is 136
        return Groups.of(codes + 120, scale, minimum - 120 * scale, 8)
    return Groups.of(codes, scale, minimum, 4)


class QuantizedLinear(nn.Module):
    """A linear layer of packed rows.

    Attributes:
        dtype: what the model computes in.
        result: what products come in; the head's in float32, so that near scores stay apart.
        dense: the whole weight [out, in], where a model keeps it beside the integers.
        low, high: a low-rank pair [r, in], [out, r] whose product is added to the integers, where
            merging would need more bits; `dense` holds it already.
    """

    bias: Tensor | None
    dense: Tensor | None
    low: Tensor | None
    high: Tensor | None

    def __init__(
        self,
        rows: Sequence[Rows],
        *,
        dtype: torch.dtype = torch.bfloat16,
        result: torch.dtype | None = None,
        bias: Tensor | None = None,
        dense: Tensor | None = None,
        low_rank: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """
        Args:
            rows: one or several, of different numbers of bits, below one another.
        """
        super().__init__()
        self.rows = nn.ModuleList(rows)
        self.dtype, self.result = dtype, result or dtype
        if bias is not None:
            bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        self.register_parameter("bias", bias)
        low, high = low_rank or (None, None)
        for name, tensor in (("dense", dense), ("low", low), ("high", high)):
            kept = None if tensor is None else tensor.detach().to(dtype)
            self.register_buffer(name, kept, persistent=False)

    @property
    def parts(self) -> list[Rows]:
        return [part for part in self.rows if isinstance(part, Rows)]

    @property
    def native_parts(self) -> list[NativeRows]:
        """The parts, where they are all packed for the compiled kernels; else nothing."""
        parts = [part for part in self.rows if isinstance(part, NativeRows)]
        return parts if len(parts) == len(self.rows) else []

    @property
    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        return None if self.low is None or self.high is None else (self.low, self.high)

    @property
    def num_weights(self) -> int:
        return sum(part.num_rows * part.in_features for part in self.parts)

    @property
    def num_bytes(self) -> int:
        """Bytes read by the product with one token."""
        read = [self.low, self.high]
        for part in self.parts:
            read += [part.digits, part.scales] if isinstance(part, QuantizedRows) else [part.data]
        return sum(tensor.nbytes for tensor in read if tensor is not None)

    @property
    def weight(self) -> Tensor:
        """The whole weight [out, in], made anew where it is not kept."""
        if self.dense is not None:
            return self.dense
        parts = self.parts
        weight = torch.empty(sum(p.num_rows for p in parts), parts[0].in_features, dtype=self.dtype)
        start = 0
        for part in parts:
            for tile in part.tiles(torch.float32):
                rows = slice(start, start + tile.shape[1])
                if self.low is not None and self.high is not None:
                    tile = tile.addmm(self.low.T.float(), self.high[rows].T.float())
                weight[rows] = tile.T
                start = rows.stop
        return weight

    def forward(self, x: Tensor) -> Tensor:  # `dtype` [T, in] -> `result` [T, out]
        if decoding() or (self.native_parts and not (torch.is_grad_enabled() and x.requires_grad)):
            return self.product()(x)
        if self.dense is not None:
            return F.linear(x, self.dense, self.bias).to(self.result)
        y = x.new_empty(len(x), sum(part.num_rows for part in self.parts))
        start = 0
        for part in self.parts:
            for tile in part.tiles(x.dtype):
                y[:, start : start + tile.shape[1]] = x @ tile
                start += tile.shape[1]
        if self.low is not None and self.high is not None:
            y = torch.addmm(y, x @ self.low.T, self.high.T)
        return (y if self.bias is None else y + self.bias).to(self.result)

    def product(self) -> Product:
        """Return the packed product as a function, with the weights bound."""
        assert self.low is None or self.result == self.dtype
        if native := self.native_parts:
            multiply, result = NativeProduct(native, self.bias, self.low_rank), self.result
            return lambda x: multiply(x).to(result)
        parts = [part for part in self.rows if isinstance(part, QuantizedRows)]
        products = [part.product(self.result) for part in parts]
        product = products[0] if len(products) == 1 else _side_by_side(products)
        if self.dtype != torch.bfloat16:
            product = _after(product, Tensor.bfloat16)
        if self.low is not None and self.high is not None:
            product = _with_low_rank(product, self.low.T, self.high.T)
        return product if self.bias is None else _with_bias(product, self.bias)


class QuantizedEmbedding(QuantizedLinear):
    """Token embeddings that are packed rows, such as those of a tied head."""

    def forward(self, ids: Tensor) -> Tensor:  # int64 [T] -> float32 [T, D]
        (rows,) = self.parts
        return rows.values(ids) if isinstance(rows, NativeRows) else rows.groups(ids).values()


def _side_by_side(products: Sequence[Product]) -> Product:
    return lambda x: torch.cat([product(x) for product in products], 1)


def _after(product: Product, convert: Product) -> Product:
    return lambda x: product(convert(x))


def _with_low_rank(product: Product, down: Tensor, up: Tensor) -> Product:
    def sum_of_both(x: Tensor) -> Tensor:
        pairs = zip(_blocks(product(x)), _blocks(x), strict=True)
        return torch.cat([torch.addmm(base, rows @ down, up) for base, rows in pairs])[: len(x)]

    return sum_of_both


def multiply(linear: nn.Module) -> Product:
    """Return a linear's product in a decode step: each row is bitwise what it is alone.

    A `QuantizedLinear` is its packed product. PyTorch's dense products round differently for one
    row and for several; in half precision they run over blocks of exactly four rows, which costs
    no more than one row, and in float32 over single rows. Modules that are more than a linear, such
    as one with an adapter in training, are called as they are.
    """
    if isinstance(linear, QuantizedLinear):
        return linear.product()
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        return linear
    dense = partial(F.linear, weight=linear.weight, bias=linear.bias)
    if linear.weight.is_cuda:
        return dense
    if linear.weight.dtype == torch.float32:
        return lambda x: each_row(dense, x)
    return lambda x: torch.cat([dense(rows) for rows in _blocks(x)])[: len(x)]


def apply_linear(linear: nn.Module, x: Tensor) -> Tensor:
    """Return a linear of x, by `multiply` in a decode step."""
    result: Tensor = (multiply(linear) if decoding() else linear)(x)
    return result


def each_row(function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """Return a function of single rows, joined: for kernels that round by the number of rows, or
    by where an element stands among them."""
    if len(rows[0]) == 1 or rows[0].is_cuda:
        return function(*rows)
    singles = zip(*([row.clone() for row in x.split(1)] for x in rows), strict=True)
    return torch.cat([function(*single) for single in singles])


def _blocks(x: Tensor) -> list[Tensor]:
    """Return rows [n, D] as blocks of exactly four, the last one padded. What a row of a product
    is does not depend on the other three."""
    if len(x) == 1:
        return [x.expand(4, -1)]
    return [block.contiguous() for block in F.pad(x, (0, 0, 0, -len(x) % 4)).split(4)]


def _with_bias(product: Product, bias: Tensor) -> Product:
    return lambda x: product(x) + bias
