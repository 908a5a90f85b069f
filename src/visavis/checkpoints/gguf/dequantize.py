"""GGML block types: their sizes, and how stored blocks become numbers.

Every quantised type is affine in groups of 16 or 32: value = scale * code (+ minimum). Each type
is written once, as the function that unpacks codes, scales and minimums from its blocks;
`dequantize` multiplies them out (bitwise the values of `gguf.quants.dequantize`), `parts` hands
them to integer kernels as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

CHUNK = 1 << 18  # values dequantised at a time: temporaries stay in the processor's cache


class BlockType(NamedTuple):
    """How one GGML type is stored: `nbytes` bytes hold `block` consecutive values of a row."""

    name: str
    block: int
    nbytes: int


TYPES = {  # GGML type number -> storage; all known ones, so that any file can be listed
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    9: BlockType("Q8_1", 32, 40),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    15: BlockType("Q8_K", 256, 292),
    16: BlockType("IQ2_XXS", 256, 66),
    17: BlockType("IQ2_XS", 256, 74),
    18: BlockType("IQ3_XXS", 256, 98),
    19: BlockType("IQ1_S", 256, 50),
    20: BlockType("IQ4_NL", 32, 18),
    21: BlockType("IQ3_S", 256, 110),
    22: BlockType("IQ2_S", 256, 82),
    23: BlockType("IQ4_XS", 256, 136),
    24: BlockType("I8", 1, 1),
    25: BlockType("I16", 1, 2),
    26: BlockType("I32", 1, 4),
    27: BlockType("I64", 1, 8),
    28: BlockType("F64", 1, 8),
    29: BlockType("IQ1_M", 256, 56),
    30: BlockType("BF16", 1, 2),
    34: BlockType("TQ1_0", 256, 54),
    35: BlockType("TQ2_0", 256, 66),
    39: BlockType("MXFP4", 32, 17),
    40: BlockType("NVFP4", 64, 36),
    41: BlockType("Q1_0", 128, 18),
}
BY_NAME = {kind.name: kind for kind in TYPES.values()}


class BlockParts(NamedTuple):
    """Integer codes with one scale and at most one minimum per group of `in / G` values.

    value = scale * code + minimum, the scale repeated over its group.
    """

    codes: np.ndarray  # uint8 or int8 [..., in]
    scale: np.ndarray  # float32 [..., G]
    minimum: np.ndarray | None  # float32 [..., G]; None: codes are signed and centred on 0


def dequantize(
    raw: np.ndarray, type: str, shape: tuple[int, ...], out: np.ndarray | None = None
) -> np.ndarray:
    """Return the float32 values of one tensor's bytes.

    Args:
        raw: uint8, the tensor's bytes.
        type: a name of `SUPPORTED`.
        shape: rows first; the last dimension is the one blocks run along.
        out: contiguous float32 of `shape` to write to instead of a new array.
    """
    if out is None:
        out = np.empty(shape, np.float32)
    if type in PLAIN:
        out[...] = PLAIN[type](raw).reshape(shape)
        return out
    kind, unpack = BY_NAME[type], UNPACK[type]
    blocks = raw.reshape(-1, kind.nbytes)  # [n, nbytes]
    values = out.reshape(len(blocks), kind.block)  # a view
    step = CHUNK // kind.block
    with np.errstate(all="ignore"):  # damaged scales become NaN; whoever loads checks for them
        for start in range(0, len(blocks), step):
            codes, scale, minimum = unpack(blocks[start : start + step])
            grouped = values[start : start + step].reshape(codes.shape)  # [n, G, group]
            np.multiply(codes, scale[..., None], out=grouped, dtype=np.float32)
            if minimum is not None:
                grouped += minimum[..., None]
    return out


def parts(raw: np.ndarray, type: str, shape: tuple[int, ...]) -> BlockParts:
    """Return a quantised tensor's codes [out, in], scales and minimums [out, in / group]."""
    with np.errstate(all="ignore"):  # as in `dequantize`
        codes, scale, minimum = UNPACK[type](raw.reshape(-1, BY_NAME[type].nbytes))
    groups = (*shape[:-1], shape[-1] * scale.size // math.prod(shape))
    return BlockParts(
        codes.reshape(shape),
        scale.reshape(groups),
        None if minimum is None else minimum.reshape(groups),
    )


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """Return the float16 stored at byte `at` of each block as float32 [n, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _bits(packed: np.ndarray, width: int, run: int) -> np.ndarray:
    """Split bytes into fields of `width` bits.

    Each run of `run` bytes gives first the lowest field of all its bytes, then the next:
    [n, B] -> [n, B * 8 / width].
    """
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    fields = packed.reshape(len(packed), -1, 1, run) >> shifts
    fields &= np.uint8((1 << width) - 1)
    return fields.reshape(len(packed), -1)


def _fifth_bits(packed: np.ndarray) -> np.ndarray:
    """Return the 32 bits of 4 bytes, lowest first, as uint8 [n, 32]."""
    return np.unpackbits(packed, axis=1, bitorder="little")


def _q4_0(blocks: np.ndarray) -> BlockParts:
    codes = _bits(blocks[:, 2:], 4, 16).view(np.int8) - np.int8(8)
    return BlockParts(codes[:, None], _half(blocks, 0), None)


def _q4_1(blocks: np.ndarray) -> BlockParts:
    codes = _bits(blocks[:, 4:], 4, 16)
    return BlockParts(codes[:, None], _half(blocks, 0), _half(blocks, 2))


def _q5_0(blocks: np.ndarray) -> BlockParts:
    codes = _bits(blocks[:, 6:], 4, 16) | _fifth_bits(blocks[:, 2:6]) << 4
    return BlockParts((codes.view(np.int8) - np.int8(16))[:, None], _half(blocks, 0), None)


def _q5_1(blocks: np.ndarray) -> BlockParts:
    codes = _bits(blocks[:, 8:], 4, 16) | _fifth_bits(blocks[:, 4:8]) << 4
    return BlockParts(codes[:, None], _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: np.ndarray) -> BlockParts:
    return BlockParts(blocks[:, None, 2:].view(np.int8), _half(blocks, 0), None)


def _q2_k(blocks: np.ndarray) -> BlockParts:
    scales, codes = blocks[:, :16], _bits(blocks[:, 16:80], 2, 32)
    scale = _half(blocks, 80) * (scales & 15).astype(np.float32)
    minimum = _half(blocks, 82) * -(scales >> 4).astype(np.float32)
    return BlockParts(codes.reshape(-1, 16, 16), scale, minimum)


def _q3_k(blocks: np.ndarray) -> BlockParts:
    # 16 scales of 6 bits: the low 4 of each in 8 bytes, then the high 2 of each in 4 bytes
    scales = _bits(blocks[:, 96:104], 4, 8) | _bits(blocks[:, 104:108], 2, 4) << 4
    scale = _half(blocks, 108) * (scales.view(np.int8) - np.int8(32)).astype(np.float32)
    high = _bits(blocks[:, :32], 1, 32)  # a set bit means that 4 is not subtracted
    codes = (_bits(blocks[:, 32:96], 2, 32) | high << 2).view(np.int8) - np.int8(4)
    return BlockParts(codes.reshape(-1, 16, 16), scale, None)


def _six_bit_pairs(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the 8 scales and 8 negated minimums of 6 bits that Q4_K and Q5_K pack in 12 bytes.

    The stored minimums are subtracted; negating the integers keeps every bit, NaN included.
    """
    low_scale, low_minimum, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scale = (low_scale & 63, rest & 15 | (low_scale >> 2) & 48)
    minimum = (low_minimum & 63, rest >> 4 | (low_minimum >> 2) & 48)
    return (
        np.concatenate(scale, 1).astype(np.float32),
        -np.concatenate(minimum, 1).astype(np.float32),
    )


def _q4_k(blocks: np.ndarray) -> BlockParts:
    scale, minimum = _six_bit_pairs(blocks[:, 4:16])
    codes = _bits(blocks[:, 16:], 4, 32)
    return BlockParts(
        codes.reshape(-1, 8, 32), _half(blocks, 0) * scale, _half(blocks, 2) * minimum
    )


def _q5_k(blocks: np.ndarray) -> BlockParts:
    scale, minimum = _six_bit_pairs(blocks[:, 4:16])
    codes = _bits(blocks[:, 48:], 4, 32) | _bits(blocks[:, 16:48], 1, 32) << 4
    return BlockParts(
        codes.reshape(-1, 8, 32), _half(blocks, 0) * scale, _half(blocks, 2) * minimum
    )


def _q6_k(blocks: np.ndarray) -> BlockParts:
    codes = _bits(blocks[:, :128], 4, 64) | _bits(blocks[:, 128:192], 2, 32) << 4
    scale = _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return BlockParts((codes.view(np.int8) - np.int8(32)).reshape(-1, 16, 16), scale, None)


PLAIN: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F32": lambda raw: raw.view("<f4"),
    "F16": lambda raw: raw.view("<f2"),
    "BF16": lambda raw: (raw.view("<u2").astype(np.uint32) << 16).view(np.float32),
}
UNPACK: dict[str, Callable[[np.ndarray], BlockParts]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
SUPPORTED = (*PLAIN, *UNPACK)
