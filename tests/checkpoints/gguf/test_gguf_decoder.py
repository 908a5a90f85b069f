"""The llama table: both directions, every variant, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from tests.gguf_files import (
    llama_metadata,
    random_state,
    tiny_config,
    write_gguf,
    write_llama,
)
from visavis.checkpoints.gguf.decoder import (
    decoder_config,
    decoder_state,
    decoder_tensors,
    gguf_state,
)
from visavis.checkpoints.gguf.reader import open_gguf
from visavis.errors import CheckpointError, CheckpointWarning
from visavis.model.config import DecoderConfig, RopeScaling, VLMConfig
from visavis.model.vlm import VLM

VARIANTS = {
    "tied": {},
    "untied": {"tied_head": False},
    "biases": {"qkv_bias": True, "out_bias": True},
    "one head each": {"num_kv_heads": 4},
    "wide heads": {"head_dim": 16, "num_kv_heads": 1},
    "rope factors": {"rope_scaling": RopeScaling("factors", factors=(1.0, 2.0, 3.0, 4.0))},
    "other base": {"rope_base": 500000.0, "norm_eps": 2.0**-17},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_model_comes_back_as_it_was(changes: dict, tmp_path: Path) -> None:
    config = tiny_config(**{"norm_eps": 2.0**-16} | changes)
    file = open_gguf(write_llama(tmp_path / "model.gguf", config))
    assert decoder_config(file) == config
    state, expected = dict(decoder_state(file)), random_state(config)
    assert state.keys() == expected.keys()
    for name in state:
        assert np.array_equal(state[name], expected[name]), name
    with torch.device("meta"):
        wanted = {name: tuple(t.shape) for name, t in VLM(VLMConfig(config)).state_dict().items()}
    if config.tied_head:
        del wanted["decoder.head.weight"]
    assert {name: array.shape for name, array in state.items()} == wanted
    again = dict(gguf_state(state, config))
    assert again.keys() == file.tensors.keys()
    for name in again:
        assert np.array_equal(again[name], file.dequantize(name)), name


def test_rotary_rows_are_unpermuted_as_the_converter_permuted_them(tmp_path: Path) -> None:
    """llama.cpp's converter interleaves the two halves of each head; this is its formula."""
    config = tiny_config()
    ours = random_state(config)["decoder.blocks.0.qkv.weight"][:32]  # q: 4 heads of 8
    theirs = ours.reshape(4, 2, 4, 32).swapaxes(1, 2).reshape(32, 32)
    file = open_gguf(write_llama(tmp_path / "model.gguf", config))
    assert np.array_equal(file.dequantize("blk.0.attn_q.weight"), theirs)


def test_quantised_rows_move_like_values(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = dict(gguf_state(random_state(config), config))
    types = {name: "Q4_1" for name in tensors if "attn_" in name and "norm" not in name}
    for name in types:
        tensors[name] = gguf.quants.quantize(tensors[name], gguf.GGMLQuantizationType.Q4_1)
    path = write_gguf(tmp_path / "q.gguf", llama_metadata(config), tensors, types)
    file = open_gguf(path)
    state = dict(decoder_state(file))
    for ours, stored in decoder_tensors(file):
        if ours.endswith("qkv.weight"):
            parts = [part.parts() for part in stored]
            codes = np.concatenate([p.codes for p in parts]).astype(np.float32)
            scale = np.concatenate([p.scale for p in parts]).repeat(32, 1)
            minimum = np.concatenate([p.minimum for p in parts]).repeat(32, 1)
            assert np.array_equal(codes * scale + minimum, state[ours])
    exact = random_state(config)["decoder.blocks.0.qkv.weight"]
    assert np.abs(state["decoder.blocks.0.qkv.weight"] - exact).max() < 0.3


def test_numbers_per_layer_are_read(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = dict(gguf_state(random_state(config), config))
    tensors["blk.1.ffn_gate.weight"] = tensors["blk.1.ffn_gate.weight"][:32].copy()
    tensors["blk.1.ffn_up.weight"] = tensors["blk.1.ffn_up.weight"][:32].copy()
    tensors["blk.1.ffn_down.weight"] = tensors["blk.1.ffn_down.weight"][:, :32].copy()
    metadata = llama_metadata(config) | {
        "llama.feed_forward_length": [64, 32],
        "llama.attention.head_count": [4, 4],
    }
    file = open_gguf(write_gguf(tmp_path / "model.gguf", metadata, tensors))
    found = decoder_config(file)
    assert found.ffn_width == (64, 32) and found.num_heads == 4
    shapes = {name: array.shape for name, array in decoder_state(file)}
    assert shapes["decoder.blocks.1.up.weight"] == (64, 32)


def test_linear_rope_scaling_is_read_and_yarn_refused(tmp_path: Path) -> None:
    config = tiny_config()
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    file = open_gguf(write_llama(tmp_path / "linear.gguf", config, scaling))
    assert decoder_config(file).rope_scaling == RopeScaling("linear", factor=4.0)
    scaling["llama.rope.scaling.type"] = "yarn"
    file = open_gguf(write_llama(tmp_path / "yarn.gguf", config, scaling))
    with pytest.raises(CheckpointError, match="rope scaling 'yarn'"):
        decoder_config(file)


def broken(config: DecoderConfig, tmp_path: Path, **tensors: np.ndarray | None) -> str:
    """Return the error of a model with some tensors changed, or left out (None)."""
    state = dict(gguf_state(random_state(config), config)) | tensors
    kept = {name: array for name, array in state.items() if array is not None}
    file = open_gguf(write_gguf(tmp_path / "broken.gguf", llama_metadata(config), kept))
    with pytest.raises(CheckpointError) as raised:
        dict(decoder_state(file))
    return str(raised.value)


def test_missing_unexpected_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    config = tiny_config()
    assert "missing blk.1.ffn_up.weight" in broken(
        config, tmp_path, **{"blk.1.ffn_up.weight": None}
    )
    assert "unexpected blk.0.attn_q_norm.weight" in broken(
        config, tmp_path, **{"blk.0.attn_q_norm.weight": np.zeros(8, np.float32)}
    )
    assert "blk.0.attn_norm.weight has shape (31,), expected (32,)" in broken(
        config, tmp_path, **{"blk.0.attn_norm.weight": np.zeros(31, np.float32)}
    )
    assert "rope_freqs.weight has shape (3,)" in broken(
        config, tmp_path, **{"rope_freqs.weight": np.ones(3, np.float32)}
    )


def test_values_that_are_not_finite_are_warned_of(tmp_path: Path) -> None:
    config = tiny_config()
    damaged = np.ones(32, np.float32)
    damaged[5] = np.nan
    state = dict(gguf_state(random_state(config), config)) | {"output_norm.weight": damaged}
    file = open_gguf(write_gguf(tmp_path / "strange.gguf", llama_metadata(config), state))
    with pytest.warns(CheckpointWarning, match=r"decoder\.norm\.weight of .* holds NaN"):
        dict(decoder_state(file))


def test_other_architectures_and_incomplete_metadata_are_refused(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = dict(gguf_state(random_state(config), config))
    path = write_gguf(tmp_path / "other.gguf", {}, tensors, architecture="mamba")
    with pytest.raises(CheckpointError, match="architecture 'mamba', expected one of llama, "):
        decoder_config(open_gguf(path))
    metadata = llama_metadata(config)
    del metadata["llama.context_length"]
    path = write_gguf(tmp_path / "lacking.gguf", metadata, tensors)
    with pytest.raises(CheckpointError, match="lacks 'llama.context_length'"):
        decoder_config(open_gguf(path))
