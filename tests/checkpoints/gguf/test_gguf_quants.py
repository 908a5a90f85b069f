"""Dequantisation: bitwise what the `gguf` library gives, for every type and any bytes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visavis.checkpoints.gguf import dequantize
from visavis.checkpoints.gguf.dequantize import BY_NAME, SUPPORTED, TYPES, UNPACK

ROWS, BLOCKS = 48, 3


def random_blocks(name: str, seed: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Return random bytes of a tensor [ROWS, ...], and its shape. Scales may be NaN or inf."""
    kind = BY_NAME[name]
    per_row = BLOCKS * max(1, 64 // kind.block)
    raw = np.random.default_rng(seed).integers(0, 256, (ROWS, per_row * kind.nbytes), np.uint8)
    return raw, (ROWS, per_row * kind.block)


def test_sizes_are_those_of_the_library() -> None:
    theirs = {
        int(kind): (kind.name, *sizes)
        for kind, sizes in gguf.GGML_QUANT_SIZES.items()
        if int(kind) in TYPES
    }
    assert {number: tuple(kind) for number, kind in TYPES.items()} == theirs


@pytest.mark.parity
@pytest.mark.parametrize("name", SUPPORTED)
@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1))
def test_values_are_bitwise_equal(name: str, seed: int) -> None:
    raw, shape = random_blocks(name, seed)
    with np.errstate(all="ignore"):
        ours = dequantize.dequantize(raw.reshape(-1), name, shape)
        theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    assert ours.dtype == np.float32 and ours.shape == shape
    nan = np.isnan(theirs)
    assert np.array_equal(np.isnan(ours), nan)
    assert np.array_equal(ours.view(np.uint32)[~nan], theirs.view(np.uint32)[~nan])


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_numbers_come_back_near(name: str) -> None:
    """Against the numbers themselves, not only another implementation."""
    numbers = np.random.default_rng(0).standard_normal((8, 64), np.float32)
    raw = gguf.quants.quantize(numbers, gguf.GGMLQuantizationType[name])
    values = dequantize.dequantize(raw.reshape(-1), name, numbers.shape)
    bits = 8 if name == "Q8_0" else int(name[1])
    assert np.abs(values - numbers).max() < 1.1 * np.abs(numbers).max() / 2 ** (bits - 1)


@pytest.mark.parametrize("name", UNPACK)
def test_parts_multiply_out_to_the_values(name: str) -> None:
    raw, shape = random_blocks(name, 7)
    codes, scale, minimum = dequantize.parts(raw.reshape(-1), name, shape)
    assert codes.shape == shape and codes.dtype in (np.uint8, np.int8)
    group = shape[1] // scale.shape[1]
    assert scale.shape == (ROWS, shape[1] // group) and group in (16, 32)
    with np.errstate(all="ignore"):
        values = codes.astype(np.float32) * scale.repeat(group, 1)
        if minimum is not None:
            assert minimum.shape == scale.shape and codes.dtype == np.uint8
            values = values + minimum.repeat(group, 1)
        expected = dequantize.dequantize(raw.reshape(-1), name, shape)
    assert np.array_equal(values, expected, equal_nan=True)


def test_four_bit_codes_stay_four_bit() -> None:
    raw, shape = random_blocks("Q4_1", 3)
    assert dequantize.parts(raw.reshape(-1), "Q4_1", shape).codes.max() == 15
    raw, shape = random_blocks("Q4_0", 3)
    codes = dequantize.parts(raw.reshape(-1), "Q4_0", shape).codes
    assert (codes.min(), codes.max()) == (-8, 7)


def test_values_can_be_written_in_place() -> None:
    raw, shape = random_blocks("Q8_0", 1)
    target = np.zeros((2 * ROWS, shape[1]), np.float32)
    with np.errstate(all="ignore"):
        dequantize.dequantize(raw.reshape(-1), "Q8_0", shape, out=target[ROWS:])
        expected = dequantize.dequantize(raw.reshape(-1), "Q8_0", shape)
    assert np.array_equal(target[ROWS:], expected, equal_nan=True)
    assert not target[:ROWS].any()
