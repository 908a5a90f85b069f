"""Models cut into several GGUF files, cut by the `gguf` library itself."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from tests.gguf_files import (
    add_value,
    llama_metadata,
    random_state,
    tiny_config,
    write_gguf,
    write_llama,
)
from visavis.checkpoints.gguf.decoder import decoder_config, decoder_state, gguf_state
from visavis.checkpoints.gguf.reader import open_gguf, open_model
from visavis.errors import CheckpointError


def write_split(folder: Path, name: str = "tiny", seed: int = 0) -> list[Path]:
    """Write a model of 20 tensors, at most 8 in a file."""
    config = tiny_config()
    writer = gguf.GGUFWriter(folder / f"{name}.gguf", "llama", split_max_tensors=8)
    for key, value in llama_metadata(config).items():
        add_value(writer, key, value)
    for tensor_name, array in gguf_state(random_state(config, seed), config):
        writer.add_tensor(tensor_name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob(f"{name}-*-of-*.gguf"))


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        open_model(path)
    return str(raised.value)


def test_parts_are_the_whole_model(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    assert len(paths) == 3
    whole = open_gguf(write_llama(tmp_path / "whole.gguf", tiny_config()))
    expected = dict(decoder_state(whole))
    for path in paths:  # any part stands for all
        file, found = open_model(path)
        assert found == paths
        assert decoder_config(file) == decoder_config(whole)
        state = dict(decoder_state(file))
        assert state.keys() == expected.keys()
        assert all(np.array_equal(state[name], expected[name]) for name in expected)


def test_a_whole_file_is_itself(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "whole.gguf", tiny_config())
    file, paths = open_model(path)
    assert paths == [path] and file.tensors.keys() == open_gguf(path).tensors.keys()


def test_missing_parts_are_named(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    paths[1].unlink()
    assert "lacks tiny-00002-of-00003.gguf of 3 parts" in refusal(paths[0])


def test_parts_that_are_not_what_their_names_say(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    content = [path.read_bytes() for path in paths]
    paths[1].write_bytes(content[2])
    paths[2].write_bytes(content[1])
    assert "says it is part 2 of 3, expected 1 (from 0) of 3" in refusal(paths[0])
    paths[1].write_bytes(content[1][:-40])
    assert "the file ends at byte" in refusal(paths[0])
    paths[0].rename(tmp_path / "renamed.gguf")
    assert "expected a name that ends in -00001-of-00003.gguf" in refusal(tmp_path / "renamed.gguf")
    other = tmp_path / "renamed-00001-of-00002.gguf"
    (tmp_path / "renamed.gguf").rename(other)
    assert "one of 3 parts" in refusal(other)


def test_counts_that_are_no_numbers(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = dict(gguf_state(random_state(config), config))
    for number, count in enumerate(([2, 3], "two")):
        path = tmp_path / f"odd-{number:05}-of-00002.gguf"
        write_gguf(path, llama_metadata(config) | {"split.count": count}, tensors)
        assert "expected a name that ends in" in refusal(path)
        with pytest.raises(CheckpointError, match="expected a whole model"):
            decoder_config(open_gguf(path))


def test_parts_of_two_models(tmp_path: Path) -> None:
    """The second part holds a tensor that the first one has too."""
    paths = write_split(tmp_path)
    content = paths[1].read_bytes()
    name = next(n for n in open_gguf(paths[1]).tensors if len(n) == len("blk.0.attn_q.weight"))
    paths[1].write_bytes(content.replace(name.encode(), b"blk.0.attn_q.weight"))
    assert "blk.0.attn_q.weight stands in tiny-00001-of-00003.gguf and in" in refusal(paths[0])
