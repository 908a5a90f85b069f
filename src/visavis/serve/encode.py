"""Vectors in the number types that embedding APIs have.

- `float`: as the model gives them, unit vectors.
- `base64`: little-endian float32 bytes.
- `int8`: each vector times 127 / its largest magnitude, rounded; the cosine of two such vectors is
  that of the originals up to rounding. `uint8` is the same plus 128.
- `ubinary`: one bit a number, 1 where it is above 0, first number in the highest bit; the last byte
  is filled up with zeros. `binary` is the same minus 128, as a signed byte (sentence-transformers'
  `quantize_embeddings`).
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np


def quantize(vectors: np.ndarray, kind: str) -> np.ndarray:
    """Return vectors float32 [N, D] as an array of another number type, [N, D] or [N, D / 8]."""
    if kind in ("float", "base64"):
        floats: np.ndarray = vectors.astype("<f4", copy=False)
        return floats
    if kind in ("int8", "uint8"):
        largest = np.abs(vectors).max(axis=1, keepdims=True)
        scaled: np.ndarray = np.rint(vectors * (127 / np.maximum(largest, 1e-12))).astype(np.int8)
        if kind == "int8":
            return scaled
        return (scaled.astype(np.int16) + 128).astype(np.uint8)
    packed = np.packbits(vectors > 0, axis=-1)
    return packed if kind == "ubinary" else (packed.astype(np.int16) - 128).astype(np.int8)


def encode(vectors: np.ndarray, kind: str) -> list[Any]:
    """Return vectors float32 [N, D] as what goes into JSON: lists of numbers, or base64."""
    found = quantize(vectors, kind)
    return base64_rows(found) if kind == "base64" else found.tolist()


def base64_rows(vectors: np.ndarray) -> list[str]:
    """Return the bytes of each row as base64."""
    return [base64.b64encode(row.tobytes()).decode("ascii") for row in vectors]
