"""Damaged and hostile files, loaded whole: one clear error each, or a model; nothing else.

Headers alone are in test_gguf.py and test_transformers_folder.py; here every layout's loader meets
changed bytes and settings of any value.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.checkpoints.anyres_files import save_next
from tests.checkpoints.gguf.test_gguf import TOKENIZER as WORDS
from tests.checkpoints.llava_files import save_original, save_tower, tiny_peer
from tests.checkpoints.transformers_files import save_llava, save_qwen2
from tests.fakes import write_tiny_checkpoint
from tests.gguf_files import llama_metadata, tiny_config, write_llama
from visavis import load
from visavis.checkpoints.inspect import describe
from visavis.checkpoints.tensor_files import read_headers
from visavis.errors import CheckpointError, VisavisError

# What a number, a text or a list may be replaced by.
VALUES: list[Any] = [None, -1, 0, 3, 2**40, 1e30, float("nan"), "x", "", [], {}, [1, "a"], True]
VALUES += [{"a": 1}, [[1]]]
MUTATIONS = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])


def save_llava_original(folder: Path) -> None:
    peer = tiny_peer()
    save_original(folder, peer)
    save_tower(folder / "vision_tower", peer)


SAVERS: dict[str, Callable[[Path], object]] = {
    "native": write_tiny_checkpoint,
    "language model": save_qwen2,
    "llava": save_llava,
    "llava_next": save_next,
    "original": save_llava_original,
}


@pytest.fixture(scope="module", params=SAVERS)
def pristine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine") / "model"
    SAVERS[request.param](folder)
    load(folder, precision="f32", device="cpu")
    return folder


def opens_or_refuses(path: Path) -> None:
    """Describe and load; everything but our own errors fails the test."""
    for action in (describe, computes):
        try:
            action(path)
        except VisavisError as error:
            assert len(str(error)) > 40, "say what was found, what was expected and what to do"


def computes(path: Path) -> None:
    """Load a model and use it: what was accepted has to work."""
    model = load(path, precision="f32", device="cpu")
    trace = model.trace([1, 2, 3])
    assert trace.logits.shape == (3, model.vlm.config.decoder.vocab_size)
    assert trace.hidden.shape == (3, model.vlm.config.decoder.width)


WRONG: dict[str, Any] = {  # settings that contradict the weights or are no value of the setting
    "hidden_size": [48, 0, -32, "x", 32.5, None, True, 2**40],
    "num_hidden_layers": [1, 3, 0, -1, "x", 2.5, 2**31],
    "num_attention_heads": [3, 0, -4, "x", [4]],
    "intermediate_size": [7, 0, -1, "x", {}],
    "vocab_size": [1, 0, -1, "x", 2**40],
    "rms_norm_eps": [-1.0, "x", float("nan")],
    "model_type": ["qwen17", "", None, 3],
    "hidden_act": ["swish7", 3],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings_are_refused(name: str, tmp_path: Path) -> None:
    save_qwen2(tmp_path)
    path = tmp_path / "config.json"
    whole = json.loads(path.read_text())
    assert load(tmp_path, precision="f32").num_parameters > 0
    accepted = []
    for value in WRONG[name]:
        path.write_text(json.dumps(whole | {name: value}))
        try:
            load(tmp_path, precision="f32")
        except VisavisError as error:
            assert len(str(error)) > 40
        else:
            accepted.append(value)
    assert accepted == []


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value within a JSON document."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))


@given(data=st.data())
@MUTATIONS
def test_settings_of_any_value(pristine: Path, data: st.DataObject) -> None:
    names = [p.name for p in pristine.glob("*.json") if p.name != "tokenizer.json"]
    path = pristine / data.draw(st.sampled_from(sorted(names)))
    content = path.read_text()
    whole = json.loads(content)
    way = data.draw(st.sampled_from(list(places(whole))))
    inner = whole
    for key in way[:-1]:
        inner = inner[key]
    inner[way[-1]] = data.draw(st.sampled_from(VALUES))
    try:
        path.write_text(json.dumps(whole))
        opens_or_refuses(pristine)
    finally:
        path.write_text(content)


@given(data=st.data())
@MUTATIONS
def test_weights_with_changed_headers(pristine: Path, data: st.DataObject) -> None:
    path = pristine / "model.safetensors"
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    try:
        path.write_bytes(mutated(content, header, data))
        opens_or_refuses(pristine)
    finally:
        path.write_bytes(content)


def mutated(content: bytes, header: int, data: st.DataObject) -> bytes:
    """Return a file that is cut, or has numbers of its header changed."""
    if data.draw(st.booleans()):
        return content[: data.draw(st.integers(0, len(content)))]
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header - 1))
        new = data.draw(
            st.sampled_from([b"9", b"0", b"-", b"\xff", b"\0", b"\xff" * 8, b"\0" * 7 + b"\x7f"])
        )
        changed[at : at + len(new)] = new
    return bytes(changed)


GGUF_VALUES = [*(0, 1, -1, 3, 2**31, 2**40, -(2**40), 0.0, 1e30, float("inf"), "x", "", True)]
GGUF_VALUES += [np.array([1, 2], np.int32), np.array([], np.float32), ["a", "b"]]


@pytest.fixture(scope="module")
def gguf_metadata() -> dict[str, Any]:
    config = tiny_config(vocab_size=len(WORDS["tokenizer.ggml.tokens"]))
    return llama_metadata(config) | WORDS | {"split.count": 1, "general.alignment": 32}


@given(data=st.data())
@MUTATIONS
def test_gguf_metadata_of_any_value(
    gguf_metadata: dict[str, Any], tmp_path: Path, data: st.DataObject
) -> None:
    key = data.draw(st.sampled_from(sorted(gguf_metadata)))
    value = data.draw(st.sampled_from(GGUF_VALUES))
    config = tiny_config(vocab_size=len(WORDS["tokenizer.ggml.tokens"]))
    try:
        path = write_llama(tmp_path / "model.gguf", config, gguf_metadata | {key: value})
    except (TypeError, ValueError, struct.error):  # the writer refuses it itself
        return
    opens_or_refuses(path)


@given(data=st.data())
@MUTATIONS
def test_gguf_files_with_changed_headers(
    gguf_metadata: dict[str, Any], tmp_path: Path, data: st.DataObject
) -> None:
    config = tiny_config(vocab_size=len(WORDS["tokenizer.ggml.tokens"]))
    path = write_llama(tmp_path / "model.gguf", config, gguf_metadata)
    content = path.read_bytes()
    path.write_bytes(mutated(content, content.rfind(b"output_norm.weight") + 50, data))
    opens_or_refuses(path)


def test_a_refused_folder_is_left_as_it_was(tmp_path: Path) -> None:
    save_qwen2(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


HEADERS: dict[str, tuple[dict[str, Any], int]] = {  # header of a safetensors file, bytes of data
    "tensors that overlap": (
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        },
        12,
    ),
    "data beyond the file": ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, 8),
    "a gap": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, 8),
    "dimensions whose product overflows": (
        {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}},
        8,
    ),
    "another shape than size": ({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 8]}}, 8),
    "a negative dimension": ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, 8),
    "an unknown type": ({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 8]}}, 8),
    "no tensor but a number": ({"a": 3}, 8),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_lie(name: str, tmp_path: Path) -> None:
    header, size = HEADERS[name]
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    with pytest.raises(CheckpointError, match=r"cannot read .*model\.safetensors"):
        read_headers([path])


@pytest.mark.parametrize("length", [2**63, 2**40, 100_000_001, 0])
def test_header_lengths_that_lie(length: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}" * 50)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_headers([path])


def test_weights_under_another_ones_name(tmp_path: Path) -> None:
    """A torch file called safetensors, a folder in a file's place, a link that leads nowhere."""
    save_qwen2(tmp_path)
    path = tmp_path / "model.safetensors"
    torch.save({"a": torch.ones(3)}, path)
    with pytest.raises(CheckpointError, match=r"cannot read .*model\.safetensors"):
        load(tmp_path)
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no weights"):
        load(tmp_path)
    save_file({"a": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"cannot read .*pytorch_model\.bin as PyTorch"):
        load(tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(VisavisError, match="no such file"):
        load(tmp_path)
