"""Integers with scales: rounding, packing on any processor, and products that are alike."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from visavis.model import quantized_linear
from visavis.model.quantized_linear import (
    Groups,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedRows,
    _with_low_rank,
    has_kernel,
    kernel_layout,
    multiply,
    packed_kernels,
    quantize,
)

SHAPES = [(64, 64), (96, 32), (188, 128), (960, 576)]
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "far from zero": lambda x: x * 0.1 + 10,
    "heavy tails": lambda x: x**5,
    "tiny": lambda x: x * 1e-20,
    "one number": lambda x: torch.full_like(x, 0.37),
    "zeros": torch.zeros_like,
}
ROUNDING = 2.0**-8  # of bfloat16, relative


def packed(num_rows: int, inside: int, bits: int, group: int = 32) -> QuantizedRows:
    return QuantizedRows.of(quantize(torch.randn(num_rows, inside) * 0.05, bits, group))


def weight(rows: QuantizedRows) -> Tensor:
    return rows.groups(torch.arange(rows.num_rows)).values()


def rounding(groups: Groups) -> Tensor:
    """Return how far values may lie from those of scales that are not rounded."""
    scale, zero = groups.scales.float().abs().unbind(-1)
    middle, times = (8, 1) if groups.bits == 4 else (136, 17)
    away = (groups.codes.float() - middle).abs().unflatten(1, (scale.shape[1], -1))
    return (ROUNDING * 1.01 * (away * scale[..., None] + times * zero[..., None])).flatten(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 32), (8, 64)])
def test_numbers_are_rounded_to_half_a_step(kind: str, bits: int, group: int) -> None:
    torch.manual_seed(0)
    values = KINDS[kind](torch.randn(24, 128))
    found = quantize(values, bits, group)
    assert found.codes.dtype == torch.uint8 and int(found.codes.max()) < 2**bits
    assert (found.bits, found.group) == (bits, group)
    step = found.affine()[0].repeat_interleave(group, 1)
    assert ((found.values() - values).abs() <= 0.51 * step + rounding(found)).all()


def test_codes_that_fit_stay_as_they_are() -> None:
    """Scales and minimums that bfloat16 holds give back the very numbers."""
    codes = torch.arange(64, dtype=torch.uint8).view(2, 32) % 16
    scale, minimum = torch.full((2, 1), 0.25), torch.full((2, 1), -3.0)
    four = Groups.of(codes, scale, minimum, 4)
    assert torch.equal(four.values(), codes * 0.25 - 3)
    eight = Groups.of(codes + 136, scale, -136 * scale, 8)
    assert torch.equal(eight.values(), codes * 0.25)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_rows_come_back(shape: tuple[int, int], bits: int) -> None:
    torch.manual_seed(1)
    groups = quantize(torch.randn(shape), bits)
    rows = QuantizedRows(*shape, bits)
    for start in range(0, shape[0], 64):
        rows.fill(start, groups.between(start, start + 64))
    chosen = torch.tensor([shape[0] - 1, 0, 31, 32, 7])
    for numbers in (torch.arange(shape[0]), chosen):
        found = rows.groups(numbers)
        assert torch.equal(found.codes, groups.codes[numbers])
        assert torch.equal(found.scales, groups.scales[numbers])
    tiles = torch.cat(list(rows.tiles(torch.float32)), 1).T
    assert torch.allclose(tiles, groups.values(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("processor", ["avx2", "default"])
def test_other_processors_pack_otherwise(processor: str) -> None:
    """Their kernels read rows in other orders, which are found out too."""
    code = (
        "import torch; from visavis.model.quantized_linear import *\n"
        "for bits in (4, 8):\n"
        "    groups = quantize(torch.randn(188, 64), bits)\n"
        "    rows = QuantizedRows.of(groups)\n"
        "    assert torch.equal(rows.groups(torch.arange(188)).codes, groups.codes)\n"
        "    tiles = torch.cat(list(rows.tiles(torch.float32)), 1).T\n"
        "    assert torch.allclose(tiles, groups.values(), rtol=0, atol=1e-6)\n"
        "    x = torch.eye(64).bfloat16()\n"
        "    product = rows.product(torch.float32)(x).T\n"
        "    assert (product - groups.values()).abs().max() < 0.02\n"
        "print(torch.backends.cpu.get_cpu_capability(), kernel_layout())"
    )
    environment = os.environ | {"ATEN_CPU_CAPABILITY": processor}
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("bits", [4, 8])
def test_products_are_those_of_the_values(bits: int, group: int) -> None:
    torch.manual_seed(2)
    rows = packed(188, 128, bits, group)
    x = torch.randn(5, 128).bfloat16()
    expected = x.float() @ weight(rows).T
    allowed = 0.01 * expected.abs().max()
    linear = QuantizedLinear([rows])
    assert (linear(x).float() - expected).abs().max() < allowed
    with packed_kernels():
        assert (linear(x).float() - expected).abs().max() < allowed
    assert (linear.weight.float() - weight(rows)).abs().max() <= ROUNDING * weight(rows).abs().max()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_does_not_depend_on_its_company(bits: int) -> None:
    torch.manual_seed(3)
    linear = QuantizedLinear([packed(192, 576, bits)])
    x = torch.randn(40, 576).bfloat16()
    for decoding in (True, False):
        run = linear.product() if decoding else linear.forward
        together = run(x)
        for start, end in ((0, 1), (7, 9), (3, 20), (12, 39)):
            assert torch.equal(run(x[start:end]), together[start:end])


def test_parts_biases_and_low_rank_pairs_add_up() -> None:
    torch.manual_seed(4)
    parts = [packed(64, 64, 4), packed(40, 64, 8)]
    bias, low, high = torch.randn(104), torch.randn(4, 64) * 0.1, torch.randn(104, 4) * 0.1
    linear = QuantizedLinear(parts, bias=bias, low_rank=(low, high))
    assert (linear.num_weights, len(linear.weight)) == (104 * 64, 104)
    whole = torch.cat([weight(part) for part in parts]) + high @ low
    kept = QuantizedLinear(parts, bias=bias, dense=linear.weight, low_rank=(low, high))
    x = torch.randn(3, 64).bfloat16()
    expected = x.float() @ whole.T + bias
    with packed_kernels():
        packed_results = [linear(x), kept(x)]
    for found in (linear(x), kept(x), *packed_results):
        assert (found.float() - expected).abs().max() < 0.02 * expected.abs().max()


def test_a_model_in_float32_keeps_its_type() -> None:
    torch.manual_seed(5)
    linear = QuantizedLinear([packed(64, 64, 8)], dtype=torch.float32)
    x = torch.randn(2, 64)
    expected = x @ weight(linear.parts[0]).T
    assert torch.allclose(linear(x), expected, atol=1e-5)
    with packed_kernels():
        found = linear(x)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


def test_embeddings_are_rows_of_a_head() -> None:
    torch.manual_seed(6)
    rows = packed(100, 64, 8)
    embedding = QuantizedEmbedding([rows])
    ids = torch.tensor([99, 0, 5, 5, 64])
    assert torch.equal(embedding(ids), weight(rows)[ids])


@pytest.mark.parametrize("width", [64, 1536])
def test_a_row_of_a_low_rank_product_does_not_depend_on_the_others(width: int) -> None:
    torch.manual_seed(5)
    down, up = torch.randn(16, width).bfloat16().T, torch.randn(16, 64).bfloat16()
    product = _with_low_rank(lambda x: x[:, :64], down, up)
    for _ in range(100):
        x = torch.randn(6, width).bfloat16()
        alone = torch.cat([product(row) for row in x.split(1)])
        for start, end in ((0, 6), (0, 4), (3, 5), (1, 4)):
            assert torch.equal(product(x[start:end]), alone[start:end])
    torch.testing.assert_close(alone, torch.addmm(x[:, :64], x @ down, up), atol=1.0, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [20, 64, 1536])
def test_a_row_of_a_dense_product_does_not_depend_on_the_others(
    width: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(5)
    linear = torch.nn.Linear(width, 70).to(dtype)
    with torch.inference_mode():
        product = multiply(linear)
        for _ in range(20):
            x = torch.randn(18, width).to(dtype)
            alone = torch.cat([product(row) for row in x.split(1)])
            for start, end in ((0, 18), (0, 4), (3, 5), (1, 4), (5, 14)):
                assert torch.equal(product(x[start:end]), alone[start:end])
        torch.testing.assert_close(alone, linear(x), atol=0.02, rtol=0.02)


def test_a_pytorch_without_the_private_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may go, or lay weights out in another order: neither is an error by itself."""
    assert has_kernel()
    for replacement in (
        lambda codes: torch.ops.aten._no_such_operator(codes),
        lambda codes: torch.zeros(len(codes), codes.shape[1] // 2, dtype=torch.uint8),
    ):
        monkeypatch.setattr(quantized_linear, "_pack", replacement)
        kernel_layout.cache_clear()
        has_kernel.cache_clear()
        try:
            assert not has_kernel()
        finally:
            monkeypatch.undo()
            kernel_layout.cache_clear()
            has_kernel.cache_clear()
