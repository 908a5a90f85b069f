"""Shards of embedded items as Parquet files, for indexes, databases and other programs.

    PlannedShard ──► items ──► model.embed ──► part-000000.parquet    written whole or not at all
    part-*.parquet ──► load_shards ──► Index

A shard has the columns `source`, `content`, `kind`, `path`, `page`, `date`, `place`, `text`,
`found_text`, `error` and `vector` (float32, a list of fixed length; null where `error` says why).
Model, fingerprint and dimensions are in the metadata of its schema.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from visavis.errors import InputError, StoreError, VisavisError
from visavis.index.extract import ExtractedText, found_text
from visavis.index.items import kind_of
from visavis.index.ocr import check_ocr
from visavis.index.shard_plan import CorpusItem, PlannedShard, file_system, read_items, write_file
from visavis.index.store import IndexRow, VectorStore
from visavis.index.words import file_words
from visavis.processing.images import ContentHasher
from visavis.utils import track

if TYPE_CHECKING:
    from visavis.api import Model

BATCH_ITEMS = 32  # embedded together
LOADED_ITEMS = 1000  # put into an index at a time
_KEY = b"visavis"


@dataclass
class ShardReport:
    """Result of writing a shard: number of rows, and (source, reason) of what failed in them."""

    number: int
    items: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)


class ShardWriter:
    """Embeds planned shards into a folder or URL.

    Args:
        output: where the shards are written.
        ocr: recognise text in images and scanned pages.

    Raises:
        StoreError: the shards that are there were made with another model.
    """

    def __init__(self, model: Model, output: str, *, instruction: str = "", ocr: bool = False):
        self.model, self.output = model, output
        self.instruction, self.ocr = instruction, ocr
        if ocr:
            check_ocr()
        self.meta = {
            "model": model.name,
            "fingerprint": model.fingerprint,
            "dim": model.embedding_dim,
            "instruction": instruction,
        }
        for name in done_shards(output)[:1]:
            found = _meta(output, name)
            if {**found, "model": ""} != {**self.meta, "model": ""}:
                raise StoreError(
                    f"{output} holds shards of {found}, but this run makes {self.meta}; name "
                    "another output folder"
                )

    def write(self, shard: PlannedShard) -> ShardReport:
        """Embed the items of a shard and write it.

        Raises:
            VisavisError: a file of many items cannot be read, or the shard cannot be written.
        """
        report = ShardReport(shard.number)
        rows: list[dict[str, Any]] = []
        waiting: list[CorpusItem] = []
        hasher = ContentHasher()
        for part in shard.parts:
            for item in read_items(part):
                waiting.append(item)
                if len(waiting) == BATCH_ITEMS:
                    rows += self._rows(waiting, hasher, report)
                    waiting = []
        rows += self._rows(waiting, hasher, report)
        report.items = len(rows)
        report.failed += [(row["source"], row["error"]) for row in rows if row["error"]]
        write_file(self.output, shard.name, encoded(rows, self.meta))
        return report

    def _rows(
        self, items: Sequence[CorpusItem], hasher: ContentHasher, report: ShardReport
    ) -> list[dict[str, Any]]:
        """Return the rows of a batch; if one item fails, find out which."""
        rows = []
        for item, vector in zip(items, self._embedded(items), strict=True):
            found = ExtractedText()
            if item.prompt is not None and not isinstance(vector, VisavisError):
                try:
                    (part,) = item.prompt.messages[0].parts
                    found = found_text(part, Path(item.path) if item.path else None, ocr=self.ocr)
                except (OSError, VisavisError) as error:
                    report.failed.append((item.source, f"its text was not found: {error}"))
            rows.append(self._row(item, vector, found, hasher))
        return rows

    def _embedded(self, items: Sequence[CorpusItem]) -> list[np.ndarray | VisavisError]:
        prompts = [item.prompt for item in items if item.prompt is not None]
        found: list[np.ndarray | VisavisError] = []
        try:
            found = list(self._embed(prompts)) if prompts else []
        except VisavisError:
            for prompt in prompts:
                try:
                    found += list(self._embed([prompt]))
                except VisavisError as error:
                    found.append(error)
        vectors = iter(found)
        return [InputError(item.error) if item.prompt is None else next(vectors) for item in items]

    def _embed(self, prompts: Sequence[Any]) -> np.ndarray:
        return self.model.embed(prompts, instruction=self.instruction or None)

    def _row(
        self,
        item: CorpusItem,
        vector: np.ndarray | VisavisError,
        found: ExtractedText,
        hasher: ContentHasher,
    ) -> dict[str, Any]:
        is_embedded = item.prompt is not None and not isinstance(vector, VisavisError)
        own_text = "" if item.prompt is None else item.prompt.text
        names = "" if item.path else file_words(item.source)
        return {
            "source": item.source,
            "content": item.prompt.content_key(hasher.hash) if item.prompt and is_embedded else "",
            "kind": kind_of(item.prompt) if item.prompt else "",
            "path": item.path,
            "page": item.page,
            "date": found.date,
            "place": found.place,
            "text": own_text or item.text,
            "found_text": f"{names}\n{found.text}".strip(),
            "error": str(vector) if isinstance(vector, VisavisError) else "",
            "vector": vector if is_embedded else None,
        }


def done_shards(output: str) -> list[str]:
    """Return the names of the shards in a folder or at a URL, sorted.

    Raises:
        StoreError: it cannot be listed.
    """
    system, inner = file_system(output)
    try:
        if not system.exists(inner):
            return []
        names = (os.path.basename(path) for path in system.ls(inner, detail=False))
        return sorted(n for n in names if n.startswith("part-") and n.endswith(".parquet"))
    except OSError as error:
        raise StoreError(
            f"{output} cannot be listed ({error}); check address and rights"
        ) from error


def load_shards(store: VectorStore, shards: str, *, progress: bool = False) -> tuple[int, int]:
    """Put the items of shards into an index; nothing is embedded.

    Returns:
        Number of items in the shards that were put, and of those that have no vector.

    Raises:
        StoreError: there are no shards, one is damaged, or the index is of another model.
    """
    names = done_shards(shards)
    if not names:
        raise StoreError(
            f"{shards} holds no shards (part-….parquet), as `visavis embed` writes them"
        )
    num_put = num_failed = 0
    for name in track(names, "loading", weights=[1] * len(names), show=progress):
        meta = {key: str(value) for key, value in _meta(shards, name).items()}
        for rows, failed in _batches(shards, name):
            if rows:
                store.put(rows, {key: meta[key] for key in ("model", "fingerprint", "dim")})
            num_put, num_failed = num_put + len(rows), num_failed + failed
    store.refresh()
    return num_put, num_failed


def _batches(shards: str, name: str) -> Iterator[tuple[list[IndexRow], int]]:
    """Yield rows to keep, and how many have no vector."""
    with _opened(shards, name) as file:
        for batch in file.iter_batches(LOADED_ITEMS):
            table = batch.to_pydict()
            vectors = table.pop("vector")
            rows = []
            for number, vector in enumerate(vectors):
                row = {key: values[number] for key, values in table.items()}
                if not row.pop("error") and vector is not None:
                    rows.append(IndexRow(vector=np.array(vector, np.float32), **row))
            yield rows, len(vectors) - len(rows)


def encoded(rows: Sequence[Mapping[str, Any]], meta: Mapping[str, Any]) -> bytes:
    """Return rows as a Parquet file."""
    import pyarrow as arrow
    from pyarrow import parquet

    text, number = arrow.string(), arrow.float64()
    schema = arrow.schema(
        [
            ("source", text),
            ("content", text),
            ("kind", text),
            ("path", text),
            ("page", arrow.int32()),
            ("date", number),
            ("place", text),
            ("text", text),
            ("found_text", text),
            ("error", text),
            ("vector", arrow.list_(arrow.float32(), int(meta["dim"]))),
        ],
        metadata={_KEY: json.dumps(meta).encode()},
    )
    columns = {
        name: arrow.array([_stored(row[name]) for row in rows], schema.field(name).type)
        for name in schema.names
    }
    buffer = BytesIO()
    parquet.write_table(arrow.table(columns, schema=schema), buffer, compression="zstd")
    return buffer.getvalue()


def _stored(value: Any) -> Any:
    """Return a value as Arrow takes it: half characters of file names are replaced."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _opened(output: str, name: str) -> Any:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError:
        raise InputError("shards need pyarrow: pip install 'visavis[ray]'") from None
    system, inner = file_system(output)
    try:
        return parquet.ParquetFile(system.open(f"{inner}/{name}"))
    except (OSError, ArrowInvalid) as error:
        raise StoreError(
            f"the shard {name} in {output} cannot be read ({error}); delete it and run "
            "`visavis embed` again"
        ) from error


def _meta(output: str, name: str) -> dict[str, Any]:
    with _opened(output, name) as file:
        found = (file.schema_arrow.metadata or {}).get(_KEY)
    if found is None:
        raise StoreError(
            f"{name} in {output} is a Parquet file of another program, expected a shard that "
            "`visavis embed` wrote; name another folder"
        )
    meta: dict[str, Any] = json.loads(found)
    return meta
