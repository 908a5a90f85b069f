"""Calls every function of the compiled library, without PyTorch: `python exercise.py [LIBRARY]`.

Products of every format, rows of every length, whole passes of small decoders, many threads, a
fork. What is right is checked by the other tests; this one is run under sanitizers, and on wheels
just after they were built.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np

from visavis.native import library as api

KINDS = [kind for kind in api.FORMATS if kind not in ("F32", "BF16")]
SUPER = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
# Where a block's float16 scales are, and how many bytes it has.
HALVES = {
    "Q4_0": ((0,), 18),
    "Q4_1": ((0, 2), 20),
    "Q5_0": ((0,), 22),
    "Q5_1": ((0, 2), 24),
    "Q8_0": ((0,), 34),
    "A8": ((0, 2), 36),
    "Q2_K": ((80, 82), 84),
    "Q3_K": ((108,), 110),
    "Q4_K": ((0, 2), 144),
    "Q5_K": ((0, 2), 176),
    "Q6_K": ((208,), 210),
}


def random_blocks(kind: str, rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """Return rows of random codes with scales as files have them, uint8 [rows, bytes]."""
    generator = np.random.default_rng(seed)
    places, size = HALVES[kind]
    count = cols // (256 if kind in SUPER else 32)
    raw = generator.integers(0, 256, (rows, count, size), np.uint8)
    for at in places:
        scales = generator.uniform(-1, 1, (rows, count, 1)).astype("<f2") * np.float16(2.0**-7)
        raw[..., at : at + 2] = scales.view(np.uint8)
    return raw.reshape(rows, -1)


def aligned(size: int) -> np.ndarray:
    """Return zeros, uint8 [size], that start at a multiple of 64 bytes."""
    room = np.zeros(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size]


class Matrices:
    """Matrices and what they point to."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library, self.kept = library, list[Any]()

    def packed(self, kind: str, rows: int, cols: int, seed: int = 0) -> api.Matrix:
        raw, format = random_blocks(kind, rows, cols, seed), api.FORMATS[kind]
        assert self.library.vv_stored_bytes(format, cols) == raw.shape[1]
        data = aligned(self.library.vv_packed_bytes(format, rows, cols))
        stride = raw.strides[0]
        for first in range(0, rows, 24):  # not a multiple of 16
            count, out = min(24, rows - first), data.ctypes.data
            at = raw.ctypes.data + first * stride
            api.check(self.library.vv_pack(format, cols, at, stride, first, count, out))
        self.kept += [raw, data]
        return api.Matrix(data.ctypes.data, rows, cols, format, 0)

    def plain(self, rows: int, cols: int, seed: int = 0) -> api.Matrix:
        values = np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)
        self.kept.append(values)
        return api.Matrix(values.ctypes.data, rows, cols, api.FORMATS["F32"], 0)

    def linear(self, *parts: api.Matrix, rank: int = 0) -> api.Linear:
        array = (api.Matrix * len(parts))(*parts)
        rows, cols = sum(part.rows for part in parts), parts[0].cols
        bias = np.linspace(-1, 1, rows, dtype=np.float32)
        self.kept += [array, bias]
        linear = api.Linear(array, len(parts), bias.ctypes.data)
        if rank:
            linear.low = ctypes.pointer(self.plain(rank, cols, 5))
            linear.high = ctypes.pointer(self.plain(rows, rank, 6))
        return linear

    def norm(self, width: int) -> api.Norm:
        weight = np.ones(width, np.float32)
        self.kept.append(weight)
        return api.Norm(weight.ctypes.data, None)


def product(library: ctypes.CDLL, linear: api.Linear, x: np.ndarray, threads: int) -> np.ndarray:
    rows = sum(linear.parts[i].rows for i in range(linear.num_parts))
    y = np.full((len(x), rows), np.nan, np.float32)
    where = ctypes.byref(linear)
    api.check(library.vv_product(where, x.ctypes.data, len(x), y.ctypes.data, threads))
    return y


def decoder(matrices: Matrices, kind: str, layers: int = 2, rank: int = 0) -> api.Model:
    """Return a small decoder: width 256, 4 heads of 64, 2 of keys, a feed-forward of 512."""

    def linear(rows: int, cols: int, seed: int) -> api.Linear:
        first = matrices.packed(kind, rows - 8, cols, seed)
        return matrices.linear(first, matrices.plain(8, cols), rank=rank)

    found = [
        api.Layer(
            attn_norm=matrices.norm(256),
            ffn_norm=matrices.norm(256),
            q_norm=api.Norm(None, None),
            k_norm=matrices.norm(64),
            qkv=linear(8 * 64, 256, layer),
            out=linear(256, 256, layer + 10),
            up=linear(2 * 512, 256, layer + 20),
            down=linear(256, 512, layer + 30),
            heads=4,
            kv_heads=2,
            ffn_width=512,
        )
        for layer in range(layers)
    ]
    array = (api.Layer * layers)(*found)
    matrices.kept.append(array)
    return api.Model(
        layers=array,
        norm=matrices.norm(256),
        head=linear(100, 256, 99),
        num_layers=layers,
        width=256,
        head_dim=64,
        rotary_dim=64,
        gated=1,
        cache_format=api.FORMATS["BF16"],
        eps=1e-5,
    )


def forward(
    library: ctypes.CDLL,
    model: api.Model,
    lengths: list[int],
    threads: int,
    *,
    splits: int = 1,
) -> np.ndarray:
    """Return the scores of every token of sequences, each passed in `splits` passes."""
    generator = np.random.default_rng(3)
    layers, capacity = model.num_layers, max(lengths) * splits
    stores = [[np.zeros((2, capacity, 64), np.uint16) for _ in range(2 * layers)] for _ in lengths]
    scores = []
    for number in range(splits):
        sequences = (api.Sequence * len(lengths))()
        for one, length, store in zip(sequences, lengths, stores, strict=True):
            pointers = (ctypes.c_void_p * (2 * layers))(*(array.ctypes.data for array in store))
            one.count, one.past, one.capacity = length, number * length, capacity
            one.keys = ctypes.cast(pointers, ctypes.POINTER(ctypes.c_void_p))
            second = ctypes.addressof(pointers) + layers * ctypes.sizeof(ctypes.c_void_p)
            one.values = ctypes.cast(second, ctypes.POINTER(ctypes.c_void_p))
        total = sum(lengths)
        x = generator.standard_normal((total, 256)).astype(np.float32)
        cos = generator.standard_normal((2, total, 64)).astype(np.float32)
        scored = np.arange(total)
        found = np.full((total, 100), np.nan, np.float32)
        api.check(
            library.vv_forward(
                ctypes.byref(model),
                sequences,
                len(lengths),
                x.ctypes.data,
                cos[0].ctypes.data,
                cos[1].ctypes.data,
                None,
                None,
                scored.ctypes.data,
                total,
                found.ctypes.data,
                threads,
            )
        )
        scores.append(found)
    return np.concatenate(scores)


def run(library: ctypes.CDLL, fork: bool = True) -> None:
    matrices = Matrices(library)
    generator = np.random.default_rng(1)
    for name in api.LEVELS:
        if library.vv_set_level(name.encode()):
            continue
        for kind in KINDS:
            cols = 256 if kind in SUPER else 96
            linear = matrices.linear(matrices.packed(kind, 45, cols), rank=5)
            for count in (0, 1, 3, 17):
                x = generator.standard_normal((count, cols)).astype(np.float32)
                assert np.isfinite(product(library, linear, x, 2)).all()
            rows = np.arange(45)
            values = np.empty((45, cols), np.float32)
            api.check(
                library.vv_unpack(
                    linear.parts, rows.ctypes.data, 45, values.ctypes.data, None, None, None
                )
            )
        for cols in (1, 7, 50):
            linear = matrices.linear(matrices.plain(19, cols), rank=3)
            product(library, linear, generator.standard_normal((9, cols)).astype(np.float32), 3)
        model = decoder(matrices, "Q4_K", rank=4)
        assert np.isfinite(forward(library, model, [1], 2, splits=3)).all()
        assert np.isfinite(forward(library, model, [5, 140, 1], 3)).all()
    library.vv_set_level(None)
    model = decoder(matrices, "Q4_1")
    expected = forward(library, model, [3, 2], 1, splits=4)

    def again() -> None:
        for _ in range(5):
            assert np.array_equal(forward(library, model, [3, 2], 3, splits=4), expected)

    threads = [Thread(target=again) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if fork and hasattr(os, "fork"):
        child = os.fork()
        if not child:
            again()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else api.library_path()
    run(api.load(path), fork="--no-fork" not in sys.argv)
    print("exercised", path.name)
