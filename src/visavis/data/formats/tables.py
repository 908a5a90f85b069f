"""Parquet and Arrow files as rows, read with pyarrow (`pip install 'visavis[train]'`).

Of a Parquet file one column of one row group is decoded at a time and a few are kept; an Arrow file
is mapped and nothing is decoded, so that shuffled reading of pictures is quick only from Arrow.
Knows no format.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from visavis.data.formats.rows import Row
from visavis.errors import TrainError
from visavis.prompt import Stored

KEPT_BYTES = 256 << 20  # of decoded columns of row groups, of all files together


class Chunks:
    """Decoded columns of row groups, least recently used ones dropped."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self.kept: OrderedDict[tuple[Path, int, str], Any] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, file: Any, path: Path, group: int, column: str) -> Any:
        """Return a column of a row group, decoding it if it is not kept."""
        key = (path, group, column)
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
    pictures, are `Stored`; without bytes they are the path.

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
        return _CHUNKS.get(self.file, self.path, group, column)[number - start]

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
    """Return "bytes" for a column of pictures, "bytes list" for one of lists of them, else ""."""
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
