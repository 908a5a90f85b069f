"""Quantisation: bitwise the `gguf` library's where it has the type, close and sane where not."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visavis.checkpoints.gguf import dequantize
from visavis.checkpoints.gguf.quantize import CHUNK, QUANTIZERS, quantize, tensor_type

SEARCHED = ("Q4_K", "Q5_K", "Q6_K")
ROUNDED = tuple(kind for kind in QUANTIZERS if kind not in SEARCHED)
SHAPE = (6, 512)


def random_values(seed: int) -> np.ndarray:
    """Return rows of many sizes, with groups that are all zero, all equal or of one sign.

    Not of the smallest: the scales of K types are products with a float16, which ends at 6e-8.
    """
    generator = np.random.default_rng(seed)
    values = generator.standard_normal(SHAPE, np.float32)
    values *= 10.0 ** generator.integers(-2, 3, (SHAPE[0], 1))
    values[0, :64] = 0
    values[1, 32:96] = values[1, 32]
    values[2] = np.abs(values[2])
    values[3] = -np.abs(values[3])
    values[4, generator.integers(0, SHAPE[1], 8)] *= 30
    return values


def there_and_back(values: np.ndarray, kind: str) -> np.ndarray:
    raw = np.concatenate(list(quantize(values, kind)))
    return dequantize.dequantize(raw, kind, values.shape)


def error(values: np.ndarray, kind: str) -> float:
    difference = there_and_back(values, kind) - values
    return float(np.linalg.norm(difference) / np.linalg.norm(values))


@pytest.mark.parity
@pytest.mark.parametrize("kind", ROUNDED)
@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1))
def test_blocks_are_bitwise_those_of_the_library(kind: str, seed: int) -> None:
    values = random_values(seed)
    ours = np.concatenate(list(quantize(values, kind)))
    theirs = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(ours, theirs.view(np.uint8).reshape(-1))


@pytest.mark.parametrize("kind", SEARCHED)
@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1))
def test_searched_blocks_are_finite_and_near(kind: str, seed: int) -> None:
    values = random_values(seed)
    found = there_and_back(values, kind)
    assert np.isfinite(found).all()
    largest = np.abs(values.reshape(-1, 256)).max(1)
    bits = int(kind[1])
    assert (np.abs(found - values).reshape(-1, 256).max(1) <= 2.5 * largest / 2 ** (bits - 1)).all()


@pytest.mark.parametrize(("kind", "limit"), [("Q4_K", 0.073), ("Q5_K", 0.037), ("Q6_K", 0.018)])
def test_searching_beats_rounding(kind: str, limit: float) -> None:
    """On normally distributed weights; Q4_1 and Q5_1 are plain rounding at the same bits."""
    values = np.random.default_rng(0).standard_normal((32, 1024), np.float32) * 0.02
    assert error(values, kind) < limit
    plain = {"Q4_K": "Q4_1", "Q5_K": "Q5_1"}.get(kind)
    if plain:
        assert error(values, kind) < 0.97 * error(values, plain)
    else:  # six bits rounded to the largest of each 16, with the scale left exact
        groups = values.reshape(-1, 16)
        step = np.abs(groups).max(1, keepdims=True) / 31
        rounded = np.linalg.norm(np.rint(groups / step) * step - groups) / np.linalg.norm(groups)
        assert error(values, kind) < rounded


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_pieces_are_those_of_the_whole(kind: str) -> None:
    """Any float type is taken, and where a piece ends changes nothing."""
    values = np.random.default_rng(1).standard_normal((2 * CHUNK + 512) // 256 * 256, np.float32)
    halves = values.reshape(-1, 256).astype(np.float16)
    pieces = list(quantize(halves, kind))
    assert len(pieces) == 3
    last = quantize(halves.reshape(-1)[2 * CHUNK :].reshape(-1, 256), kind)
    assert np.array_equal(pieces[-1], np.concatenate(list(last)))


def test_the_mix_is_llama_cpps() -> None:
    def kinds(name: str, kind: str = "Q4_K_M", width: int = 512) -> list[str]:
        shape = (64, width)
        return [tensor_type(f"blk.{n}.{name}", shape, kind, 16, False) for n in range(16)]

    six = [n for n, kind in enumerate(kinds("ffn_down.weight")) if kind == "Q6_K"]
    assert six == [0, 1, 4, 7, 10, 13, 14, 15]
    assert kinds("attn_v.weight") == kinds("ffn_down.weight")
    assert set(kinds("attn_q.weight")) == {"Q4_K"} and set(kinds("attn_qkv.weight")) == {"Q5_K"}
    assert kinds("ffn_down.weight", width=544)[:4] == ["Q8_0", "Q8_0", "Q5_0", "Q5_0"]
    assert set(kinds("ffn_down.weight", width=40)) == {"F16"}
    assert tensor_type("output.weight", (64, 512), "Q4_0", 4, False) == "Q6_K"
    assert tensor_type("token_embd.weight", (64, 512), "Q4_0", 4, False) == "Q4_0"
    assert tensor_type("token_embd.weight", (64, 512), "Q4_K_M", 4, True) == "Q6_K"
    assert tensor_type("output.weight", (64, 512), "Q8_0", 4, False) == "Q8_0"
    assert tensor_type("blk.0.attn_norm.weight", (512,), "Q4_K_M", 4, False) == "F32"
