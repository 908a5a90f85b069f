"""New models of parts: the made-up `tiny-random`, connectors new or taken over."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from visavis.checkpoints import tiny_random
from visavis.checkpoints.compose import Composition, compose
from visavis.checkpoints.load import load_checkpoint
from visavis.checkpoints.native import write_native
from visavis.errors import CheckpointError

RESAMPLER = {"kind": "resampler", "num_queries": 8, "depth": 1}


def composition(**settings: object) -> Composition:
    return Composition("tiny-random", "tiny-random", **{"connector": RESAMPLER, **settings})  # type: ignore[arg-type]


def test_tiny_random_is_the_same_everywhere(own_cache: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint("tiny-random", precision="f32")
    assert loaded.fingerprint == load_checkpoint("tiny-random", precision="f32").fingerprint
    tiny_random.write(tmp_path)
    for name in ("model.safetensors", "tokenizer.json", "visavis.json"):
        assert (tmp_path / name).read_bytes() == (tiny_random.fetch() / name).read_bytes()
    assert loaded.encoder.can_chat
    assert loaded.tokenizer.encode("What is on the left?").tokens[-1] == "?"


def test_new_parts_are_drawn_from_the_seed(own_cache: Path) -> None:
    """Learned queries are no layer's: they must not be left as memory happens to be."""
    first, again = (compose(composition(), precision="f32", seed=1).vlm for _ in range(2))
    other = compose(composition(), precision="f32", seed=2).vlm
    for name, tensor in first.connector.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(tensor, again.get_parameter(f"connector.{name}")), name
    queries = first.get_parameter("connector.queries")
    assert 0.9 < queries.std() < 1.1
    assert not torch.equal(queries, other.get_parameter("connector.queries"))


def test_a_connector_is_taken_over(own_cache: Path, tmp_path: Path) -> None:
    first = compose(composition(canvases=((1, 2), (2, 2))), precision="f32", seed=1)
    write_native(first, tmp_path)
    second = compose(composition(canvases=((2, 2),), connector_weights=str(tmp_path)), seed=2).vlm
    for name in ("connector.queries", "image_newline"):
        assert torch.equal(first.vlm.get_parameter(name), second.get_parameter(name))
    assert first.processor is not None and first.processor.tiles is not None
    assert first.processor.tiles.grids == ((64, 128), (128, 128))  # width and height in pixels
    linear = composition(connector={"kind": "linear"}, connector_weights=str(tmp_path))
    with pytest.raises(CheckpointError, match="no connector that fits: connector.layers.0.weight"):
        compose(linear)


def test_a_model_without_a_tower_gives_none(own_cache: Path, tmp_path: Path) -> None:
    blind = load_checkpoint("tiny-random", precision="f32")
    blind.vlm.tower = blind.vlm.connector = None
    blind.vlm.config = type(blind.vlm.config)(decoder=blind.vlm.config.decoder)
    write_native(blind, tmp_path)
    with pytest.raises(CheckpointError, match="has no vision tower"):
        compose(Composition("tiny-random", str(tmp_path), {"kind": "linear"}))
