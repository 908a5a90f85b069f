"""Moving an index to another model: every item is embedded again, from its file or from what is
kept of it.

The new vectors are collected beside the old ones in another space of the table `vectors`, so that
searches with the old model continue and an interrupted run is resumed. When every item has one, a
single transaction makes the new space the one that is searched.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from visavis.errors import InputError, StoreError, VisavisError
from visavis.index.adding import BATCH_ITEMS
from visavis.index.files import Entry, embedded, identified, stamp_of
from visavis.index.items import segment_of, shown_by, visual_of
from visavis.index.names import SourceName
from visavis.index.schema import new_generation
from visavis.index.sqlite_store import SPACE, SqliteStore
from visavis.index.store import StoredItem
from visavis.inputs import Prompt
from visavis.processing.images import ContentHasher
from visavis.utils import track

if TYPE_CHECKING:
    from visavis.api import Model

_READ = 500


@dataclass
class MigrateReport:
    """Result of `migrate`.

    Attributes:
        embedded: contents embedded now.
        items: items in the index.
        failed: (source, reason) of each item that cannot be embedded again.
        is_done: whether the index is that of the new model now.
        removed: number of items that were removed because they cannot be embedded.
    """

    embedded: int = 0
    items: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    is_done: bool = False
    removed: int = 0


def migrate(
    store: SqliteStore, model: Model, *, drop: bool = False, progress: bool = False
) -> MigrateReport:
    """Move an index to another model.

    Args:
        model: the new model.
        drop: remove the items that cannot be embedded again; else the index stays as it is where
            there are any.
        progress: show a bar on stderr.

    Raises:
        StoreError: there is no index, or it cannot be written.
        InputError: the index is one of this model already.
    """
    if not store.exists():
        raise StoreError(f"there is no index file {store.name}; check the spelling")
    meta = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "dim": str(model.embedding_dim),
    }
    if store.meta().get("fingerprint") == model.fingerprint:
        raise InputError(f"{store.name} is an index of the model {model.name!r} already")
    report = MigrateReport()
    space = _begin(store, meta)
    hasher = ContentHasher()
    while not report.is_done:
        embedded_before = report.embedded
        report.failed.clear()
        missing = _missing(store, space)
        for batch in track(
            _batches(missing), "migrating", weights=_weights(len(missing)), show=progress
        ):
            _embed(store, model, space, batch, hasher, report)
        if report.failed and not drop:
            break
        gone = [source for source, _ in report.failed]
        report.is_done = _finish(store, space, meta, gone)
        report.removed += len(gone) if report.is_done else 0
        if not report.is_done and report.embedded == embedded_before:
            break  # another process adds faster than items can be embedded
    report.items = store.count()
    if report.is_done:
        _clean(store)
        store.refresh()
    return report


def _begin(store: SqliteStore, meta: dict[str, str]) -> int:
    """Return the space of the new vectors; that of an interrupted run for the same model."""
    with store.file.writing() as connection:
        rows = dict(connection.execute("SELECT key, value FROM meta"))
        wanted = json.dumps(meta, sort_keys=True)
        if rows.get("next_model") != wanted:
            connection.execute(f"DELETE FROM vectors WHERE space != {SPACE}")
            connection.execute("INSERT OR REPLACE INTO meta VALUES ('next_model', ?)", (wanted,))
        return int(rows["space"]) + 1


def _missing(store: SqliteStore, space: int) -> list[int]:
    """Return an item of each content that has no vector in the new space."""
    rows = store.file.all(
        "SELECT min(i.id) FROM items i JOIN vectors v ON v.id = i.vector WHERE NOT EXISTS"
        " (SELECT 1 FROM vectors n WHERE n.content = v.content AND n.space = ?)"
        " GROUP BY v.content ORDER BY min(i.id)",
        space,
    )
    return [row[0] for row in rows]


def _batches(ids: Sequence[int]) -> Iterator[Sequence[int]]:
    for first in range(0, len(ids), BATCH_ITEMS):
        yield ids[first : first + BATCH_ITEMS]


def _weights(number: int) -> list[int]:
    return [min(BATCH_ITEMS, number - first) for first in range(0, number, BATCH_ITEMS)]


def _embed(
    store: SqliteStore,
    model: Model,
    space: int,
    ids: Sequence[int],
    hasher: ContentHasher,
    report: MigrateReport,
) -> None:
    """Embed a batch of items and commit their vectors."""
    prompts: dict[str, tuple[str, Any]] = {}
    for item in store.items(ids).values():
        try:
            prompts[item.content] = item.source, _prompt(item, hasher)
        except VisavisError as error:
            report.failed.append((item.source, str(error)))
    vectors: dict[str, np.ndarray] = {}
    try:
        if prompts:
            found = model.embed([prompt for _, prompt in prompts.values()])
            vectors = dict(zip(prompts, found, strict=True))
    except VisavisError:
        for content, (source, prompt) in prompts.items():
            try:
                vectors[content] = model.embed([prompt])[0]
            except VisavisError as error:
                report.failed.append((source, str(error)))
    with store.file.writing() as connection:
        connection.executemany(
            "INSERT OR REPLACE INTO vectors (space, content, vector) VALUES (?, ?, ?)",
            [
                (space, content, np.asarray(vector, "<f4").tobytes())
                for content, vector in vectors.items()
            ],
        )
    report.embedded += len(vectors)


def _prompt(item: StoredItem, hasher: ContentHasher) -> Prompt:
    """Return the prompt of an item, from its file or from what is kept of it.

    Raises:
        VisavisError: its file is gone, cannot be read, or has changed.
    """
    if not item.is_file:
        visual = visual_of(item)
        return Prompt.of([*([visual] if visual is not None else []), *_texts(item)])
    segment = segment_of(item)
    named = SourceName.parse(item.source)
    shown = Path(named.path) if segment else shown_by(item.source)
    entry = Entry(
        item.source,
        Prompt.of(shown),
        kind=item.kind,
        path=item.path,
        segment=segment,
        stamp=stamp_of(item.path),
    )
    entry, content = identified(entry, hasher)
    if content != item.content:
        raise InputError(
            f"{item.source} has changed since it was indexed; add it again with the old model "
            "first, or remove it"
        )
    (prompt,) = embedded([entry])
    return prompt


def _texts(item: StoredItem) -> list[dict[str, str]]:
    return [{"type": "text", "text": item.text}] if item.text.strip() else []


def _finish(store: SqliteStore, space: int, meta: dict[str, str], gone: Sequence[str]) -> bool:
    """Make the new vectors those that are searched; return False if an item has none."""
    store.remove(gone)
    with store.file.writing() as connection:
        new = (
            "(SELECT n.id FROM vectors v JOIN vectors n ON n.content = v.content AND n.space = ?"
            " WHERE v.id = items.vector)"
        )
        left = connection.execute(f"SELECT count(*) FROM items WHERE {new} IS NULL", (space,))
        if left.fetchone()[0]:
            return False
        connection.execute(f"UPDATE items SET vector = {new}", (space,))
        for key, value in (meta | {"space": str(space)}).items():
            connection.execute("UPDATE meta SET value = ? WHERE key = ?", (value, key))
        connection.execute("DELETE FROM meta WHERE key = 'next_model'")
        new_generation(connection)
    return True


def _clean(store: SqliteStore) -> None:
    """Remove the vectors of the old model, some at a time, so that readers go ahead."""
    while True:
        with store.file.writing() as connection:
            removed = connection.execute(
                "DELETE FROM vectors WHERE id IN"
                f" (SELECT id FROM vectors WHERE space != {SPACE} LIMIT 5000)"
            ).rowcount
        if removed < 1:
            return
