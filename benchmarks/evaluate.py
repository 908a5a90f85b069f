"""Scoring of benchmark suites: a large corpus, all of MMEB-V1 in real size, and embedding's share.

    python benchmarks/evaluate.py [--quick] [--json FILE] [--model MODEL]

    corpus    1,000 queries × 100,000 candidates of 1,536 numbers, all metrics; vectors in files
    mmeb-v1   36 tasks of 1,000 queries with 1,000 candidates each, of 1,536 numbers
    embed     items a second through the evaluation's cache, over Model.embed on the same items

Vectors are random and clustered, so that the right candidate is near. Times are in seconds with the
threads torch and BLAS are given (OMP_NUM_THREADS); memory is the peak of the process.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from visavis.evaluate.items import Item, RetrievalData
from visavis.evaluate.metrics import Relevant
from visavis.evaluate.scoring import score
from visavis.evaluate.vectors import SHARD, Vectors, embed_all

DIM = 1536


def shards(folder: Path, rows: int, rng: np.random.Generator) -> Vectors:
    """Return random unit vectors in mapped files, as a run leaves them."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for number, first in enumerate(range(0, rows, SHARD)):
        block = rng.standard_normal((min(SHARD, rows - first), DIM), np.float32)
        block /= np.linalg.norm(block, axis=1, keepdims=True)
        path = folder / f"{number:05d}.npy"
        np.save(path, block)
        found.append(np.load(path, mmap_mode="r"))
    return Vectors(found, DIM)


def near(candidates: Vectors, numbers: np.ndarray, rng: np.random.Generator) -> Vectors:
    """Return queries near the candidates with some numbers."""
    rows = candidates.rows(numbers) + 0.06 * rng.standard_normal((len(numbers), DIM), np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return Vectors([rows.astype(np.float32)], DIM)


def corpus(queries: int, candidates: int, folder: Path) -> dict[str, Any]:
    """Score queries against a corpus that all of them share."""
    rng = np.random.default_rng(0)
    vectors = shards(folder, candidates, rng)
    right = rng.integers(0, candidates, queries)
    data = RetrievalData(
        [Item()] * queries,
        [str(i) for i in range(queries)],
        [Item()] * candidates,
        [Relevant.of({int(n): 1.0}) for n in right],
    )
    asked = near(vectors, right, rng)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    found = score(data, asked, vectors)
    return {
        "seconds": round(time.perf_counter() - started, 2),
        "hit@1": float(found.metrics["hit@1"].mean()),
        "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "peak MB before": before // 1024,
        "queries": queries,
        "candidates": candidates,
    }


def mmeb(tasks: int, queries: int, pool: int, folder: Path) -> dict[str, Any]:
    """Score tasks whose queries have candidates of their own, drawn from three times as many."""
    rng = np.random.default_rng(1)
    vectors = shards(folder, 3 * pool, rng)
    seconds = 0.0
    for _ in range(tasks):
        pools = [rng.permutation(3 * pool)[:pool] for _ in range(queries)]
        data = RetrievalData(
            [Item()] * queries,
            [str(i) for i in range(queries)],
            [Item()] * (3 * pool),
            [Relevant.of({int(one[0]): 1.0}) for one in pools],
            pools,
        )
        asked = near(vectors, np.array([one[0] for one in pools]), rng)
        started = time.perf_counter()
        score(data, asked, vectors)
        seconds += time.perf_counter() - started
    return {"seconds": round(seconds, 2), "tasks": tasks, "queries": queries, "pool": pool}


def embedding(name: str, count: int, folder: Path) -> dict[str, Any]:
    """Return items a second through the cache and directly, in turns."""
    import visavis

    model = visavis.load(name)
    words = [
        "a",
        "red",
        "cup",
        "on",
        "the",
        "table",
        "beside",
        "two",
        "blue",
        "books",
        "and",
        "an",
        "old",
        "radio",
    ]
    rates: dict[str, list[float]] = {"evaluate": [], "embed": []}
    for turn in range(4):
        texts = [" ".join([*words[i % 9 :], str(turn), str(i)]) for i in range(count)]
        items = [Item(text) for text in texts]
        for way in sorted(rates, reverse=bool(turn % 2)):  # in turns, as the machine may tire
            started = time.perf_counter()
            if way == "evaluate":
                embed_all(model, items, folder=folder)
            else:
                model.embed(texts)
            rates[way].append(count / (time.perf_counter() - started))
    median = {key: float(np.median(values)) for key, values in rates.items()}
    return {
        "model": name,
        "items": count,
        "items/s through evaluate": round(median["evaluate"], 1),
        "items/s of Model.embed": round(median["embed"], 1),
        "ratio": round(median["evaluate"] / median["embed"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the program")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--model", default="nano")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        small = options.quick
        results = {
            "corpus": corpus(*((50, 3000) if small else (1000, 100_000)), root / "corpus"),
            "mmeb-v1": mmeb(*((2, 30, 40) if small else (36, 1000, 1000)), root / "mmeb"),
            "embed": embedding(options.model, 32 if small else 512, root / "embed"),
        }
    for name, found in results.items():
        print(name, json.dumps(found))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
