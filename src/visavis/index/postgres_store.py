"""The store of an index in a PostgreSQL database with pgvector, for many readers and writers.

    items.vector ──► vectors.id      items of the same content share one vector
    search: pgvector's nearest ──► exact cosines of these in float64 ──► the k best

Answers are those of an index file: vectors are compared exactly, and words are counted as FTS5
counts them (`word_counts.py`). With an HNSW index on `visavis_vectors`, which an administrator
makes for speed, pgvector finds the candidates approximately.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from visavis.errors import NonFiniteError, StoreError
from visavis.index.filters import Filter
from visavis.index.postgres_connection import PostgresConnection
from visavis.index.postgres_schema import (
    FORMAT_VERSION,
    LOCK,
    condition_of,
    from_text,
    key_of,
    make_tables,
    metadata_values,
    to_text,
)
from visavis.index.sql_values import readable
from visavis.index.sqlite_store import COMMON
from visavis.index.store import (
    FileState,
    IndexRow,
    KnownItem,
    Stamp,
    StoredItem,
    WordMatch,
    check_meta,
    cosines,
    cosines_by_id,
)
from visavis.index.word_counts import K1, B, count_words, inverse_frequency, stems_of

SLACK = 64  # more candidates than wanted, whose exact order may differ from pgvector's
EF_SEARCH = 800  # candidates that HNSW keeps
_ITEMS = (
    "SELECT i.id, i.source, v.content, i.kind, i.path, i.page, i.begin_s, i.end_s, i.date,"
    " i.place, i.text, i.found_text, i.metadata, i.preview FROM visavis_items i"
    " JOIN visavis_vectors v ON v.id = i.vector"
)
_COLUMNS = (
    *("key", "source", "kind", "path", "path_key", "page", "begin_s", "end_s", "date", "place"),
    *("text", "found_text", "metadata", "metadata_values", "size", "mtime_ns", "parts"),
    *("settings", "preview", "words", "num_tokens"),
)
_KEPT = ("metadata", "metadata_values")  # where a row states none


class PostgresStore:
    """A `VectorStore` in a PostgreSQL database; the first `put` makes its tables.

    Args:
        address: `postgresql://user:password@host:port/database`. The tables are made in the first
            schema of the search path: `?options=-csearch_path%3Dphotos,public` names another one.

    Raises:
        StoreError: the database cannot be reached, has no pgvector, or holds an index of a newer
            version.
    """

    def __init__(self, address: str) -> None:
        self.database = PostgresConnection(address)
        found = self._all_meta()
        if found and found.get("format") != FORMAT_VERSION:
            raise StoreError(
                f"{self.name} has index format {found.get('format')}, expected {FORMAT_VERSION}; "
                "it comes from a newer version of visavis: upgrade visavis"
            )

    @property
    def name(self) -> str:
        return self.database.name

    def exists(self) -> bool:
        return bool(self.meta())

    def close(self) -> None:
        self.database.close()

    def refresh(self) -> None:
        """Nothing: PostgreSQL keeps its own statistics."""

    def meta(self) -> dict[str, str]:
        found = self._all_meta()
        return {key: found[key] for key in ("model", "fingerprint", "dim") if key in found}

    def _all_meta(self) -> dict[str, str]:
        with self.database.transaction() as connection:
            return _meta(connection)

    # --- writing ----------------------------------------------------------------------------------

    def put(self, rows: Sequence[IndexRow], meta: Mapping[str, str]) -> None:
        for row in rows:
            if not np.isfinite(row.vector).all():
                raise NonFiniteError(
                    f"{self.name}: the vector of {row.source[:80]} holds NaN or infinite numbers. "
                    "The model that made it is damaged or overflowed"
                )
        counts = count_words(f"{row.text}\n{row.found_text}" for row in rows)
        with self.database.transaction(writing=True) as connection:
            connection.execute(LOCK)
            found = _meta(connection)
            if not found:
                make_tables(connection, meta, self.name)
            check_meta(self.name, found, meta)
            self.database.register_vectors(connection)
            keys = [key_of(row.source) for row in rows]
            replaced, before = _state(connection, keys)
            with connection.cursor() as cursor:
                contents = {row.content: row.vector for row in rows}
                cursor.executemany(
                    "INSERT INTO visavis_vectors AS v (content, vector) VALUES (%s, %s)"
                    " ON CONFLICT (content) DO UPDATE SET vector = EXCLUDED.vector"
                    " WHERE v.vector <> EXCLUDED.vector",
                    [(key, vector.astype(np.float32)) for key, vector in contents.items()],
                )
                cursor.executemany(
                    _UPSERT,
                    [_values(row, one) for row, one in zip(rows, counts, strict=True)],
                )
            put = connection.execute(
                "SELECT id FROM visavis_vectors WHERE content = ANY(%s)", (list(contents),)
            )
            unused = [*replaced, *(row[0] for row in put.fetchall())]  # perhaps
            _settle(connection, unused, before, _state(connection, keys)[1])

    def remove(self, sources: Iterable[str]) -> None:
        keys = [key_of(source) for source in sources]
        with self.database.transaction(writing=True) as connection:
            connection.execute(LOCK)
            removed, before = _state(connection, keys)
            connection.execute("DELETE FROM visavis_items WHERE key = ANY(%s)", (keys,))
            _settle(connection, removed, before, (0, 0))

    def leave_out(self, place: str, reasons: Mapping[tuple[str, str], int]) -> None:
        with self.database.transaction(writing=True) as connection:
            connection.execute(LOCK)
            connection.execute("DELETE FROM visavis_left_out WHERE place = %s", (to_text(place),))
            with connection.cursor() as cursor:
                cursor.executemany(
                    "INSERT INTO visavis_left_out VALUES (%s, %s, %s, %s)",
                    [
                        (to_text(place), readable(suffix), readable(reason), number)
                        for (suffix, reason), number in reasons.items()
                    ],
                )

    # --- reading ----------------------------------------------------------------------------------

    def known(self, sources: Sequence[str]) -> dict[str, KnownItem]:
        rows = self.database.all(
            "SELECT i.source, v.content, i.size, i.mtime_ns, i.settings, i.parts"
            " FROM visavis_items i JOIN visavis_vectors v ON v.id = i.vector"
            " WHERE i.key = ANY(%s)",
            ([key_of(source) for source in sources],),
        )
        return {
            from_text(row[0]): KnownItem(row[1], Stamp(row[2], row[3]), row[4], row[5])
            for row in rows
        }

    def files(self, paths: Sequence[str]) -> dict[str, list[FileState]]:
        rows = self.database.all(
            "SELECT path, size, mtime_ns, settings, parts, count(*) FROM visavis_items"
            " WHERE path_key = ANY(%s) GROUP BY path, size, mtime_ns, settings, parts",
            ([key_of(path) for path in paths],),
        )
        found: dict[str, list[FileState]] = {}
        for path, size, mtime_ns, settings, parts, number in rows:
            state = FileState(Stamp(size, mtime_ns), settings, parts, number)
            found.setdefault(from_text(path), []).append(state)
        return found

    def sources_of(self, path: str) -> list[str]:
        rows = self.database.all(
            "SELECT source FROM visavis_items WHERE path_key = %s ORDER BY id", (key_of(path),)
        )
        return [from_text(row[0]) for row in rows]

    def vectors_of(self, contents: Sequence[str]) -> dict[str, np.ndarray]:
        rows = self.database.all(
            "SELECT content, vector FROM visavis_vectors WHERE content = ANY(%s)",
            (list(contents),),
        )
        return {content: _array(vector) for content, vector in rows}

    def vectors(self, ids: Sequence[int]) -> dict[int, np.ndarray]:
        rows = self.database.all(
            "SELECT i.id, v.vector FROM visavis_items i"
            " JOIN visavis_vectors v ON v.id = i.vector WHERE i.id = ANY(%s)",
            (list(ids),),
        )
        return {number: _array(vector) for number, vector in rows}

    def items(self, ids: Sequence[int]) -> dict[int, StoredItem]:
        rows = self.database.all(f"{_ITEMS} WHERE i.id = ANY(%s)", (list(ids),))
        return {row[0]: _item(row) for row in rows}

    def first(self, limit: int, offset: int = 0, filter: Filter | None = None) -> list[StoredItem]:
        condition, values = condition_of(filter)
        rows = self.database.all(
            f"{_ITEMS} WHERE {condition} ORDER BY i.id LIMIT %(limit)s OFFSET %(offset)s",
            {**values, "limit": limit, "offset": offset},
        )
        return [_item(row) for row in rows]

    def file_items(self) -> Iterator[tuple[str, str]]:
        last = 0
        while True:
            rows = self.database.all(
                "SELECT id, source, path FROM visavis_items WHERE id > %s AND path <> ''"
                " ORDER BY id LIMIT 1000",
                (last,),
            )
            for _, source, path in rows:
                yield from_text(source), from_text(path)
            if not rows:
                return
            last = rows[-1][0]

    def folders(self) -> dict[tuple[str, str], int]:
        rows = self.database.all(
            "SELECT kind, coalesce(substring(path FROM '^(.*/)[^/]*$'), ''), count(*)"
            " FROM visavis_items GROUP BY 1, 2"
        )
        found: dict[tuple[str, str], int] = {}
        for kind, folder, number in rows:
            key = kind, os.path.dirname(from_text(folder))
            found[key] = found.get(key, 0) + number
        return dict(sorted(found.items()))

    def count(self, filter: Filter | None = None) -> int:
        found = self._all_meta()
        if not found or filter is None:
            return int(found.get("num_items", 0))
        condition, values = condition_of(filter)
        query = f"SELECT count(*) FROM visavis_items i WHERE {condition}"
        return int(self.database.all(query, values)[0][0])

    def left_out(self) -> dict[tuple[str, str], int]:
        rows = self.database.all(
            "SELECT suffix, reason, sum(files)::bigint FROM visavis_left_out"
            ' GROUP BY suffix, reason ORDER BY suffix COLLATE "C", reason COLLATE "C"'
        )
        return {(suffix, reason): number for suffix, reason, number in rows}

    # --- searching --------------------------------------------------------------------------------

    def nearest(
        self, query: np.ndarray, limit: int, filter: Filter | None = None
    ) -> list[tuple[int, float]]:
        condition, values = condition_of(filter)
        with self.database.transaction() as connection:
            candidates = _candidates(connection, query, limit, condition, values)
            if not candidates:
                return []
            scores = cosines(np.stack([vector for _, vector in candidates]), query)
            values |= {
                "vectors": [number for number, _ in candidates],
                "scores": scores.tolist(),
                "limit": limit,
            }
            rows = connection.execute(
                "SELECT i.id, s.score FROM"
                " unnest(%(vectors)s::bigint[], %(scores)s::float8[]) AS s (vector, score)"
                f" JOIN visavis_items i ON i.vector = s.vector WHERE {condition}"
                " ORDER BY s.score DESC, i.id LIMIT %(limit)s",
                values,
            ).fetchall()
        return [(number, score) for number, score in rows]

    def cosines(self, query: np.ndarray, ids: Sequence[int]) -> dict[int, float]:
        return cosines_by_id(self.vectors(ids), query)

    def matching(
        self, words: Sequence[str], limit: int, filter: Filter | None = None
    ) -> list[WordMatch]:
        stems = stems_of(words)
        with self.database.transaction() as connection:
            meta = _meta(connection)
            num_items = int(meta.get("num_items", 0))
            if not num_items:
                return []
            common = max(COMMON, num_items // 10)
            counted = {word: _num_items_with(connection, stems[word], common) for word in words}
            useful = [word for word in words if counted[word] <= common] or list(words)
            weights = {
                word: inverse_frequency(num_items, _num_items_with(connection, stems[word]))
                for word in useful
            }
            average = int(meta["num_tokens"]) / num_items
            query, values = _ranking([(stems[word], weights[word]) for word in useful], average)
            condition, conditions = condition_of(filter)
            least = (len(useful) + 1) // 2
            rows = connection.execute(
                f"SELECT id, score, has FROM ({query} WHERE {condition}) AS scored"
                " WHERE cardinality(array_positions(has, TRUE)) >= %(least)s"
                " ORDER BY cardinality(array_positions(has, TRUE)) DESC, score DESC, id"
                " LIMIT %(limit)s",
                {**values, **conditions, "least": max(1, least), "limit": limit},
            ).fetchall()
        return [
            WordMatch(
                number, score, tuple(w for w, found in zip(useful, has, strict=True) if found)
            )
            for number, score, has in rows
        ]


_UPSERT = (
    f"INSERT INTO visavis_items AS i (vector, {', '.join(_COLUMNS)}) VALUES"
    " ((SELECT id FROM visavis_vectors WHERE content = %(content)s),"
    f" {', '.join(f'%({name})s' for name in _COLUMNS)})"
    " ON CONFLICT (key) DO UPDATE SET vector = EXCLUDED.vector, "
    + ", ".join(
        f"{name} = CASE WHEN %(has_metadata)s THEN EXCLUDED.{name} ELSE i.{name} END"
        if name in _KEPT
        else f"{name} = EXCLUDED.{name}"
        for name in _COLUMNS
    )
)


def _values(row: IndexRow, counts: Mapping[str, int]) -> dict[str, Any]:
    metadata = dict(row.metadata or {})
    return {
        "content": row.content,
        "has_metadata": row.metadata is not None,
        "key": key_of(row.source),
        "source": to_text(row.source),
        "kind": row.kind,
        "path": to_text(row.path),
        "path_key": key_of(row.path),
        "page": row.page,
        "begin_s": row.begin_s,
        "end_s": row.end_s,
        "date": row.date,
        "place": readable(row.place),
        "text": readable(row.text),
        "found_text": readable(row.found_text),
        "metadata": json.dumps(metadata, sort_keys=True),
        "metadata_values": metadata_values(metadata),
        "size": row.stamp.size,
        "mtime_ns": row.stamp.mtime_ns,
        "parts": row.parts,
        "settings": row.settings,
        "preview": row.preview,
        "words": json.dumps(counts),
        "num_tokens": sum(counts.values()),
    }


def _meta(connection: Any) -> dict[str, str]:
    """Return everything in the table of metadata; nothing where there is no index yet."""
    found = connection.execute(
        "SELECT 1 FROM pg_tables WHERE schemaname = current_schema() AND tablename = 'visavis_meta'"
    )
    if found.fetchone() is None:
        return {}
    return dict(connection.execute("SELECT key, value FROM visavis_meta").fetchall())


def _state(connection: Any, keys: Sequence[str]) -> tuple[list[int], tuple[int, int]]:
    """Return the vectors of some items, and how many items and tokens these are."""
    rows = connection.execute(
        "SELECT vector, num_tokens FROM visavis_items WHERE key = ANY(%s)", (list(keys),)
    ).fetchall()
    return [row[0] for row in rows], (len(rows), sum(row[1] for row in rows))


def _settle(
    connection: Any, vectors: Sequence[int], before: tuple[int, int], after: tuple[int, int]
) -> None:
    """Forget vectors that no item has any more, and count items and tokens."""
    connection.execute(
        "DELETE FROM visavis_vectors v WHERE v.id = ANY(%s)"
        " AND NOT EXISTS (SELECT 1 FROM visavis_items i WHERE i.vector = v.id)",
        (list(vectors),),
    )
    for key, old, new in zip(("num_items", "num_tokens"), before, after, strict=True):
        connection.execute(
            "UPDATE visavis_meta SET value = (value::bigint + %s)::text WHERE key = %s",
            (new - old, key),
        )


def _candidates(
    connection: Any, query: np.ndarray, limit: int, condition: str, values: Mapping[str, Any]
) -> list[tuple[int, np.ndarray]]:
    """Return (number, vector) of vectors among which are those of the nearest items.

    pgvector adds in float32: candidates are read until the last is farther from the query than the
    wanted ones by more than its rounding.
    """
    is_indexed = connection.execute(
        "SELECT EXISTS (SELECT 1 FROM pg_indexes WHERE schemaname = current_schema() AND tablename"
        " = 'visavis_vectors' AND strpos(indexdef, ' USING hnsw ') > 0)"
    ).fetchone()[0]
    if is_indexed:
        connection.execute(f"SET LOCAL hnsw.ef_search = {min(1000, max(EF_SEARCH, 2 * limit))}")
        connection.execute("SET LOCAL hnsw.iterative_scan = relaxed_order")
    matches = f"EXISTS (SELECT 1 FROM visavis_items i WHERE i.vector = v.id AND {condition})"
    where = "" if condition == "TRUE" else f" WHERE {matches}"
    rounding = (len(query) / 8 + 8) * 2**-24
    number = limit + SLACK
    while True:
        rows = connection.execute(
            "SELECT v.id, v.vector, v.vector <#> %(query)s AS distance"
            f" FROM visavis_vectors v{where} ORDER BY distance LIMIT %(number)s",
            {**values, "query": query.astype(np.float32), "number": number},
        ).fetchall()
        if is_indexed or len(rows) < number or rows[-1][2] > rows[limit - 1][2] + 2 * rounding:
            return [(row[0], _array(row[1])) for row in rows]
        number *= 8


def _num_items_with(connection: Any, stems: Sequence[str], limit: int | None = None) -> int:
    """Return how many items hold a word, counting at most `limit` + 1."""
    if not stems:
        return 0
    bound = "" if limit is None else f"LIMIT {limit + 1}"
    return int(
        connection.execute(
            "SELECT count(*) FROM (SELECT 1 FROM visavis_items WHERE words ?& %s"
            f" {bound}) AS found",
            (list(stems),),
        ).fetchone()[0]
    )


def _ranking(words: Sequence[tuple[Sequence[str], float]], average: float) -> tuple[str, Any]:
    """Return the query of BM25 scores of all items that hold a word, without its end, and its
    parameters; `has`: which of the words an item holds."""
    values: dict[str, Any] = {"average": float(average), "any": [s for w, _ in words for s in w]}
    scores, has = [], []
    for number, (stems, weight) in enumerate(words):
        values |= {f"stems{number}": list(stems), f"weight{number}": float(weight)}
        holds = f"(i.words ?& %(stems{number})s)" if stems else "FALSE"
        counts = [f"(i.words->>%(stem{number}_{index})s)::float8" for index in range(len(stems))]
        values |= {f"stem{number}_{index}": stem for index, stem in enumerate(stems)}
        count = f"LEAST({', '.join(counts)})" if counts else "0"
        length = f"{K1}::float8 * ({1 - B} + {B}::float8 * i.num_tokens / %(average)s)"
        score = f"%(weight{number})s * (({count} * {K1 + 1}::float8) / ({count} + {length}))"
        scores.append(f"CASE WHEN {holds} THEN {score} ELSE 0 END")
        has.append(holds)
    total, holding = " + ".join(scores), ", ".join(has)
    return (
        f"SELECT i.id, {total} AS score, ARRAY[{holding}] AS has"
        " FROM (SELECT * FROM visavis_items WHERE words ?| %(any)s) AS i",
        values,
    )


def _array(vector: Any) -> np.ndarray:
    """Return a vector as float32 [D]."""
    found: np.ndarray = vector.to_numpy().astype(np.float32)
    return found


def _item(row: tuple[Any, ...]) -> StoredItem:
    number, source, content, kind, path, *numbers = row
    *numbers, place, text, found_text, metadata, preview = numbers
    page, begin_s, end_s, date = numbers
    return StoredItem(
        *(number, from_text(source), content, kind, from_text(path), page, begin_s, end_s),
        *(date, place, text, found_text, json.loads(metadata), preview),
    )
