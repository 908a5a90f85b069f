"""A writer of GGUF files, version 3: metadata of every type, tensors one after another.

Nothing is held that has been written, and nothing is made before its turn: a tensor comes as a
function that yields its bytes, piece by piece. A file appears whole or not at all. Knows the
container; deliberately does not know what any key or tensor means (export.py, mmproj.py) nor how
numbers become blocks (quantize.py).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from visavis.checkpoints.gguf.dequantize import BY_NAME, TYPES
from visavis.checkpoints.gguf.quantize import quantize
from visavis.checkpoints.gguf.reader import ARRAY, BOOL, HEADER, MAGIC, SCALARS, STRING
from visavis.utils import write_atomically

VERSION = 3
ALIGNMENT = 32
NUMBERS = {kind.name: number for number, kind in TYPES.items()}
SCALAR_TYPES = {np.dtype(code): number for number, code in SCALARS.items() if number != BOOL}


@dataclass(frozen=True)
class NewTensor:
    """A tensor that is to be written. `shape` has the rows first; `pieces` yields its bytes."""

    name: str
    shape: tuple[int, ...]
    type: str
    pieces: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        kind = BY_NAME[self.type]
        return prod(self.shape) // kind.block * kind.nbytes


def write_file(path: Path, metadata: Mapping[str, Any], tensors: Sequence[NewTensor]) -> None:
    """Write a GGUF file.

    Args:
        metadata: bool, str, int (uint32, or int64 if negative or larger), float (float32), numpy
            numbers and number arrays (of their own type), and lists of one kind of these.
    """
    with write_atomically(path) as temporary, temporary.open("wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, len(tensors), len(metadata)))
        for key, value in metadata.items():
            file.write(_string(key) + _value(value))
        offset = 0
        for tensor in tensors:
            dims = tensor.shape[::-1]
            head = _string(tensor.name) + struct.pack("<I", len(dims))
            file.write(head + struct.pack(f"<{len(dims)}QIQ", *dims, NUMBERS[tensor.type], offset))
            offset += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        for tensor in tensors:
            _pad(file)
            start = file.tell()
            for piece in tensor.pieces():
                file.write(np.ascontiguousarray(piece).data)
            assert file.tell() - start == tensor.nbytes, tensor.name
        _pad(file)


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))


def _string(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def _value(value: Any) -> bytes:
    """Return a value with its type before it."""
    if isinstance(value, list | np.ndarray):
        return struct.pack("<I", ARRAY) + _array(value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    array = _numbers(value)
    return struct.pack("<I", _type_of(array)) + array.tobytes()


def _array(values: list[Any] | np.ndarray) -> bytes:
    """Return an array's element type, length and elements."""
    kinds = {type(value) for value in values}
    if kinds == {str}:
        head = struct.pack("<IQ", STRING, len(values))
        return head + b"".join(map(_string, values))
    if isinstance(values, list) and kinds and kinds <= {list, np.ndarray}:
        return struct.pack("<IQ", ARRAY, len(values)) + b"".join(map(_array, values))
    array = _numbers(values)
    return struct.pack("<IQ", _type_of(array), array.size) + array.tobytes()


def _numbers(value: Any) -> np.ndarray:
    """Return numbers in the type that they are stored as."""
    if isinstance(value, np.ndarray | np.generic):
        return np.asarray(value)
    array = np.array(value)
    if array.dtype.kind == "i":
        fits = array.min() >= 0 and array.max() < 1 << 32
        return array.astype(np.uint32 if fits else np.int64)
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def _type_of(array: np.ndarray) -> int:
    return BOOL if array.dtype == bool else SCALAR_TYPES[array.dtype]


CHUNK = 1 << 22  # values that are float32 at a time


def weight(module: nn.Module, name: str) -> Tensor:
    """Return a tensor below a module by name, from a parameter, buffer or property."""
    owner_name, _, last = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    found = getattr(owner, last)
    assert isinstance(found, Tensor)
    return found.detach()


def as_numpy(tensor: Tensor) -> np.ndarray:
    """Return a tensor as float32 in the main memory."""
    array: np.ndarray = tensor.detach().to("cpu", torch.float32).numpy()
    return array


def quantized(tensor: Tensor, type: str) -> Iterator[np.ndarray]:
    """Yield a tensor's bytes in a GGML type."""
    rows = max(1, CHUNK // max(1, tensor[0].numel()))
    for part in tensor.split(rows):
        yield from quantize(as_numpy(part), type)


def stored(name: str, tensor: Tensor, type: str = "F32") -> NewTensor:
    """Return a GGUF tensor of a tensor as it is."""
    return NewTensor(name, tuple(tensor.shape), type, lambda: quantized(tensor, type))
