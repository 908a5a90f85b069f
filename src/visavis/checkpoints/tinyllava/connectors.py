"""TinyLLaVA's connectors: `connector_type` as our config, the names of their tensors as ours.

Takes parsed JSON; opens no file.
"""

from __future__ import annotations

import re
from typing import Any

from visavis.checkpoints.transformers.config_reader import Json, count, require, without_nulls
from visavis.checkpoints.weight_mapping import MappingRow
from visavis.model.config import ConnectorConfig

DEFAULTS: dict[str, Any] = {"num_queries": 128, "num_resampler_layers": 3}
BERT_LAYERS, BERT_WIDTH = 12, 768  # of the Q-Former: bert-base-uncased's, in no config.json
TENSORS = ("weight", "bias")


def connector_config(config: Json, in_width: int, out_width: int) -> ConnectorConfig:
    """Return the connector that a config.json names.

    Raises:
        CheckpointError: none that is read, or one that does not fit its neighbours.
    """
    config = DEFAULTS | without_nulls(config)
    kind = str(config.get("connector_type"))
    if mlp := re.fullmatch("mlp([1-9][0-9]?)x_gelu", kind):
        return ConnectorConfig("mlp", in_width, out_width, depth=int(mlp[1]))
    if kind == "identity":
        require("connector_type", kind, in_width == out_width, "another: the widths differ")
    if kind in ("identity", "linear"):
        return ConnectorConfig(kind, in_width, out_width)
    if kind == "mof_mlp":
        return ConnectorConfig("mixture", in_width, out_width, depth=2)
    known = "'identity', 'linear', 'mlpNx_gelu', 'mof_mlp', 'resampler' or 'qformer'"
    require("connector_type", kind, kind in ("resampler", "qformer"), known)
    queries = count(config, "num_queries")
    if kind == "resampler":
        depth = count(config, "num_resampler_layers")
        require("num_resampler_layers", depth, depth < 100, "less than 100")
        return ConnectorConfig(kind, in_width, out_width, depth=depth, num_queries=queries)
    return ConnectorConfig(
        kind,
        in_width,
        out_width,
        depth=BERT_LAYERS,
        hidden_width=BERT_WIDTH,
        num_queries=queries,
    )


def connector_type(config: ConnectorConfig) -> tuple[dict[str, Any], str]:
    """Return the settings of config.json that name a connector, and their value for people;
    whether they say all of it shows by reading them again."""
    name = {"mlp": f"mlp{config.depth}x_gelu", "mixture": "mof_mlp"}.get(config.kind, config.kind)
    found: dict[str, Any] = {"connector_type": name}
    if config.num_queries:
        found["num_queries"] = config.num_queries
    if config.kind == "resampler":
        found["num_resampler_layers"] = config.depth
    return found, name


def connector_rows(config: ConnectorConfig, prefix: str) -> tuple[MappingRow, ...]:
    """Rows of a connector; `prefix` ends in no dot."""
    return {
        "identity": lambda *_: (),
        "linear": _linear,
        "mlp": _mlp,
        "mixture": _mixture,
        "resampler": _resampler,
        "qformer": _qformer,
    }[config.kind](config, prefix)


def ignored_names(config: ConnectorConfig, prefix: str) -> tuple[str, ...]:
    """Return names that a file may hold and nothing needs."""
    return (f"{prefix}.bert.embeddings.position_ids",) if config.kind == "qformer" else ()


def _pairs(ours: str, theirs: str, tensors: tuple[str, ...] = TENSORS) -> list[MappingRow]:
    return [MappingRow(f"connector.{ours}.{tensor}", (f"{theirs}.{tensor}",)) for tensor in tensors]


def _linear(config: ConnectorConfig, prefix: str) -> tuple[MappingRow, ...]:
    return tuple(_pairs("layers.0", prefix))


def _mlp(config: ConnectorConfig, prefix: str) -> tuple[MappingRow, ...]:
    places = range(0, 2 * config.depth, 2)
    return tuple(row for n in places for row in _pairs(f"layers.{n}", f"{prefix}.{n}"))


def _mixture(config: ConnectorConfig, prefix: str) -> tuple[MappingRow, ...]:
    return tuple(
        row
        for ours, theirs in (("first", "clip"), ("second", "dinov2"))
        for n in range(0, 2 * config.depth, 2)
        for row in _pairs(f"{ours}.{n}", f"{prefix}.{theirs}.{n}")
    )


def _resampler(config: ConnectorConfig, prefix: str) -> tuple[MappingRow, ...]:
    block = f"{prefix}.layers.*"
    rows = [MappingRow("connector.queries", (f"{prefix}.latents",))]
    rows += _pairs("input", f"{prefix}.linear") + _pairs("norm", f"{prefix}.norm")
    for ours, theirs in (
        ("feature_norm", "0.norm_media"),
        ("query_norm", "0.norm_latents"),
        ("ffn_norm", "1.0"),
    ):
        rows += _pairs(f"blocks.*.{ours}", f"{block}.{theirs}")
    for ours, theirs in (
        ("q", "0.to_q"),
        ("kv", "0.to_kv"),
        ("out", "0.to_out"),
        ("up", "1.1"),
        ("down", "1.3"),
    ):
        rows += _pairs(f"blocks.*.{ours}", f"{block}.{theirs}", ("weight",))
    return tuple(rows)


def _qformer(config: ConnectorConfig, prefix: str) -> tuple[MappingRow, ...]:
    block = f"{prefix}.bert.encoder.layer.*"
    rows = [MappingRow("connector.queries", (f"{prefix}.query_tokens",), unit_axes=1)]
    rows += _pairs("output", f"{prefix}.projector")
    for ours, theirs in (("attention", "attention"), ("cross_attention", "crossattention")):
        for part, name in (
            ("q", "self.query"),
            ("k", "self.key"),
            ("v", "self.value"),
            ("out", "output.dense"),
            ("norm", "output.LayerNorm"),
        ):
            rows += _pairs(f"blocks.*.{ours}.{part}", f"{block}.{theirs}.{name}")
    for ours, theirs in (
        ("up", "intermediate_query.dense"),
        ("down", "output_query.dense"),
        ("norm", "output_query.LayerNorm"),
    ):
        rows += _pairs(f"blocks.*.{ours}", f"{block}.{theirs}")
    return tuple(rows)
