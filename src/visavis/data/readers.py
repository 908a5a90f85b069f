"""Data files as rows: JSON, JSON lines, tar shards, and Parquet and Arrow files with pyarrow
(`pip install 'visavis[train]'`); and their contents as bytes, for fingerprints.

Of a Parquet file one column of one row group is decoded at a time and a few are kept; an Arrow file
is mapped and nothing is decoded, so that shuffled reading of images is quick only from Arrow.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import threading
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from glob import glob
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from visavis.data.tar_shards import members, read_span
from visavis.errors import TrainError
from visavis.inputs import VIDEO_SUFFIXES, Stored
from visavis.processing.media import SUFFIXES
from visavis.utils import parse_json

KEPT_BYTES = 256 << 20  # of decoded columns of row groups, of all files together


class Chunks:
    """Decoded columns of row groups, least recently used ones dropped. Each opened file has its
    own, as another one may have taken its path since."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self.kept: OrderedDict[tuple[Any, int, str], Any] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, file: Any, group: int, column: str) -> Any:
        """Return a column of a row group, decoding it if it is not kept."""
        key = (file, group, column)
        with self.lock:
            if key not in self.kept:
                self.kept[key] = file.read_row_group(group, columns=[column]).column(0)
                self.held += self.kept[key].nbytes
                while self.held > self.limit and len(self.kept) > 1:
                    self.held -= self.kept.popitem(last=False)[1].nbytes
            self.kept.move_to_end(key)
            return self.kept[key]


_CHUNKS = Chunks(KEPT_BYTES)


class Table:
    """A file's rows. Values that are bytes, or `{bytes, path}` as the `datasets` library writes
    images, are `Stored`; without bytes they are the path.

    Raises:
        TrainError: pyarrow is missing, or it is no such file.
    """

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow as arrow
            from pyarrow import parquet
        except ImportError as error:
            raise TrainError(
                f"{path.name} is read with the package pyarrow, which is not installed; "
                "`pip install 'visavis[train]'`, or save the data as JSON lines."
            ) from error
        self.path = path
        self.file: Any = None  # of Parquet
        self.table: Any = None  # of Arrow
        try:
            if path.suffix == ".parquet":
                self.file = parquet.ParquetFile(path)
                schema, groups = self.file.schema_arrow, self.file.metadata
                sizes = [groups.row_group(i).num_rows for i in range(groups.num_row_groups)]
                self.ends = list(accumulate(sizes))
            else:
                self.table = _map(path)
                schema, self.ends = self.table.schema, [self.table.num_rows]
        except (OSError, arrow.ArrowInvalid) as error:
            raise TrainError(
                f"cannot read {path}: {error}; it is damaged or no {path.suffix[1:]} file."
            ) from error
        self.columns = {field.name: _kind(field.type) for field in schema}

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, number: int) -> Row:
        return {name: self._value(number, name, kind) for name, kind in self.columns.items()}

    def where(self, number: int) -> str:
        return f"{self.path.name}, row {number + 1}"

    def _value(self, number: int, column: str, kind: str) -> Any:
        if kind == "bytes" and self._complete(number, column):
            return self._stored(number, column)
        found = self._cell(number, column)
        if not kind or not found.is_valid:
            return found.as_py()
        if kind == "bytes":
            return self._picture(found, number, column)
        return [self._picture(one, number, column, i) for i, one in enumerate(found)]

    def _picture(self, found: Any, number: int, column: str, place: int | None = None) -> Any:
        fields = found if hasattr(found, "keys") else {"bytes": found}
        if found.is_valid and not fields["bytes"].is_valid:
            return fields["path"].as_py() if "path" in fields else None
        return self._stored(number, column, place) if found.is_valid else None

    def _stored(self, number: int, column: str, place: int | None = None) -> Stored:
        name = f"{self.path}: {column} of row {number + 1}"
        name += "" if place is None else f", the {place + 1}."
        return Stored(name, partial(self._bytes, number, column, place))

    def _bytes(self, number: int, column: str, place: int | None) -> bytes:
        found = self._cell(number, column)
        if place is not None:
            found = found[place]
        content: bytes = (found["bytes"] if hasattr(found, "keys") else found).as_py()
        return content

    def _cell(self, number: int, column: str) -> Any:
        if self.table is not None:
            return self.table.column(column)[number]
        group = bisect_right(self.ends, number)
        start = self.ends[group - 1] if group else 0
        return _CHUNKS.get(self.file, group, column)[number - start]

    def _complete(self, number: int, column: str) -> bool:
        """Return whether a file says that no bytes are missing near a row; nothing is decoded."""
        if self.file is None:
            return False
        group = self.file.metadata.row_group(bisect_right(self.ends, number))
        for chunk in map(group.column, range(group.num_columns)):
            if chunk.path_in_schema in (column, f"{column}.bytes"):
                known = chunk.statistics
                return known is not None and known.has_null_count and known.null_count == 0
        return False


def _kind(type: Any) -> str:
    """Return "bytes" for a column of images, "bytes list" for one of lists of them, else ""."""
    from pyarrow import types

    if types.is_list(type) or types.is_large_list(type):
        inside = _kind(type.value_type)
        return f"{inside} list" if inside == "bytes" else ""
    if types.is_struct(type):
        index = type.get_field_index("bytes")
        return "bytes" if index >= 0 and _kind(type.field(index).type) == "bytes" else ""
    return "bytes" if types.is_binary(type) or types.is_large_binary(type) else ""


def _map(path: Path) -> Any:
    """Return an Arrow file, of either of its two kinds, without reading it."""
    import pyarrow as arrow

    source = arrow.memory_map(str(path))
    try:
        return arrow.ipc.open_file(source).read_all()
    except arrow.ArrowInvalid:
        source.seek(0)
        return arrow.ipc.open_stream(source).read_all()


Row: TypeAlias = dict[str, Any]

TABLES = (".parquet", ".arrow")
DATA_SUFFIXES = (".json", ".jsonl", ".tar", *TABLES)
_CHUNK = 1 << 20
_BOM = "\ufeff"
_BETWEEN = re.compile(r"[\s,]*")


class Rows(Protocol):
    """Rows by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Row: ...

    def where(self, number: int) -> str:
        """Return how a message names the row, as "train.json, record 3"."""
        ...


def find_files(path: str, root: Path) -> list[Path]:
    """Return the data files that a path below `root` names: one, a folder's, or a pattern's.

    Raises:
        TrainError: there are none.
    """
    whole = root / path
    if os.path.isfile(whole):
        return [whole]
    found = whole.iterdir() if os.path.isdir(whole) else map(Path, glob(str(whole), recursive=True))
    files = sorted(f for f in found if f.suffix in DATA_SUFFIXES and os.path.isfile(f))
    if not path or not files:
        raise TrainError(
            f"{whole} is no file, and no folder or pattern of {' '.join(DATA_SUFFIXES)} files; "
            "give the folder of data sets with --data, and paths in the recipe from there."
        )
    return files


def open_rows(files: Sequence[Path]) -> Rows:
    """Return the rows of files, one after another."""
    parts = [_open(path) for path in files]
    return parts[0] if len(parts) == 1 else Joined(parts)


def _open(path: Path) -> Rows:
    if path.suffix == ".tar":
        return Shard(path)
    if path.suffix in TABLES:
        return Table(path)
    return Json(path)


class Joined:
    """Several files' rows as one sequence."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self.parts = parts
        self.ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, number: int) -> Row:
        part, number = self._find(number)
        return part[number]

    def where(self, number: int) -> str:
        part, number = self._find(number)
        return part.where(number)

    def _find(self, number: int) -> tuple[Rows, int]:
        place = bisect_right(self.ends, number)
        return self.parts[place], number - (self.ends[place - 1] if place else 0)


class Json:
    """A list of objects, or an object a line; which of them, the first character says.

    Raises:
        TrainError: it cannot be read, or a list is cut off or holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.starts, self.ends = array("Q"), array("Q")
        try:
            with path.open("rb") as file:
                start = file.read(64).decode("utf-8", errors="replace").lstrip(_BOM + " \r\n\t")
            spans = _list_spans(path) if start.startswith("[") else _line_spans(path)
            for begin, end in spans:
                self.starts.append(begin)
                self.ends.append(end)
        except (OSError, UnicodeDecodeError) as error:
            raise TrainError(f"cannot read {path}: {error}; expected JSON in UTF-8.") from error

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> Row:
        start = self.starts[number]
        try:
            row = parse_json(read_span(self.path, start, self.ends[number] - start))
        except ValueError as error:
            raise TrainError(
                f"{self.where(number)} is not JSON ({error}); expected a list of objects or one "
                "object a line; the file is probably cut off."
            ) from error
        if not isinstance(row, dict):
            raise TrainError(f"{self.where(number)} is {str(row)[:40]!r}, expected a JSON object.")
        return row

    def where(self, number: int) -> str:
        return f"{self.path.name}, record {number + 1}"


def _line_spans(path: Path) -> Iterator[tuple[int, int]]:
    """Yield where each line lies that is not blank."""
    at = 0
    with path.open("rb") as file:
        for line in file:
            skipped = len(codecs.BOM_UTF8) if not at and line.startswith(codecs.BOM_UTF8) else 0
            if line[skipped:].strip():
                yield at + skipped, at + len(line)
            at += len(line)


def _list_spans(path: Path) -> Iterator[tuple[int, int]]:
    """Yield where each object of a list lies, in bytes, holding a few of them at a time."""
    scan = json.JSONDecoder().raw_decode
    decode = codecs.getincrementaldecoder("utf-8")().decode
    text, at = "", 0  # what is held; where in it we are
    size, count = _CHUNK, 0
    with path.open("rb") as file:
        offset = file.read(64).index(b"[") + 1  # where we are in the file
        file.seek(offset)
        while True:
            chunk = file.read(size)
            text, at, before = text[at:] + decode(chunk, final=not chunk), 0, count
            while True:
                found = _BETWEEN.match(text, at)
                assert found is not None
                offset, at = offset + found.end() - at, found.end()
                if text.startswith("]", at):
                    return
                try:
                    value, end = scan(text, at)
                except RecursionError as error:
                    raise TrainError(
                        f"{path}: record {count + 1} is nested too deeply, expected a flat object."
                    ) from error
                except ValueError as error:  # not whole yet, or broken
                    if not chunk:
                        raise TrainError(
                            f"{path}: the list breaks off at byte {offset}, after {count} records "
                            f"({error}); the file is probably cut off: copy it again."
                        ) from error
                    break
                if not isinstance(value, dict):
                    raise TrainError(
                        f"{path}: record {count + 1} is {text[at:end][:40]!r}, expected an object."
                    )
                length = len(text[at:end].encode())
                yield offset, offset + length
                offset, at, count = offset + length, end, count + 1
            size = _CHUNK if count > before else 2 * size  # a record longer than a chunk


class Shard:
    """A tar of key.json files with images beside them: key.jpg, or several, key.0.jpg, ….

    They stand in the row's `image` (a list where there are several), a video in `video`; without
    an `id` the key is it. Members of other kinds are left out.

    Raises:
        TrainError: it cannot be read, or an image has no JSON.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        found: dict[str, tuple[list[Stored], list[tuple[str, Stored]]]] = {}
        for name, file in members(path):
            folder, slash, last = name.rpartition("/")
            key, _, suffix = last.partition(".")
            suffix = "." + suffix.rpartition(".")[2].lower()
            texts, visuals = found.setdefault(folder + slash + key, ([], []))
            if suffix == ".json":
                texts.append(file)
            elif suffix in SUFFIXES | VIDEO_SUFFIXES:
                is_video = suffix in VIDEO_SUFFIXES or suffix == ".gif"
                visuals.append(("video" if is_video else "image", file))
        self.entries = [
            (key, texts[0], sorted(visuals, key=lambda one: one[1].name))
            for key, (texts, visuals) in found.items()
            if texts
        ]
        alone = [key for key, (texts, visuals) in found.items() if visuals and not texts]
        if alone or not self.entries:
            raise TrainError(
                f"{path}: {len(alone)} pictures have no JSON beside them"
                + (f", the first is {alone[0]!r}" if alone else ", and there is no JSON at all")
                + "; expected key.json with key.jpg, and the tar complete."
            )

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, number: int) -> Row:
        key, text, visuals = self.entries[number]
        try:
            fields = parse_json(text.read())
        except ValueError as error:
            raise TrainError(f"{self.where(number)} is not JSON ({error}).") from error
        if not isinstance(fields, dict):
            raise TrainError(f"{self.where(number)} holds no JSON object.")
        row = {"id": key, **fields}
        for kind in ("image", "video"):
            files = [file for found, file in visuals if found == kind]
            if files:
                row[kind] = files[0] if len(files) == 1 else files
        return row

    def where(self, number: int) -> str:
        return f"{self.path.name}, record {self.entries[number][0]!r}"


# ---- fingerprints --------------------------------------------------------------------------------

WHOLE_BYTES = 256 << 20  # files up to this size are read whole, larger ones in pieces
PIECES = 256
_CHUNK = 1 << 20


def files_content(path: str, root: Path) -> Iterator[bytes]:
    """Yield the contents of data files."""
    for file in find_files(path, root):
        yield from file_content(file)


def file_content(path: Path) -> Iterator[bytes]:
    """Yield a file's size and contents, of a large one only pieces; a folder's files'.

    Raises:
        TrainError: it cannot be read.
    """
    try:
        if path.is_dir():
            for inside in sorted(path.iterdir()):
                yield from file_content(inside)
            return
        size = path.stat().st_size
        yield f"{size} ".encode()
        with path.open("rb") as file:
            for start, end in _pieces(size):
                file.seek(start)
                while start < end and (chunk := file.read(min(end - start, _CHUNK))):
                    yield chunk
                    start += len(chunk)
    except OSError as error:
        raise TrainError(f"cannot read {path}: {error}") from error


def _pieces(size: int) -> Iterator[tuple[int, int]]:
    """Yield from where to where: all of it, or pieces at even distances, both ends included."""
    if size <= WHOLE_BYTES:
        yield 0, size
        return
    length = WHOLE_BYTES // PIECES
    for number in range(PIECES):
        start = number * (size - length) // (PIECES - 1)
        yield start, start + length
