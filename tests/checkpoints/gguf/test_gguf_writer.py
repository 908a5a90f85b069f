"""The GGUF writer: what it writes comes back, through our reader and the `gguf` library's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from visavis.checkpoints.gguf.reader import SCALARS, open_gguf
from visavis.checkpoints.gguf.writer import NewTensor, write_file

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "yes": True,
    "count": 7,
    "large": 2**40,
    "negative": -3,
    "share": 0.25,
    "text": "naïve 日本 👍",
    "texts": ["", "a", "é"],
    "ints": [1, 2, 3],
    "floats": [0.5, 0.25],
    "bools": [True, False],
    "nested": [[1, 2], [3]],
} | {f"scalar.{code}": np.dtype(code).type(5) for code in SCALARS.values()}
ARRAYS = {f"array.{code}": np.arange(4).astype(code) for code in SCALARS.values()}


def plain(name: str, array: np.ndarray, kind: str = "F32") -> NewTensor:
    return NewTensor(name, array.shape, kind, lambda: [array])


def as_lists(value: Any) -> Any:
    if isinstance(value, list):
        return [as_lists(one) for one in value]
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def test_every_metadata_type_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "types.gguf"
    write_file(path, METADATA | ARRAYS, [])
    found = open_gguf(path).metadata
    assert list(found) == [*METADATA, *ARRAYS]
    for key, value in (METADATA | ARRAYS).items():
        assert as_lists(found[key]) == as_lists(value), key
    for key, array in ARRAYS.items():
        assert found[key].dtype == array.dtype, key
    fields = gguf.GGUFReader(path).fields
    for key, value in (METADATA | ARRAYS).items():
        if key != "nested":  # the library does not read arrays in arrays
            assert as_lists(fields[key].contents()) == as_lists(value), key
    assert fields["count"].types == [gguf.GGUFValueType.UINT32]
    assert fields["share"].types == [gguf.GGUFValueType.FLOAT32]
    assert fields["yes"].types == [gguf.GGUFValueType.BOOL]


def test_tensors_come_back_aligned_and_whole(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    arrays = {
        "odd": generator.standard_normal(5, np.float32),
        "wide": generator.standard_normal((3, 64), np.float32),
        "four": generator.standard_normal((2, 3, 4, 5), np.float32),
        "half": generator.standard_normal((4, 7), np.float32).astype(np.float16),
    }
    blocks = generator.integers(0, 256, (3, 2 * 34), np.uint8)
    tensors = [plain(n, a, "F16" if n == "half" else "F32") for n, a in arrays.items()]
    tensors.append(NewTensor("blocks", (3, 64), "Q8_0", lambda: iter(blocks)))
    path = tmp_path / "tensors.gguf"
    write_file(path, {"general.architecture": "llama"}, tensors)
    file = open_gguf(path)
    assert list(file.tensors) == [tensor.name for tensor in tensors]
    for name, array in arrays.items():
        assert np.array_equal(file.dequantize(name), array), name
        assert file.tensors[name].offset % 32 == 0
    assert np.array_equal(file.raw("blocks"), blocks.reshape(-1))
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, array in arrays.items():
        assert np.array_equal(np.asarray(theirs[name].data).reshape(array.shape), array), name  # type: ignore[attr-defined]
    assert theirs["blocks"].tensor_type == gguf.GGMLQuantizationType.Q8_0


def test_a_tensor_is_made_when_its_turn_comes(tmp_path: Path) -> None:
    made: list[str] = []

    def pieces(name: str) -> Iterator[np.ndarray]:
        made.append(name)
        yield np.zeros(8, np.float32)
        assert made[-1] == name

    names = ["a", "b", "c"]
    tensors = [NewTensor(name, (8,), "F32", lambda name=name: pieces(name)) for name in names]
    assert made == []
    write_file(tmp_path / "lazy.gguf", {}, tensors)
    assert made == names


def test_nothing_is_left_of_a_file_that_fails(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"before")

    def fail() -> Iterator[np.ndarray]:
        yield np.zeros(4, np.float32)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError):
        write_file(path, METADATA, [NewTensor("w", (8,), "F32", fail)])
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]
