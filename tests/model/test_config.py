"""Configs survive a trip through JSON, and what they compute is right."""

from __future__ import annotations

import json
from typing import Any

import pytest

from visavis.model.config import (
    ConnectorConfig,
    DecoderConfig,
    EfficientNetConfig,
    HeadConfig,
    RopeScaling,
    ViTConfig,
    VLMConfig,
    to_dict,
    vlm_config_from_dict,
)

PLAIN = DecoderConfig(40, 32, 2, 4, 2, 8, 48, 64)
PER_LAYER = DecoderConfig(
    *(40, 32, 2, (2, 4), (1, 2), 8, (16, 24), 64),
    rope_scaling=RopeScaling("factors", factors=(1.0, 2.0, 4.0, 8.0)),
    mrope_sections=(1, 1, 2),
)
VIT = ViTConfig(28, 7, 16, 2, 2, 24, "gelu", 1e-6, num_registers=4, position_antialias=True)
CONFIGS = [
    VLMConfig(PLAIN),
    VLMConfig(PER_LAYER, VIT, ConnectorConfig("linear", 16, 32), HeadConfig((1, 2), 8), 39, -2),
    VLMConfig(PLAIN, EfficientNetConfig(2, 260), ConnectorConfig("mlp", 1280, 32, 2, shuffle=3)),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_survives_json(config: VLMConfig) -> None:
    assert vlm_config_from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("change", [{"unknown": 1}, {"decoder": {"vocab_size": 3}}])
def test_unknown_and_missing_fields_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        vlm_config_from_dict(to_dict(CONFIGS[0]) | change)


def test_sizes_per_layer() -> None:
    assert [PER_LAYER.per_layer(PER_LAYER.num_heads, layer) for layer in (0, 1)] == [2, 4]
    assert [PLAIN.per_layer(PLAIN.num_heads, layer) for layer in (0, 1)] == [4, 4]


@pytest.mark.parametrize(("fraction", "expected"), [(1.0, 80), (0.4, 32), (0.25, 20), (0.3, 24)])
def test_the_rotating_part_is_even(fraction: float, expected: int) -> None:
    config = DecoderConfig(40, 80, 1, 1, 1, 80, 8, 64, rope_fraction=fraction)
    assert config.rotary_dim == expected
