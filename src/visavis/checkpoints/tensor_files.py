"""Files of tensors by name: safetensors, or torch files that hold tensors only, whole or sharded.

    model.safetensors | model.safetensors.index.json + shards | pytorch_model.bin | …index.json

Every size is checked against the file before anything is allocated, nothing is unpickled beyond
tensors, and no file outside the folder is opened.
"""

from __future__ import annotations

import mmap
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from visavis.errors import CheckpointError, CheckpointWarning
from visavis.utils import parse_json

WHOLE = ("model.safetensors", "pytorch_model.bin")  # the first that is there is read
INDEX = ".index.json"
MAX_JSON_BYTES = 64 << 20
MAX_LISTED = 5
CHUNK = 1 << 15  # numbers that are looked at together; more would be shared out among threads
DTYPES = {  # names in safetensors
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
ZIP_LENGTHS = 26  # bytes into an entry's header: lengths of its name and of its extra field
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Shape = tuple[int, ...]


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        CheckpointError: the file is absent, too large, not JSON or not an object.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise ValueError(f"{size} bytes, expected at most {MAX_JSON_BYTES}")
        data = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError(f"holds a {type(data).__name__}, expected an object")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {path}: {error}. The folder is incomplete or damaged; copy it again."
        ) from error
    return data


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold a folder's tensors.

    Raises:
        CheckpointError: there are none, a shard is missing, or an index names other places.
    """
    for name in WHOLE:
        if (folder / name).is_file():
            return [folder / name]
        if (folder / (name + INDEX)).is_file():
            return _shards(folder / (name + INDEX))
    found = ", ".join(sorted(child.name for child in folder.iterdir())[:8]) or "nothing"
    raise CheckpointError(
        f"{folder} holds {found}, but no weights; expected {' or '.join(WHOLE)}, or an index "
        f"(*{INDEX}) beside its shards. The download is incomplete, or this is an adapter."
    )


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: what its header says, and the tensor itself when called."""

    dtype: torch.dtype
    shape: Shape
    read: Callable[[], Tensor]

    def __call__(self) -> Tensor:
        return self.read()


class TensorFiles(Mapping[str, Tensor]):
    """Tensors by name, each read when it is asked for and not kept: a model is loaded within the
    memory that it takes."""

    def __init__(self, entries: Mapping[str, StoredTensor]) -> None:
        self.entries = entries

    def __getitem__(self, name: str) -> Tensor:
        return self.entries[name]()

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def read_tensors(files: list[Path]) -> TensorFiles:
    """Return the tensors of all files.

    Raises:
        CheckpointError: see `read_headers`.
    """
    return TensorFiles(read_headers(files))


def read_headers(files: list[Path]) -> dict[str, StoredTensor]:
    """Return the tensors listed in the headers of all files, without reading their data.

    Raises:
        CheckpointError: a file is damaged, holds more than tensors, or repeats another's name.
    """
    found: dict[str, StoredTensor] = {}
    owner: dict[str, Path] = {}
    for path in files:
        scan = _scan_safetensors if path.suffix == ".safetensors" else _scan_torch
        for name, stored in scan(path):
            if name in owner:
                raise CheckpointError(
                    f"{name} stands in {owner[name].name} and in {path.name} of {path.parent}, "
                    "expected once; shards of two downloads are mixed, fetch the folder again."
                )
            owner[name], found[name] = path, stored
    return found


def check_values(name: str, tensor: Tensor, where: str) -> None:
    """Refuse weights that are not plain numbers, and warn of those that are none at all.

    Raises:
        CheckpointError: the tensor is of a quantised type.
    """
    if tensor.dtype not in FLOATS:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{name} of {where} is {kind}, expected floating-point weights; it was quantised "
            "by another library: use the unquantised checkpoint or a GGUF file."
        )
    if not all(_is_finite(part) for part in tensor.flatten().split(CHUNK)):
        warn_not_finite(name, where)


def warn_not_finite(name: str, where: str) -> None:
    """Warn of NaN or infinite values in a tensor; what reads them will answer nonsense."""
    warnings.warn(
        f"{name} of {where} holds NaN or infinite values, expected finite weights; the file is "
        "damaged or its training diverged, and whatever reads it answers nonsense: fetch it "
        "again, compare its sha256.",
        CheckpointWarning,
        stacklevel=2,
    )


def _is_finite(numbers: Tensor) -> bool:
    """A sum is quicker than looking at each, but large finite numbers may have an infinite one."""
    total = numbers.sum(dtype=torch.float32)  # of half precision it makes a float32 copy first
    return bool(total.isfinite() or numbers.isfinite().all())


def _shards(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
        raise CheckpointError(
            f"{index} has no weight_map from tensors to files; copy the folder again."
        )
    shards = sorted(set(names.values()))
    outside = [n for n in shards if n in ("", "..") or Path(n).name != n or "\\" in n]
    if outside:
        raise CheckpointError(
            f"{index} names {outside[0]!r}, expected names of files beside it and no paths; such "
            "an index may be hostile: do not use this checkpoint."
        )
    missing = [name for name in shards if not os.path.isfile(index.parent / name)]
    if missing or not shards:
        more = f" and {len(missing) - MAX_LISTED} more" if len(missing) > MAX_LISTED else ""
        raise CheckpointError(
            f"{index.parent} lacks {', '.join(missing[:MAX_LISTED]) or 'all shards'}{more} of "
            f"{len(shards)} shards that {index.name} names; fetch what is missing."
        )
    return [index.parent / name for name in shards]


def _scan_safetensors(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    """Yield how to read each tensor. The library checks the header: sizes, gaps and overlaps."""
    try:
        with safe_open(path, framework="pt"), path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(length))
            size = path.stat().st_size - 8 - length
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                start, end = entry["data_offsets"]
                if entry["dtype"] not in DTYPES or not 0 <= start <= end <= size:
                    raise ValueError(f"{name} is of type {entry['dtype']}, bytes {start} to {end}")
                dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
                read = partial(_read, path, 8 + length + start, end - start, dtype, shape)
                yield name, StoredTensor(dtype, shape, read)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {path}: {error}. The file is damaged or incomplete; copy it again."
        ) from error


def _read(path: Path, offset: int, nbytes: int, dtype: torch.dtype, shape: Shape) -> Tensor:
    """Return bytes of a file as a tensor.

    In memory of its own, given back when the tensor goes: what is read, converted and dropped would
    leave holes in the heap between what is kept.
    """
    if not nbytes:
        return torch.empty(shape, dtype=dtype)
    try:
        content = mmap.mmap(-1, nbytes)
        with path.open("rb") as file:
            file.seek(offset)
            found = file.readinto(content)
    except (OSError, ValueError) as error:
        raise _changed(path, str(error)) from error
    if found != nbytes:
        raise _changed(path, f"it ends after {found} of {nbytes} bytes")
    return torch.frombuffer(content, dtype=dtype).reshape(shape)


def _changed(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"cannot read {path}: {found}. The file changed while it was read; load it again."
    )


def _scan_torch(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    """Yield how to read each tensor. Nothing in it is decompressed, so nothing can swell."""
    try:
        records = _records(path)
        found = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # the unpickler raises whatever damaged bytes lead it to
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(
            f"cannot read {path} as PyTorch weights: {reason} Expected a zip file (torch 1.6 or "
            "newer) that holds tensors only; this one is damaged, or holds code that will not be "
            "run. Fetch it again, best as safetensors."
        ) from error
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise CheckpointError(
            f"{path} holds a {type(found).__name__} of more than tensors, expected tensors by "
            "name; it may be a whole training state, save its model part alone."
        )
    size = path.stat().st_size
    for name, tensor in found.items():
        if tensor.layout != torch.strided or tensor.numel() * tensor.element_size() > size:
            raise CheckpointError(
                f"{path}: {name} is larger than its file, expected its numbers one by one; the "
                "file is damaged or hostile, fetch it again."
            )
        # Where torch says that the numbers are; by how it writes zip files, so looked up.
        storage = tensor.untyped_storage()
        start = getattr(storage, "_checkpoint_offset", -1)
        first = tensor.storage_offset() * tensor.element_size()
        span = _span(tensor)
        if records.get(start, -1) < max(first + span, storage.nbytes()):
            raise CheckpointError(
                f"{path}: {name} is not where PyTorch puts it, or cut short; the file is damaged "
                "or was packed by another program, fetch it again."
            )
        shape, stride = tuple(tensor.shape), tensor.stride()
        read = partial(_read_torch, path, start + first, span, tensor.dtype, shape, stride)
        yield str(name), StoredTensor(tensor.dtype, shape, read)


def _records(path: Path) -> dict[int, int]:
    """Return where the data of each entry of a zip file starts, and its length."""
    found = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError("its entries are compressed, torch stores them as they are.")
            if entry.filename.endswith("/byteorder") and archive.read(entry) != b"little":
                raise ValueError("its numbers are big-endian.")
            file.seek(entry.header_offset + ZIP_LENGTHS)
            name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
            found[entry.header_offset + ZIP_LENGTHS + 4 + name + extra] = entry.file_size
    return found


def _span(tensor: Tensor) -> int:
    """Return the number of bytes from a tensor's first number to its last."""
    if not tensor.numel():
        return 0
    steps = ((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (1 + sum(steps)) * tensor.element_size()


def _read_torch(
    path: Path, offset: int, nbytes: int, dtype: torch.dtype, shape: Shape, stride: Shape
) -> Tensor:
    """Return one tensor of a torch file."""
    flat = _read(path, offset, nbytes, dtype, (nbytes // dtype.itemsize,))
    return flat.as_strided(shape, stride).contiguous()
