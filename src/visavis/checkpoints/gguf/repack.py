"""Blocks of GGUF as the groups that packed linears compute with.

    Q4_0 Q4_1 Q4_K         4 bits, the codes as they are
    Q5_0 Q5_1 Q5_K Q8_0    8 bits, the codes as they are
    Q2_K                   4 bits, one grid for two of its groups of 16
    Q3_K Q6_K              8 bits, one grid for four of them

The last two round anew. To the squared error that the types themselves make this adds 4 % (Q2_K),
0.1 % (Q3_K) and 10 % (Q6_K; rounding to bfloat16 adds 1 %).

Scales and minimums are rounded to bfloat16, as every operand of a bfloat16 product is. The
tensors to pack are chosen in `checkpoints/quantize.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor

from visavis.checkpoints.gguf.decoder import StoredPart, dequantized
from visavis.checkpoints.gguf.reader import GGUFFile
from visavis.checkpoints.quantize import Quantizer, WeightPart
from visavis.checkpoints.tensor_files import warn_not_finite
from visavis.model.native_rows import can_pack
from visavis.model.quantized_linear import GROUP, REGROUPED, Groups, is_finite, quantize

CODES = {  # bits that packed rows need, and what is added to codes: their middle is 8, or 136
    "Q4_0": (4, 8),
    "Q4_1": (4, 0),
    "Q4_K": (4, 0),
    "Q5_0": (8, 136),
    "Q5_1": (8, 120),
    "Q5_K": (8, 120),
    "Q8_0": (8, 128),
}


def packed_as(type: str) -> tuple[int, int] | None:
    """Return the bits and the group that a stored type has when packed; None: floating-point."""
    return (CODES[type][0], GROUP) if type in CODES else REGROUPED.get(type)


def groups_of(part: StoredPart, bits: int, group: int) -> Groups:
    """Return stored rows as groups: with their own codes if these have as many bits, else new."""
    own_bits, middle = CODES.get(part.type, (0, 0))
    if own_bits != bits:
        values = np.empty(part.shape, np.float32)
        part.dequantize(values)
        return quantize(torch.from_numpy(values), bits, group)
    found = part.parts()
    codes = found.codes.view(np.uint8) + np.uint8(middle)  # wraps around as it should
    minimum = (0 if found.minimum is None else found.minimum) - middle * found.scale
    first, scale, low = (torch.from_numpy(array) for array in (codes, found.scale, minimum))
    return Groups.of(first, scale, low, bits)


def take_blocks(packing: Quantizer, file: GGUFFile, name: str, stored: list[StoredPart]) -> Tensor:
    """Return the state entry for a tensor by our name, packed if the settings ask for it."""
    as_stored = pack_blocks(packing, file, name, stored)
    if as_stored is None:
        return packing.take(name, torch.from_numpy(dequantized(file, name, stored)))
    if packing.keeps_dense and as_stored:
        return packing.cast(name, torch.from_numpy(dequantized(file, name, stored)))
    return torch.empty(_shape(stored), device="meta")


def pack_blocks(
    packing: Quantizer, file: GGUFFile, name: str, stored: list[StoredPart]
) -> bool | None:
    """Pack a tensor's blocks if they are to be.

    Returns:
        None if they are not, else whether they keep as many bits as the file gives them.
    """
    shape, own = _shape(stored), [packed_as(part.type) for part in stored]
    wanted = []
    for form in own:
        bits = packing.bits_of(name, shape, form[0]) if form else None
        if form is None or bits is None:
            return None
        wanted.append(form if form[0] == bits else (bits, GROUP))
    # As the file has them, where the kernels read its type and no fewer bits are asked for.
    kinds = [
        part.type if packing.native and form == mine and can_pack(part.type, shape[1]) else ""
        for part, form, mine in zip(stored, wanted, own, strict=True)
    ]
    parts, keys = [], zip(wanted, kinds, strict=True)
    for ((bits, group), kind), run in groupby(zip(keys, stored, strict=True), key=itemgetter(0)):
        below = [part for _, part in run]
        cut, blocks = partial(_cut, below, bits, group), partial(_blocks, below) if kind else None
        parts.append(WeightPart(_shape(below)[0], bits, group, cut, kind, blocks))
    packing.pack(name, shape[1], parts)
    if not all(is_finite(rows) for rows in packing.rows[name]):
        warn_not_finite(name, str(file.path))
    return wanted == own


def _cut(parts: list[StoredPart], bits: int, group: int, start: int, end: int) -> Groups:
    found = [groups_of(part, bits, group) for part in rows_between(parts, start, end)]
    codes, scales, _ = zip(*found, strict=True)
    return Groups(torch.cat(codes), torch.cat(scales), bits)


def _blocks(parts: list[StoredPart], start: int, end: int) -> Iterator[np.ndarray]:
    for part in rows_between(parts, start, end):
        yield part.raw if part.raw.strides[1] == 1 else np.ascontiguousarray(part.raw)


def rows_between(parts: Sequence[StoredPart], start: int, end: int) -> list[StoredPart]:
    """Return the rows from `start` to `end` of parts that stand below one another."""
    found, first = [], 0
    for part in parts:
        rows = slice(max(start - first, 0), max(end - first, 0))
        raw = part.raw[rows]
        if len(raw):
            found.append(StoredPart(raw, part.type, (len(raw), *part.shape[1:])))
        first += part.shape[0]
    return found


def _shape(stored: list[StoredPart]) -> tuple[int, ...]:
    return (sum(part.shape[0] for part in stored), *stored[0].shape[1:])
