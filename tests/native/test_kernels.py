"""Each kernel against NumPy on dequantised weights, at every level that this processor runs."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import gguf
import numpy as np
import pytest

from tests.native import exercise
from tests.native.exercise import KINDS, SUPER, Matrices, product, random_blocks
from visavis.native import library as api

pytestmark = pytest.mark.skipif(api.native() is None, reason="the kernels are not compiled here")


@pytest.fixture(params=api.LEVELS)
def library(request: pytest.FixtureRequest) -> Iterator[ctypes.CDLL]:
    found = api.native()
    assert found is not None
    before = found.vv_level()
    if found.vv_set_level(request.param.encode()):
        pytest.skip(f"this processor does not run {request.param}")
    yield found
    found.vv_set_level(before)


def dequantized(kind: str, raw: np.ndarray) -> np.ndarray:
    """Return rows as float32; A8 is ours, all others are read by gguf."""
    if kind != "A8":
        return gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])
    blocks = raw.reshape(-1, 36)
    halves = blocks[:, :4].copy().view("<f2").astype(np.float32)
    values = blocks[:, 4:].view(np.int8) * halves[:, :1] + halves[:, 1:]
    return values.reshape(len(raw), -1)


def rounded(x: np.ndarray) -> np.ndarray:
    """Return activations as the kernels see them: 8 bits, 32 to a scale."""
    groups = x.reshape(len(x), -1, 32)
    scale = np.abs(groups).max(-1, keepdims=True) / np.float32(127)
    return (np.rint(groups / np.where(scale > 0, scale, 1)) * scale).reshape(x.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_what_the_file_stores(kind: str, library: ctypes.CDLL) -> None:
    matrices = Matrices(library)
    matrix = matrices.packed(kind, 45, 512, seed=4)
    numbers, values = np.array([0, 44, 17, 17]), np.empty((4, 512), np.float32)
    codes, scales = np.empty((4, 512), np.uint8), np.empty((2, 4, 32), np.float32)
    found = [a.ctypes.data for a in (values, codes, scales[0], scales[1])]
    api.check(library.vv_unpack(ctypes.byref(matrix), numbers.ctypes.data, 4, *found))
    expected = dequantized(kind, random_blocks(kind, 45, 512, seed=4))[numbers]
    assert np.array_equal(values, expected)
    signed = codes.view(np.int8) if kind in ("Q8_0", "A8") else codes
    scale, minimum = (one.repeat(16, 1) for one in scales)
    assert np.allclose(signed * scale + minimum, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 16, 45])
def test_products_are_exact_for_rounded_activations(
    kind: str, rows: int, library: ctypes.CDLL
) -> None:
    matrices = Matrices(library)
    cols = 768 if kind in SUPER else 96
    linear = matrices.linear(matrices.packed(kind, rows, cols))
    x = np.random.default_rng(0).standard_normal((13, cols)).astype(np.float32)
    x[3, :32] = 0
    weights = dequantized(kind, random_blocks(kind, rows, cols)).astype(np.float64)
    expected = rounded(x) @ weights.T + np.linspace(-1, 1, rows, dtype=np.float32)
    found = product(library, linear, x, 2)
    assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()
    for count in (1, 2, 4, 7):  # bitwise what each is alone, on any number of threads
        for first in range(0, 13 - count, count):
            part = np.ascontiguousarray(x[first : first + count])
            assert np.array_equal(product(library, linear, part, 1), found[first : first + count])


@pytest.mark.parametrize("cols", [1, 7, 33, 50, 128])
def test_plain_rows_of_any_width(cols: int, library: ctypes.CDLL) -> None:
    matrices = Matrices(library)
    weights = np.random.default_rng(2).standard_normal((37, cols)).astype(np.float32)
    half = (weights.view(np.uint32) >> 16).astype(np.uint16)
    exact = (half.astype(np.uint32) << 16).view(np.float32)
    x = np.random.default_rng(3).standard_normal((6, cols)).astype(np.float32)
    for array, format, used in ((weights, "F32", weights), (half, "BF16", exact)):
        matrix = api.Matrix(array.ctypes.data, 37, cols, api.FORMATS[format], 0)
        found = product(library, matrices.linear(matrix), x, 2)
        expected = x.astype(np.float64) @ used.T + np.linspace(-1, 1, 37)
        assert np.abs(found - expected).max() < 1e-5


def test_a_low_rank_pair_is_added(library: ctypes.CDLL) -> None:
    matrices = Matrices(library)
    linear = matrices.linear(matrices.packed("Q4_1", 45, 96), matrices.plain(3, 96), rank=20)
    low, high = (
        np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
        for seed, shape in ((5, (20, 96)), (6, (48, 20)))
    )
    x = np.random.default_rng(0).standard_normal((11, 96)).astype(np.float32)
    found = product(library, linear, x, 2)
    bare = api.Linear(linear.parts, linear.num_parts, linear.bias)
    expected = product(library, bare, x, 2) + x @ low.T @ high.T
    assert np.abs(found - expected).max() < 1e-3
    assert np.array_equal(product(library, linear, x[4:5], 1)[0], found[4])


def test_extreme_activations(library: ctypes.CDLL) -> None:
    """What is no finite number makes its own row NaN; denormals are zeros; codes reach -128."""
    matrices = Matrices(library)
    for kind in KINDS:
        linear = matrices.linear(matrices.packed(kind, 20, 256))
        x = np.ones((5, 256), np.float32)
        x[0, 3], x[1, 40], x[2], x[3] = np.nan, np.inf, 1e-40, 1e30
        found = product(library, linear, x, 1)
        assert np.isnan(found[:2]).all() and np.isfinite(found[2:]).all()
        assert np.allclose(found[2], np.linspace(-1, 1, 20))


def test_refusals() -> None:
    library = api.native()
    assert library is not None
    matrices = Matrices(library)
    assert library.vv_packed_bytes(api.FORMATS["Q4_K"], 16, 96) == 0
    assert library.vv_packed_bytes(77, 16, 256) == 0
    data = np.zeros(64, np.float32)
    wrong = matrices.linear(api.Matrix(data.ctypes.data, 1, 8, 77, 0))
    with pytest.raises(api.NativeError, match="format"):
        product(library, wrong, np.ones((1, 8), np.float32), 1)
    assert product(library, matrices.linear(matrices.plain(3, 8)), np.ones((0, 8)), 2).shape[0] == 0
    model = exercise.decoder(matrices, "Q8_0")
    sequence = (api.Sequence * 1)(api.Sequence(3, 6, 8))  # a cache at its end
    with pytest.raises(api.NativeError, match="no room"):
        api.check(
            library.vv_forward(
                ctypes.byref(model), sequence, 1, *[data.ctypes.data] * 2, *[None] * 4, 0, None, 1
            )
        )
    model.layers[0].kv_heads = 3
    with pytest.raises(api.NativeError, match="belong together"):
        exercise.forward(library, model, [1], 1)


def test_everything_from_many_threads_and_after_a_fork() -> None:
    library = api.native()
    assert library is not None
    exercise.run(library)
