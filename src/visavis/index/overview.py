"""Care of an index that needs no model: what is gone, statistics, and its items as a table."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from visavis.errors import InputError
from visavis.index.filters import Filter
from visavis.index.items import still_there
from visavis.index.store import StoredItem, VectorStore
from visavis.utils import write_atomically

_READ = 500  # items at a time


def prune(store: VectorStore) -> list[str]:
    """Forget files that no longer exist, and pages that documents no longer have; return their
    sources.

    Raises:
        StoreError: the store cannot be written.
    """
    num_pages: dict[Path, int] = {}
    gone = [source for source, _ in store.file_items() if not still_there(source, num_pages)]
    store.remove(gone)
    return gone


def stats(store: VectorStore) -> dict[str, Any]:
    """Return counts of an index, as JSON values."""
    kinds: Counter[str] = Counter()
    folders: Counter[str] = Counter()
    for (kind, folder), number in store.folders().items():
        kinds[kind] += number
        if folder:
            folders[folder] += number
    return {
        "index": store.name,
        **store.meta(),
        "items": store.count(),
        "bytes": _bytes(store.name),
        "kinds": dict(sorted(kinds.items())),
        "folders": dict(sorted(folders.items())),
        "left_out": [
            {"suffix": suffix, "reason": reason, "files": number}
            for (suffix, reason), number in store.left_out().items()
        ],
    }


def _bytes(name: str) -> int | None:
    """Return the size of an index file with what belongs to it; None of a database elsewhere."""
    if not os.path.isfile(name):
        return None
    files = [Path(name), Path(f"{name}-wal"), *Path(f"{name}.vectors").glob("*")]
    return sum(file.stat().st_size for file in files if file.is_file())


def export(store: VectorStore, output: Path, filter: Filter | None = None) -> int:
    """Write all items with their vectors as Parquet or JSON lines, by the suffix of `output`;
    return their number.

    Raises:
        InputError: the suffix is another one, or pyarrow is missing.
    """
    suffix = output.suffix.lower()
    if suffix == ".jsonl":
        return _write_lines(store, output, filter)
    if suffix == ".parquet":
        return _write_parquet(store, output, filter)
    raise InputError(
        f"the output is {output.name}, expected a name that ends in .parquet or .jsonl"
    )


def _batches(store: VectorStore, filter: Filter | None) -> Iterator[list[dict[str, Any]]]:
    offset = 0
    while items := store.first(_READ, offset, filter):
        vectors = store.vectors([item.id for item in items])
        yield [{**described(item), "vector": vectors[item.id]} for item in items]
        offset += len(items)


def described(item: StoredItem) -> dict[str, Any]:
    """Return an item as one row of a table: JSON values, without preview and vector."""
    return {
        "id": item.id,
        "source": readable_name(item.source),
        "content": item.content,
        "kind": item.kind,
        "path": readable_name(item.path),
        "page": item.page,
        "begin_s": item.begin_s,
        "end_s": item.end_s,
        "date": None if item.date is None else _date(item.date),
        "place": item.place,
        "text": item.text,
        "found_text": item.found_text,
        "metadata": dict(item.metadata),
    }


def readable_name(name: str) -> str:
    """Return a file name as UTF-8; bytes that are not are written as \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _date(seconds: float) -> str | None:
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat()
    except (ValueError, OverflowError, OSError):  # of no calendar
        return None


def _write_lines(store: VectorStore, output: Path, filter: Filter | None) -> int:
    number = 0
    with write_atomically(output) as temporary, temporary.open("w", encoding="utf-8") as file:
        for rows in _batches(store, filter):
            for row in rows:
                row["vector"] = [float(f"{value:.9g}") for value in row["vector"]]
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            number += len(rows)
    return number


def _write_parquet(store: VectorStore, output: Path, filter: Filter | None) -> int:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise InputError(
            "Parquet needs pyarrow: pip install 'visavis[train]', or export to .jsonl"
        ) from None
    texts = ("source", "content", "kind", "path")
    schema = pa.schema(
        [
            ("id", pa.int64()),
            *((name, pa.string()) for name in texts),
            ("page", pa.int32()),
            ("begin_s", pa.float64()),
            ("end_s", pa.float64()),
            *((name, pa.string()) for name in ("date", "place", "text", "found_text", "metadata")),
            ("vector", pa.list_(pa.float32(), int(store.meta()["dim"]))),
        ]
    )
    number = 0
    with write_atomically(output) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for rows in _batches(store, filter):
            for row in rows:
                row["metadata"] = json.dumps(row["metadata"], ensure_ascii=False)
            writer.write_table(pa.Table.from_pylist(rows, schema))
            number += len(rows)
    return number
