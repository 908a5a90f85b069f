"""OpenELM's config.json as a `DecoderConfig`: heads and feed-forward widths grow layer by layer.

transformers has no class for it; names and formulas are those of Apple's files. Knows no tensor
names (see `names.py`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from visavis.checkpoints.transformers.settings import (
    Json,
    activation,
    count,
    num_layers,
    number,
    require,
    without_nulls,
)
from visavis.model.config import DecoderConfig

NORM_EPS = 1e-6  # in Apple's code, not in its config
DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "max_context_length": 2048,
    "num_transformer_layers": 12,
    "model_dim": 2048,
    "head_dim": 128,
    "qkv_multipliers": 1.0,
    "num_gqa_groups": 1,
    "ffn_multipliers": 4.0,
    "ffn_with_glu": True,
    "ffn_dim_divisor": 256,
    "activation_fn_name": "swish",
    "normalization_layer_name": "rms_norm",
    "normalize_qk_projections": False,
    "share_input_output_layers": False,
    "rope_freq_constant": 10000,
}


def openelm_config(config: Json) -> DecoderConfig:
    """Return the decoder that a config.json of type openelm describes.

    Raises:
        CheckpointError: a setting that our decoder has not.
    """
    config = DEFAULTS | without_nulls(config)
    norm = config["normalization_layer_name"]
    require("normalization_layer_name", norm, norm == "rms_norm", "'rms_norm'")
    layers = num_layers({"num_hidden_layers": config["num_transformer_layers"]})
    width, head_dim = count(config, "model_dim"), count(config, "head_dim")
    groups = count(config, "num_gqa_groups")
    require("head_dim", head_dim, head_dim % 2 == 0, "an even number")
    query_dims = [
        _divisible(width * share, head_dim * groups)
        for share in _per_layer(config, "qkv_multipliers", layers)
    ]
    derived = tuple(dim // head_dim for dim in query_dims)
    heads = _counts(config, "num_query_heads", derived)
    kv_heads = _counts(config, "num_kv_heads", tuple(num // groups for num in heads))
    fits = all(num % kv == 0 for num, kv in zip(heads, kv_heads, strict=True))
    require("num_kv_heads", kv_heads, fits, f"divisors of {heads}")
    divisor = count(config, "ffn_dim_divisor")
    ffn = (_divisible(width * m, divisor) for m in _per_layer(config, "ffn_multipliers", layers))
    return DecoderConfig(
        vocab_size=count(config, "vocab_size"),
        width=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_width=tuple(ffn),
        context_length=count(config, "max_context_length"),
        norm_eps=NORM_EPS,
        activation=activation({"hidden_act": config["activation_fn_name"]}),
        gated=bool(config["ffn_with_glu"]),
        rope_base=number(config, "rope_freq_constant"),
        qk_norm=bool(config["normalize_qk_projections"]),
        tied_head=bool(config["share_input_output_layers"]),
    )


def _per_layer(config: Json, name: str, layers: int) -> list[float]:
    """Return one number per layer from one for all, from the first and last, or from all."""
    value = config[name]
    listed = value if isinstance(value, list) else [value] * layers
    numbers = all(isinstance(v, int | float) and 0 < v < 1000 for v in listed)
    known = numbers and len(listed) in (2, layers)
    require(name, value, known, f"a number, the first and last of {layers}, or all of them")
    if len(listed) == layers:
        return list(map(float, listed))
    first, last = listed
    steps: list[float] = np.linspace(first, last, layers).round(2).tolist()
    return steps


def _counts(config: Json, name: str, derived: tuple[int, ...]) -> tuple[int, ...]:
    """Return numbers of heads as the file lists them, or else as they follow from multipliers."""
    value = config.get(name, list(derived))
    whole = isinstance(value, list) and all(isinstance(v, int) and 0 < v < 2**20 for v in value)
    fits = whole and len(value) == len(derived)
    require(name, value, fits, f"{len(derived)} positive whole numbers")
    return tuple(value)


def _divisible(value: float, divisor: int) -> int:
    """Round to a multiple of `divisor`, at least one of them and never more than 10 % down."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded
