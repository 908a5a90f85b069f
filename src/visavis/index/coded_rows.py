"""The rows of an index for searching: coded vectors, mapped from files, and what filters need.

    FOLDER/GENERATION.rows     header, then one record (ROW) per item
    FOLDER/GENERATION.codes    int8 [D] per item

Both files are derived from the database and only grow: rows are appended, synced, and then counted
in the header. Whoever dies in between leaves rows that nobody counts. Where the files may not be
written, or are missing, the rows are kept in memory. The folder can be removed at any time.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from filelock import FileLock

ROW = np.dtype(
    [
        ("slot", "<i8"),
        ("item", "<i8"),
        ("vector", "<i8"),  # number of the vector: rows of the same content share it
        ("date", "<f8"),  # NaN: unknown
        ("scale", "<f4"),
        ("error", "<f4"),
        ("facet", "<i4"),
        ("check", "<u4"),  # CRC of the content hash, see `SqliteRows`
    ]
)
_HEADER = struct.Struct("<8sII16sQQI")  # magic, version, dim, generation, rows, last slot, CRC
_MAGIC, _VERSION, _HEADER_BYTES = b"VISAROWS", 1, 64
APPENDED = 4096  # rows in memory that are worth appending to the files


class CodedRows:
    """All rows of one generation of an index, in the order of their slots.

    Attributes:
        records: ROW [N].
        scales, errors: columns of the records as arrays of their own.
        dead: bool [N], rows that were removed from the index.
        removed_seen: up to which number of the table `removed` the dead rows are marked.

    Args:
        folder: where the files are; None: rows are kept in memory only.
        generation: 32 hex digits; files of another one are ignored.
        dim: numbers of a vector.
    """

    def __init__(self, folder: Path | None, generation: str, dim: int) -> None:
        self.folder, self.generation, self.dim = folder, generation, dim
        self.records: np.ndarray = np.empty(0, ROW)
        self.scales: np.ndarray = np.empty(0, np.float32)
        self.errors: np.ndarray = np.empty(0, np.float32)
        self.dead: np.ndarray = np.zeros(0, bool)
        self._forget_rows()
        self._open()

    def __len__(self) -> int:
        return len(self.records)

    @property
    def last_slot(self) -> int:
        """The highest slot; 0 if there is none."""
        return int(self.records["slot"][-1]) if len(self.records) else 0

    @property
    def codes(self) -> list[np.ndarray]:
        """The codes of all rows: int8 [n, D] each, those of the files first."""
        return [part for part in (self._mapped, *self._tail) if len(part)]

    def extend(self, records: np.ndarray, codes: np.ndarray) -> None:
        """Add rows whose slots are higher than all before."""
        if not len(records):
            return
        self._tail.append(codes)
        self.records = np.concatenate([self.records, records])
        self.dead = np.concatenate([self.dead, np.zeros(len(records), bool)])
        self._take_columns()
        if len(self.records) - len(self._mapped) >= max(APPENDED, len(self._mapped) // 16):
            self.save()

    def remove(self, slots: np.ndarray) -> None:
        """Mark rows as removed; slots that are not here are ignored."""
        if not len(self.records) or not len(slots):
            return
        known = self.records["slot"]
        places = np.minimum(np.searchsorted(known, slots), len(known) - 1)
        self.dead[places[known[places] == slots]] = True

    def save(self) -> None:
        """Append the rows in memory to the files, unless another process is at it."""
        if self.folder is None or not self._tail:
            return
        with suppress(OSError):  # no rights, no space, a lock: memory does as well
            with self._locked():
                self._append()
            self._forget_rows()
            self._open()

    def discard(self) -> None:
        """Forget all rows, and do not use the files."""
        self.folder = None
        self._forget_rows()

    def _take_columns(self) -> None:
        self.scales = np.ascontiguousarray(self.records["scale"])
        self.errors = np.ascontiguousarray(self.records["error"])

    def _forget_rows(self) -> None:
        self.records = np.empty(0, ROW)
        self._take_columns()
        self.dead = np.zeros(0, bool)
        self.removed_seen = 0
        self._mapped: np.ndarray = np.empty((0, self.dim), np.int8)
        self._tail: list[np.ndarray] = []

    def _path(self, suffix: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{self.generation}.{suffix}"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        assert self.folder is not None
        self.folder.mkdir(exist_ok=True)
        with FileLock(self.folder / "lock", timeout=0):
            yield

    def _append(self) -> None:
        """Write those of our rows that the files do not have."""
        number, last_slot = self._read_header()
        new = np.flatnonzero(self.records["slot"] > last_slot)
        first = len(self.records) - len(new)
        at = 0
        offset = number
        for part in self.codes:
            wanted = part[max(0, first - at) :]
            _write(self._path("codes"), offset * self.dim, wanted.tobytes())
            offset += len(wanted)
            at += len(part)
        records = self.records[new].tobytes()
        _write(self._path("rows"), _HEADER_BYTES + number * ROW.itemsize, records)
        last_slot = max(last_slot, self.last_slot)
        _write(self._path("rows"), 0, self._header(number + len(new), last_slot))
        self._remove_others()

    def _remove_others(self) -> None:
        """Remove the files of other generations."""
        assert self.folder is not None
        for file in self.folder.iterdir():
            if file.suffix in (".rows", ".codes") and file.stem != self.generation:
                with suppress(OSError):  # Windows: another process reads it
                    file.unlink()

    def _open(self) -> None:
        """Map the files, if there are any."""
        if self.folder is None:
            return
        number, last_slot = self._read_header()
        if not number:
            return
        try:
            with self._path("rows").open("rb") as file:
                file.seek(_HEADER_BYTES)
                records = np.fromfile(file, ROW, number)
            mapped = np.memmap(self._path("codes"), np.int8, "r", shape=(number, self.dim))
            slots = records["slot"]
            if not (np.diff(slots) > 0).all() or slots[-1] != last_slot:
                self._path("rows").unlink()  # written by nobody, or a failing disk
                return
        except (OSError, ValueError):
            self.folder = None
            return
        self.records, self._mapped = records, mapped
        self.dead = np.zeros(number, bool)
        self._take_columns()

    def _header(self, number: int, last_slot: int) -> bytes:
        fields = (_MAGIC, _VERSION, self.dim, bytes.fromhex(self.generation), number, last_slot)
        checked = _HEADER.pack(*fields, 0)
        return _HEADER.pack(*fields, zlib.crc32(checked)).ljust(_HEADER_BYTES, b"\0")

    def _read_header(self) -> tuple[int, int]:
        """Return number of rows and last slot of the files; (0, 0) if they are of no use."""
        try:
            with self._path("rows").open("rb") as file:
                header = file.read(_HEADER_BYTES)
                rows_bytes = os.fstat(file.fileno()).st_size
            codes_bytes = self._path("codes").stat().st_size
        except OSError:
            return 0, 0
        if len(header) < _HEADER_BYTES:
            return 0, 0
        *_, number, last_slot, _ = _HEADER.unpack_from(header)
        is_sound = (
            header == self._header(number, last_slot)
            and rows_bytes >= _HEADER_BYTES + number * ROW.itemsize
            and codes_bytes >= number * self.dim
        )
        return (number, last_slot) if is_sound else (0, 0)


def _write(path: Path, offset: int, data: bytes) -> None:
    """Write into a file, which is made if it is not there, and sync it. It never gets shorter:
    others may have mapped it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
    with os.fdopen(handle, "r+b") as file:
        file.seek(offset)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
