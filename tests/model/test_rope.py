"""Rotary embeddings against complex multiplication, and the sections of M-RoPE."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from visavis.model.config import DecoderConfig, RopeScaling
from visavis.model.rope import Rope, rotate

CONFIG = DecoderConfig(8, 32, 1, 2, 2, 16, 8, 64)


def by_formula(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """Turn channel pairs (i, i + dim / 2) of x [T, heads, dim]; positions [T] or [T, dim / 2]."""
    first, second = x.chunk(2, -1)
    angles = positions.reshape(len(x), -1) * frequencies  # [T, dim / 2]
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((turned.real, turned.imag), -1)


def random_x(length: int) -> Tensor:
    return torch.randn(length, 2, 16, generator=torch.Generator().manual_seed(length))


FREQUENCIES = 10000.0 ** -(torch.arange(8) / 8)


def test_turns_pairs_half_a_head_apart() -> None:
    positions = torch.tensor([0, 1, 2, 40, 700, 3])  # 700: the table grows
    x = random_x(6)
    out = rotate(x, *Rope(CONFIG)(positions, torch.float32))
    torch.testing.assert_close(out, by_formula(x, positions, FREQUENCIES), atol=2e-5, rtol=1e-4)


def test_part_of_the_head_may_stay() -> None:
    config = replace(CONFIG, rope_fraction=0.5)
    x, positions = random_x(5), torch.arange(5)
    out = rotate(x, *Rope(config)(positions, torch.float32))
    frequencies = 10000.0 ** -(torch.arange(4) / 4)
    torch.testing.assert_close(out[..., :8], by_formula(x[..., :8], positions, frequencies))
    assert torch.equal(out[..., 8:], x[..., 8:])


def test_linear_scaling_and_factors_divide_frequencies() -> None:
    x, positions = random_x(5), torch.arange(5)
    factors = tuple(float(n) for n in range(1, 9))
    for scaling, divisor in (
        (RopeScaling("linear", factor=4.0), torch.tensor(4.0)),
        (RopeScaling("factors", factors=factors), torch.tensor(factors)),
    ):
        out = rotate(x, *Rope(replace(CONFIG, rope_scaling=scaling))(positions, torch.float32))
        torch.testing.assert_close(out, by_formula(x, positions, FREQUENCIES / divisor))


@pytest.mark.parametrize("sections", [(2, 3, 3), (8,), (4, 4)])
def test_each_section_follows_its_own_axis(sections: tuple[int, ...]) -> None:
    rope = Rope(replace(CONFIG, mrope_sections=sections))
    x = random_x(7)
    positions = torch.randint(50, (len(sections), 7), generator=torch.Generator().manual_seed(1))
    out = rotate(x, *rope(positions, torch.float32))
    per_frequency = torch.cat(
        [axis[:, None].expand(-1, n) for axis, n in zip(positions, sections, strict=True)], 1
    )
    torch.testing.assert_close(out, by_formula(x, per_frequency, FREQUENCIES), atol=2e-5, rtol=1e-4)


def test_text_in_sections_is_plain_rope() -> None:
    positions = torch.arange(9)
    plain = Rope(CONFIG)(positions, torch.float32)
    sectioned = Rope(replace(CONFIG, mrope_sections=(2, 3, 3)))
    torch.testing.assert_close(sectioned(positions.expand(3, -1), torch.float32), plain)


def test_frequencies_are_real_when_the_model_is_built_without_storage() -> None:
    with torch.device("meta"):
        rope = Rope(replace(CONFIG, rope_scaling=RopeScaling("factors", factors=(2.0,) * 8)))
    torch.testing.assert_close(rope.frequencies, FREQUENCIES / 2)
