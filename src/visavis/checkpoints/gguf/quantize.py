"""Numbers to GGML blocks: the inverse of quants.py, and llama.cpp's mixes of types.

F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0 and Q5_1 round each block by itself, bitwise as the `gguf`
library does. The K types search: for every group a few scales are tried, the best scale (and
minimum) for each comes from weighted least squares, as in llama.cpp's reference without an
importance matrix; only sums are made in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from visavis.checkpoints.gguf.dequantize import BY_NAME

CHUNK = 1 << 16  # values quantised at a time: the search's temporaries stay in the cache
FILE_TYPES = {  # what a file may be asked to be -> llama.cpp's general.file_type
    "F32": 0,
    "F16": 1,
    "BF16": 32,
    "Q8_0": 7,
    "Q6_K": 18,
    "Q5_1": 9,
    "Q5_0": 8,
    "Q4_K_M": 15,
    "Q4_1": 3,
    "Q4_0": 2,
}
SMALLER = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # where rows are no whole blocks of 256


def tensor_type(name: str, shape: tuple[int, ...], kind: str, num_layers: int, tied: bool) -> str:
    """Return the type that llama.cpp gives a language model's tensor in a file of a kind.

    Vectors stay F32. Below 8 bits the output layer (the embeddings, where they serve as it) is
    Q6_K. Q4_K_M is a mix: Q4_K, but Q6_K for the values and the second feed-forward matrix in the
    first and last eighth of the layers and in every third between, Q5_K where q, k and v are one.
    """
    if len(shape) == 1:
        return "F32"
    if kind in ("F32", "F16", "BF16", "Q8_0"):
        found = kind
    elif name == "output.weight" or (tied and name == "token_embd.weight"):
        found = "Q6_K"
    elif kind == "Q4_K_M":
        found = "Q4_K"
        layer = int(name.split(".")[1]) if name.startswith("blk.") else 0
        if "attn_qkv" in name:
            found = "Q5_K"
        elif ("attn_v" in name or "ffn_down" in name) and _more_bits(layer, num_layers):
            found = "Q6_K"
    else:
        found = kind
    return fitting_type(found, shape)


def fitting_type(kind: str, shape: tuple[int, ...]) -> str:
    """Return the type itself, or what llama.cpp falls back to where rows are no whole blocks."""
    if shape[-1] % BY_NAME[kind].block:
        kind = SMALLER.get(kind, kind)
    return "F16" if shape[-1] % BY_NAME[kind].block else kind


def _more_bits(layer: int, num_layers: int) -> bool:
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def quantize(values: np.ndarray, type: str) -> Iterator[np.ndarray]:
    """Yield a tensor's bytes in a type, uint8, piece by piece.

    Args:
        values: floats of any type; rows are whole blocks.
    """
    kind = BY_NAME[type]
    flat = values.reshape(-1)
    for start in range(0, flat.size, CHUNK):
        piece = flat[start : start + CHUNK].astype(np.float32).reshape(-1, kind.block)
        yield QUANTIZERS[type](piece).reshape(-1)


def _half(values: np.ndarray) -> np.ndarray:
    """Return float32 [n] or [n, 1] as the bytes of float16, [n, 2]."""
    with np.errstate(over="ignore"):
        return values.reshape(-1, 1).astype("<f2").view(np.uint8)


def _bfloat16(values: np.ndarray) -> np.ndarray:
    bits = values.view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2").view(np.uint8)


def _inverse(scale: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.where(scale == 0, np.float32(0), 1 / scale)


def _nibbles(codes: np.ndarray, run: int) -> np.ndarray:
    """Pack codes of 4 bits: of each 2 * run codes, the first half lies in the low nibbles."""
    pairs = codes.reshape(len(codes), -1, 2, run)
    packed: np.ndarray = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(len(codes), -1)
    return packed


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    scale = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    codes = blocks * _inverse(scale)
    codes = np.copysign(np.floor(np.abs(codes) + np.float32(0.5)), codes)  # halves away from 0
    return np.concatenate((_half(scale), codes.astype(np.int8).view(np.uint8)), 1)


def _symmetric(blocks: np.ndarray, half: int) -> tuple[np.ndarray, np.ndarray]:
    """Return scales and codes: the number of largest magnitude becomes code 0."""
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(1, keepdims=True), 1)
    scale = largest / np.float32(-half)
    codes = np.trunc(blocks * _inverse(scale) + np.float32(half + 0.5))
    return scale, codes.astype(np.uint8).clip(0, 2 * half - 1)


def _affine(blocks: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return scales, minimums and codes: the least number becomes code 0, the largest `top`."""
    low = blocks.min(1, keepdims=True)
    scale = (blocks.max(1, keepdims=True) - low) / np.float32(top)
    codes = np.trunc((blocks - low) * _inverse(scale) + np.float32(0.5))
    return scale, low, codes.astype(np.uint8).clip(0, top)


def _fifth_bits(codes: np.ndarray) -> np.ndarray:
    return np.packbits(codes >> 4, axis=1, bitorder="little")


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    scale, codes = _symmetric(blocks, 8)
    return np.concatenate((_half(scale), _nibbles(codes, 16)), 1)


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    scale, low, codes = _affine(blocks, 15)
    return np.concatenate((_half(scale), _half(low), _nibbles(codes, 16)), 1)


def _q5_0(blocks: np.ndarray) -> np.ndarray:
    scale, codes = _symmetric(blocks, 16)
    return np.concatenate((_half(scale), _fifth_bits(codes), _nibbles(codes & 15, 16)), 1)


def _q5_1(blocks: np.ndarray) -> np.ndarray:
    scale, low, codes = _affine(blocks, 31)
    parts = (_half(scale), _half(low), _fifth_bits(codes), _nibbles(codes & 15, 16))
    return np.concatenate(parts, 1)


def _search_affine(
    groups: np.ndarray, top: int, start: float, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the scale and (subtracted) minimum of each column of 32 numbers, [n] each.

    Numbers weigh |x| + their group's root mean square. Codes are rounded under `steps` + 1
    scales, then scale and minimum are those with the least weighted squared error for the codes.
    """
    weights = np.abs(groups)
    weights += np.sqrt(np.einsum("gn,gn->n", groups, groups) / len(groups))
    weighted = weights * groups
    sum_w, sum_x = weights.sum(0), weighted.sum(0)
    low = np.minimum(groups.min(0), 0)
    width = groups.max(0) - low
    shifted = groups - low
    scale, best_low = width / top, low
    best = np.full(len(width), np.inf, np.float32)
    codes = np.empty_like(groups)
    with np.errstate(all="ignore"):  # groups of equal numbers: every candidate is NaN and loses
        tries = [0.0, *(start + 0.1 * step for step in range(steps + 1))]
        for number, extra in enumerate(tries):
            np.multiply(shifted, (top + extra) / width, out=codes)
            np.rint(codes, out=codes)
            np.minimum(codes, top, out=codes)  # numbers are not below their minimum
            sum_xl = np.einsum("gn,gn->n", weighted, codes)
            heavy = np.multiply(weights, codes)
            sum_l = heavy.sum(0)
            sum_l2 = np.einsum("gn,gn->n", heavy, codes)
            if number:  # the first is plain rounding, as it is
                pivot = sum_w * sum_l2 - sum_l * sum_l
                new_scale = (sum_w * sum_xl - sum_x * sum_l) / pivot
                new_low = (sum_l2 * sum_x - sum_l * sum_xl) / pivot
                positive = new_low > 0  # a minimum is subtracted, so it cannot be positive
                new_scale = np.where(positive, sum_xl / sum_l2, new_scale)
                new_low = np.where(positive, 0, new_low)
            else:
                new_scale, new_low = scale, low
            error = new_scale * (new_scale * sum_l2 + 2 * (new_low * sum_l - sum_xl))
            error += new_low * (new_low * sum_w - 2 * sum_x)
            better = error < best
            best = np.where(better, error, best)
            scale = np.where(better, new_scale, scale)
            best_low = np.where(better, new_low, best_low)
    return scale, -best_low


def _affine_k(
    blocks: np.ndarray, top: int, start: float, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return heads (scale, minimum, 12 bytes of 6-bit pairs) and codes [n, 256]."""
    count = len(blocks)
    groups = np.ascontiguousarray(blocks.reshape(-1, 32).T)  # [32, n * 8]
    scale, low = (x.reshape(count, 8) for x in _search_affine(groups, top, start, steps))
    d, d_low = (x.max(1, keepdims=True) / np.float32(63) for x in (scale, low))
    six = np.rint(scale * _inverse(d)).clip(0, 63).astype(np.uint8)
    six_low = np.rint(low * _inverse(d_low)).clip(0, 63).astype(np.uint8)
    packed = (
        six[:, :4] | (six[:, 4:] >> 4) << 6,
        six_low[:, :4] | (six_low[:, 4:] >> 4) << 6,
        six[:, 4:] & 15 | (six_low[:, 4:] & 15) << 4,
    )
    heads = np.concatenate((_half(d), _half(d_low), *packed), 1)
    stored = (x.astype(np.float16).astype(np.float32) for x in (d, d_low))  # as readers see them
    real, real_low = (x * y for x, y in zip(stored, (six, six_low), strict=True))
    codes = blocks.reshape(count, 8, 32) + real_low[..., None]
    codes = np.rint(codes * _inverse(real)[..., None]).clip(0, top)
    return heads, codes.astype(np.uint8).reshape(count, 256)


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    heads, codes = _affine_k(blocks, 15, -1.0, 20)
    return np.concatenate((heads, _nibbles(codes, 32)), 1)


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    heads, codes = _affine_k(blocks, 31, -0.5, 15)
    return np.concatenate((heads, _planes(codes >> 4, 1), _nibbles(codes & 15, 32)), 1)


def _planes(fields: np.ndarray, width: int) -> np.ndarray:
    """Pack fields of `width` bits, 32 bytes for 256 / width: byte i holds fields i, i + 32, …"""
    runs = fields.reshape(len(fields), -1, 8 // width, 32)
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    merged: np.ndarray = np.bitwise_or.reduce(runs << shifts, axis=2).reshape(len(fields), -1)
    return merged


def _search_symmetric(groups: np.ndarray, half: int) -> np.ndarray:
    """Return the signed scale of each column [n] with the least error, numbers weighing x²."""
    weighted = groups * groups
    cubed = weighted * groups
    at = np.abs(groups).argmax(0)[None]
    largest = np.take_along_axis(groups, at, 0)[0]
    scale = np.zeros_like(largest)
    best = np.zeros_like(largest)
    codes = np.empty_like(groups)
    inverse = -_inverse(largest)
    with np.errstate(all="ignore"):  # groups of zeros: NaN, which loses
        for step in (0, *range(-9, 0), *range(1, 10)):
            np.multiply(groups, np.float32(half + 0.1 * step) * inverse, out=codes)
            np.rint(codes, out=codes)
            np.clip(codes, -half, half - 1, out=codes)
            sum_xl = np.einsum("gn,gn->n", cubed, codes)
            sum_l2 = np.einsum("gn,gn,gn->n", weighted, codes, codes)
            found = sum_xl / sum_l2
            gain = found * sum_xl
            better = gain > best
            best = np.where(better, gain, best)
            scale = np.where(better, found, scale)
    chosen: np.ndarray = scale
    return chosen


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    count = len(blocks)
    groups = np.ascontiguousarray(blocks.reshape(-1, 16).T)  # [16, n * 16]
    scale = _search_symmetric(groups, 32).reshape(count, 16)
    largest = np.take_along_axis(scale, np.abs(scale).argmax(1)[:, None], 1)
    inverse = np.float32(-128) * _inverse(largest)
    eight = np.rint(scale * inverse).clip(-128, 127)
    d = _inverse(inverse)
    real = d.astype(np.float16).astype(np.float32) * eight
    codes = np.rint(blocks.reshape(count, 16, 16) * _inverse(real)[..., None]).clip(-32, 31) + 32
    codes = codes.astype(np.uint8).reshape(count, 256)
    parts = (_nibbles(codes & 15, 64), _planes(codes >> 4, 2))
    return np.concatenate((*parts, eight.astype(np.int8).view(np.uint8), _half(d)), 1)


QUANTIZERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F32": lambda values: values.view(np.uint8),
    "F16": _half,
    "BF16": _bfloat16,
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
