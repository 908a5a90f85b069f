"""A memory-mapped reader of GGUF files, versions 2 and 3, on numpy alone.

Every size in the file is checked against the file's own size before anything is allocated or
sliced, so a damaged or hostile file ends in a `CheckpointError` and never in a large allocation.
Knows the container; deliberately does not know what any key or tensor means (decoder.py,
processing/tokenizer.py) nor how blocks are dequantised (quants.py).
"""

from __future__ import annotations

import itertools
import mmap
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from visavis.checkpoints.gguf import dequantize
from visavis.errors import CheckpointError
from visavis.utils import check_regular

MAGIC = b"GGUF"
VERSIONS = (2, 3)
HEADER = struct.Struct("<4sIQQ")  # magic, version, number of tensors, number of metadata pairs
MAX_DIMS = 4
MAX_ARRAY_DEPTH = 4  # arrays in arrays; nobody writes more than 1
MAX_NAME_BYTES = 64 * 1024
MIN_PAIR_BYTES = 8 + 4 + 1  # key length, value type, smallest value
MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # name length, number of dims, one dim, type, offset

SCALARS = {  # value type -> numpy type
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "<u1",  # bool
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
BOOL, STRING, ARRAY = 7, 8, 9

DAMAGED = (
    "the file is probably damaged or was not downloaded completely; "
    "fetch it again and compare its sha256"
)


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. `shape` has the rows first, as in torch: (out, in)."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int  # from the start of the file
    nbytes: int


class GGUFFile:
    """An open GGUF file: metadata in memory, tensors on disk until asked for."""

    def __init__(
        self,
        path: Path,
        mapped: mmap.mmap | bytes,
        metadata: dict[str, Any],
        tensors: dict[str, TensorInfo],
    ) -> None:
        self.path = path
        self.metadata = metadata
        self.tensors: Mapping[str, TensorInfo] = tensors
        self._mapped = mapped  # read-only

    def raw(self, name: str) -> np.ndarray:
        """Return a tensor's bytes, a read-only uint8 view of the mapped file."""
        info = self.tensors[name]
        return np.frombuffer(self._mapped, np.uint8, info.nbytes, info.offset)

    def release(self, name: str) -> None:
        """Say that a tensor's bytes are not needed any more: they leave this process's memory, and
        are read from the file again if they are asked for."""
        if isinstance(self._mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            info = self.tensors[name]
            start = info.offset // mmap.PAGESIZE * mmap.PAGESIZE
            end = info.offset + info.nbytes
            self._mapped.madvise(mmap.MADV_DONTNEED, start, end - start)

    def dequantize(self, name: str) -> np.ndarray:
        """Return a tensor as float32 in its shape.

        Raises:
            CheckpointError: its type cannot be dequantised.
        """
        info = self.tensors[name]
        if info.type not in dequantize.SUPPORTED:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is of type {info.type}, expected one of "
                f"{', '.join(dequantize.SUPPORTED)}; use a file quantised as one of these, "
                "such as Q4_K_M or Q8_0"
            )
        return dequantize.dequantize(self.raw(name), info.type, info.shape)


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Map a GGUF file and read its metadata and tensor table.

    Strings become `str`, numbers `int` or `float`, number arrays numpy arrays, arrays of
    strings or arrays lists.

    Raises:
        CheckpointError: missing, not GGUF, truncated, or inconsistent in any size.
    """
    path = Path(path)
    try:
        check_regular(path)
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < HEADER.size:
                raise CheckpointError(
                    f"{path}: {size} bytes, expected a GGUF file ({HEADER.size} or more); {DAMAGED}"
                )
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise CheckpointError(
            f"{path}: cannot be read ({getattr(error, 'strerror', error)}); expected a .gguf "
            "file; check the path"
        ) from error
    return _Reader(path, mapped).read()


class _Reader:
    """A cursor over the mapped file; every step is checked against the file's end."""

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self.path, self.mapped, self.size = path, mapped, len(mapped)
        self.at = 0

    def read(self) -> GGUFFile:
        num_tensors, num_pairs = self._header()
        metadata: dict[str, Any] = {}
        for _ in range(num_pairs):
            key = self._string("a metadata key", MAX_NAME_BYTES)
            if key in metadata:
                self._fail(f"metadata key {key!r} occurs twice", "each key once")
            metadata[key] = self._value(self._number("<u4", key), key, depth=0)
        alignment = metadata.get("general.alignment", 32)
        if (
            not isinstance(alignment, int)
            or not 0 < alignment <= 1 << 20
            or alignment.bit_count() != 1
        ):
            self._fail(f"general.alignment is {alignment!r}", "a power of two up to 1048576")
        entries = [self._tensor_entry() for _ in range(num_tensors)]
        start = -(-self.at // alignment) * alignment
        tensors = self._tensors(entries, start, alignment)
        return GGUFFile(self.path, self.mapped, metadata, tensors)

    def _header(self) -> tuple[int, int]:
        magic, version, num_tensors, num_pairs = HEADER.unpack_from(self.mapped)
        self.at = HEADER.size
        if magic != MAGIC:
            raise CheckpointError(
                f"{self.path}: starts with {magic!r}, expected {MAGIC!r}; this is not a GGUF file "
                "(perhaps a web page or a Git LFS pointer saved under its name); fetch it again"
            )
        if version not in VERSIONS and int.from_bytes(version.to_bytes(4), "little") in VERSIONS:
            raise CheckpointError(
                f"{self.path}: a big-endian GGUF file, expected little-endian; it was converted "
                "for another kind of machine; fetch the little-endian file"
            )
        if version not in VERSIONS:
            raise CheckpointError(
                f"{self.path}: GGUF version {version}, expected 2 or 3; the file is older or newer "
                "than this reader; convert it again with a current llama.cpp"
            )
        rest = self.size - self.at
        if num_pairs * MIN_PAIR_BYTES > rest:
            self._fail(f"{num_pairs} metadata pairs in {rest} bytes", "a count the file can hold")
        if num_tensors * MIN_TENSOR_BYTES > rest:
            self._fail(f"{num_tensors} tensors in {rest} bytes", "a count the file can hold")
        return num_tensors, num_pairs

    def _value(self, kind: int, key: str, depth: int) -> Any:
        if kind == STRING:
            return self._string(key, self.size)
        if kind == ARRAY:
            return self._array(key, depth)
        if kind not in SCALARS:
            self._fail(f"{key!r} has value type {kind}", "a type from 0 to 12")
        number = self._number(SCALARS[kind], key)
        return self._bools(np.array([number]), key)[0].item() if kind == BOOL else number

    def _array(self, key: str, depth: int) -> Any:
        if depth >= MAX_ARRAY_DEPTH:
            self._fail(f"{key!r} nests arrays deeper than {MAX_ARRAY_DEPTH}", "a flat array")
        kind = self._number("<u4", key)
        count = self._number("<u8", key)
        if kind == STRING:
            return self._strings(count, key)
        if kind == ARRAY:
            self._check_room(count * 12, key)  # type and count of each inner array
            return [self._array(key, depth + 1) for _ in range(count)]
        if kind not in SCALARS:
            self._fail(f"{key!r} is an array of value type {kind}", "a type from 0 to 12")
        dtype = np.dtype(SCALARS[kind])
        start = self._take(count * dtype.itemsize, key)
        array = np.frombuffer(self.mapped, dtype, count, start).copy()
        return self._bools(array, key) if kind == BOOL else array

    def _strings(self, count: int, key: str) -> list[str]:
        """Read an array of strings; the one hot loop of the reader (vocabularies)."""
        self._check_room(count * 8, key)
        mapped, end, at = self.mapped, self.size, self.at
        length_at = struct.Struct("<Q").unpack_from
        strings: list[str] = []
        try:
            for _ in range(count):
                start = at + 8
                at = start + length_at(mapped, at)[0]
                if at > end:
                    break
                strings.append(str(mapped[start:at], "utf-8"))
        except struct.error:
            at = end + 1
        except UnicodeDecodeError as error:
            self._fail(f"string {len(strings)} of {key!r} is not UTF-8 ({error})", "UTF-8 text")
        if at > end:
            self._truncated(f"string {len(strings)} of {key!r}")
        self.at = at
        return strings

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """Read name, shape, type number and offset of one tensor."""
        name = self._string("a tensor name", MAX_NAME_BYTES)
        num_dims = self._number("<u4", name)
        if not 1 <= num_dims <= MAX_DIMS:
            self._fail(f"tensor {name!r} has {num_dims} dimensions", f"1 to {MAX_DIMS}")
        shape = tuple(self._number("<u8", name) for _ in range(num_dims))
        return name, shape[::-1], self._number("<u4", name), self._number("<u8", name)

    def _tensors(
        self, entries: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int
    ) -> dict[str, TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        for name, shape, number, offset in entries:
            if name in tensors:
                self._fail(f"tensor {name!r} occurs twice", "each name once")
            if number not in dequantize.TYPES:
                self._fail(f"tensor {name!r} has type number {number}", "a known GGML type")
            kind = dequantize.TYPES[number]
            nbytes = self._num_bytes(name, shape, kind)
            if offset % alignment:
                self._fail(f"tensor {name!r} lies at offset {offset}", f"a multiple of {alignment}")
            if start + offset + nbytes > self.size:
                self._truncated(f"tensor {name!r} ({nbytes} bytes at {start + offset})")
            tensors[name] = TensorInfo(name, shape, kind.name, start + offset, nbytes)
        ordered = sorted(tensors.values(), key=lambda info: info.offset)
        for before, after in itertools.pairwise(ordered):
            if before.offset + before.nbytes > after.offset:
                self._fail(f"tensors {before.name!r} and {after.name!r} overlap", "separate ones")
        return tensors

    def _num_bytes(self, name: str, shape: tuple[int, ...], kind: dequantize.BlockType) -> int:
        count = 1
        for dim in shape:
            count *= dim  # Python integers: no overflow
        if count == 0 or shape[-1] % kind.block:
            self._fail(
                f"tensor {name!r} of type {kind.name} has shape {list(shape)}",
                f"rows of a positive multiple of {kind.block} values",
            )
        return count // kind.block * kind.nbytes

    def _number(self, dtype: str, what: str) -> Any:
        start = self._take(np.dtype(dtype).itemsize, what)
        return np.frombuffer(self.mapped, dtype, 1, start)[0].item()

    def _string(self, what: str, limit: int) -> str:
        length = self._number("<u8", what)
        if length > limit:
            self._fail(f"{what} is {length} bytes long", f"at most {limit}")
        start = self._take(length, what)
        try:
            return str(self.mapped[start : self.at], "utf-8")
        except UnicodeDecodeError as error:
            self._fail(f"the text of {what} is not UTF-8 ({error})", "UTF-8 text")

    def _bools(self, array: np.ndarray, key: str) -> np.ndarray:
        if array.size and array.max() > 1:
            self._fail(f"{key!r} holds the boolean {array.max()}", "0 or 1")
        return array.astype(bool)

    def _take(self, count: int, what: str) -> int:
        """Step over `count` bytes and return where they start."""
        self._check_room(count, what)
        start, self.at = self.at, self.at + count
        return start

    def _check_room(self, count: int, what: str) -> None:
        if count > self.size - self.at:
            self._truncated(repr(what))

    def _truncated(self, what: str) -> NoReturn:
        raise CheckpointError(
            f"{self.path}: the file ends at byte {self.size}, inside {what}, which the file says "
            f"is longer; expected a complete GGUF file; {DAMAGED}"
        )

    def _fail(self, found: str, expected: str) -> NoReturn:
        raise CheckpointError(
            f"{self.path}: near byte {self.at}, {found}; expected {expected}; {DAMAGED}"
        )


PART_NAME = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)
MAX_MISSING_LISTED = 5


class SplitGGUF(GGUFFile):
    """Several open files as one: tensors stay in the file that holds them."""

    def __init__(self, parts: list[GGUFFile]) -> None:
        first = parts[0]
        metadata = {k: v for k, v in first.metadata.items() if not k.startswith("split.")}
        self.owner: dict[str, GGUFFile] = {}
        tensors: dict[str, TensorInfo] = {}
        for part in parts:
            for name, info in part.tensors.items():
                if name in tensors:
                    raise CheckpointError(
                        f"{name} stands in {self.owner[name].path.name} and in {part.path.name}, "
                        "expected once; parts of two models are mixed, fetch them again."
                    )
                tensors[name], self.owner[name] = info, part
        super().__init__(first.path, b"", metadata, tensors)

    def raw(self, name: str) -> np.ndarray:
        """Return a tensor's bytes, a read-only uint8 view of its mapped file."""
        return self.owner[name].raw(name)

    def release(self, name: str) -> None:
        self.owner[name].release(name)


def part_names(name: str) -> list[str]:
    """Return the names of all parts of a model from one of them; of a whole file, its own."""
    named = PART_NAME.fullmatch(name)
    if named is None:
        return [name]
    return [f"{named[1]}-{n:05}-of-{named[3]}.gguf" for n in range(1, int(named[3]) + 1)]


def open_model(path: Path) -> tuple[GGUFFile, list[Path]]:
    """Open a GGUF file, with all other parts if it is one of several; return their paths too.

    Raises:
        CheckpointError: a file is damaged, or parts are missing or do not belong together.
    """
    file = open_gguf(path)
    count = file.metadata.get("split.count", 1)
    if isinstance(count, int) and count in (0, 1):
        return file, [path]
    named = PART_NAME.fullmatch(path.name)
    if not isinstance(count, int) or named is None or int(named[3]) != count:
        raise CheckpointError(
            f"{path} is one of {count} parts, expected a name that ends in "
            f"-00001-of-{count!s:0>5}.gguf, by which the others are found; give the parts their "
            "names back, or join them with `llama-gguf-split --merge`."
        )
    paths = [path.with_name(name) for name in part_names(path.name)]
    missing = [one.name for one in paths if not one.is_file()]
    if missing:
        more = (
            f" and {len(missing) - MAX_MISSING_LISTED} more"
            if len(missing) > MAX_MISSING_LISTED
            else ""
        )
        raise CheckpointError(
            f"{path.parent} lacks {', '.join(missing[:MAX_MISSING_LISTED])}{more} of {count} "
            "parts; fetch what is missing into the same folder."
        )
    parts = [open_gguf(one) for one in paths]
    for number, part in enumerate(parts):
        found = tuple(part.metadata.get(f"split.{key}") for key in ("no", "count"))
        if found != (number, count):
            raise CheckpointError(
                f"{part.path} says it is part {found[0]} of {found[1]}, expected {number} (from "
                f"0) of {count}; its name was changed or it belongs to another model."
            )
    whole = SplitGGUF(parts)
    total = parts[0].metadata.get("split.tensors.count", len(whole.tensors))
    if total != len(whole.tensors):
        raise CheckpointError(
            f"the {count} parts of {path} hold {len(whole.tensors)} tensors, expected {total}; "
            "parts of two models are mixed, fetch them again."
        )
    return whole, paths
