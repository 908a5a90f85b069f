"""Coded vectors and their files: the search is exact, and the database alone counts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visavis.index import coded_rows
from visavis.index.coding import Query, encode
from visavis.index.filters import Filter
from visavis.index.sqlite_store import SqliteStore
from visavis.index.store import IndexRow, cosines
from visavis.native import library

DIM = 24
META = {"model": "tiny", "fingerprint": "abc", "dim": str(DIM)}


def unit(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / norms).astype(np.float32)


def sample(kind: str, number: int, seed: int = 0) -> np.ndarray:
    """Return vectors that are hard to tell apart in different ways."""
    random = np.random.default_rng(seed)
    noise = random.normal(size=(number, DIM))
    if kind == "near duplicates":
        return unit(noise[:1] + 1e-5 * noise)
    if kind == "equal":
        return unit(np.repeat(noise[:3], -(-number // 3), 0)[:number])
    if kind == "one axis":
        return unit(np.eye(DIM)[random.integers(0, DIM, number)] + 1e-9 * noise)
    if kind == "clusters":
        return unit(noise[random.integers(0, min(5, number), number)] + 0.1 * noise)
    return unit(noise)


KINDS = ("random", "clusters", "near duplicates", "equal", "one axis")


def expected(vectors: np.ndarray, query: np.ndarray, k: int, mask: np.ndarray) -> list[int]:
    """Return the rows of the k best by comparing all of them."""
    scores = np.where(mask, cosines(vectors, query), -np.inf)
    best = np.lexsort((np.arange(len(vectors)), -scores))[:k]
    return [int(i) for i in best if mask[i]]


@pytest.fixture(params=["kernels", "numpy"])
def either(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run with the compiled kernels, where they are, and without."""
    if request.param == "numpy":
        monkeypatch.setattr("visavis.index.coding.native", lambda: None)
    elif library.native() is None:
        pytest.skip("the kernels are not compiled")


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("kind", KINDS)
def test_bounds_hold_and_hold_the_best(kind: str) -> None:
    vectors = sample(kind, 700)
    codes, scales, errors = encode(vectors)
    for query in [*sample(kind, 3, seed=1), vectors[5], np.eye(DIM, dtype=np.float32)[0]]:
        exact = cosines(vectors, query)
        asked = Query(query)
        scores = asked.scores(asked.products(codes), scales)
        assert (np.abs(scores - exact) <= asked.margins(errors)).all()
        rows = np.array([3, 699, 0, 5])
        np.testing.assert_array_equal(asked.products(codes, rows), asked.products(codes)[rows])
        for k in (1, 10, 650, 2000):
            found, upper = asked.candidates(scores, errors, k)
            assert (upper >= exact[found]).all() and (np.diff(upper) <= 0).all()
            assert set(np.sort(exact)[::-1][:k]) <= set(exact[found])
            assert len(set(found.tolist())) == len(found)


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("dim", [1, 3, 512, 4096])
def test_no_sum_overflows(dim: int) -> None:
    for vector in (np.ones(dim), -np.ones(dim), np.eye(dim)[0], np.zeros(dim)):
        vectors = np.stack([vector, -vector]).astype(np.float32)
        codes, scales, errors = encode(vectors)
        asked = Query(vectors[0])
        scores = asked.scores(asked.products(codes), scales)
        assert (np.abs(scores - cosines(vectors, vectors[0])) <= asked.margins(errors) * dim).all()


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write files of a few rows, so that small indexes have several parts."""
    monkeypatch.setattr(coded_rows, "APPENDED", 16)


def row(number: int, vector: np.ndarray) -> IndexRow:
    kind = ("image", "page", "video")[number % 3]
    return IndexRow(
        f"/{number % 4}/{number}.png",
        f"content {vector.tobytes().hex()}",
        vector,
        kind=kind,
        path=f"/{number % 4}/{number}.png",
        date=None if number % 7 == 0 else float(number),
        metadata={"tag": ["a", str(number % 5)], "odd": bool(number % 2)},
    )


FILTERS = (
    None,
    Filter(kinds=("page", "video")),
    Filter(folder="/2", after=20),
    Filter(before=15),
    Filter(glob="*3.png"),
    Filter(metadata=(("tag", "3"), ("odd", "true"))),
    Filter(kinds=("text",)),
)


def matches(filter: Filter | None, one: IndexRow) -> bool:
    return filter is None or filter.matches(
        source=one.source, kind=one.kind, path=one.path, date=one.date, metadata=one.metadata or {}
    )


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_search_is_exact_through_changes(tmp_path: Path, kind: str, seed: int) -> None:
    """Random additions, changes and removals by two writers, each compared with all rows."""
    random = np.random.default_rng(seed)
    stores = [SqliteStore(tmp_path / "a.idx")]
    vectors = sample(kind, 400, seed)
    kept: dict[str, tuple[int, IndexRow]] = {}
    for step in range(12):
        first = int(random.integers(0, 60))
        rows = [row(n, vectors[random.integers(0, 400)]) for n in range(first, first + 25)]
        stores[step % len(stores)].put(rows, META)
        for one in rows:
            number = kept[one.source][0] if one.source in kept else None
            if number is None:
                number = next(n for n, i in _items(stores[0]).items() if i == one.source)
            kept[one.source] = number, one
        gone = [source for source in kept if random.random() < 0.1]
        stores[0].remove(gone)
        for source in gone:
            del kept[source]
        if step == 3:
            stores.append(SqliteStore(tmp_path / "a.idx"))
        if step == 6:
            shutil.rmtree(tmp_path / "a.idx.vectors")
        if step == 8:
            stores[0].refresh()
        ordered = sorted(kept.values(), key=lambda pair: pair[0])
        matrix = np.stack([one.vector for _, one in ordered])
        for filter in FILTERS:
            mask = np.array([matches(filter, one) for _, one in ordered])
            query = sample(kind, 2, seed=step + 5)[1]
            for k in (1, 7, 100):
                wanted = [ordered[i][0] for i in expected(matrix, query, k, mask)]
                for store in (stores[0], stores[-1]):
                    assert [number for number, _ in store.nearest(query, k, filter)] == wanted
            assert stores[0].count(filter) == mask.sum()


def _items(store: SqliteStore) -> dict[int, str]:
    return {item.id: item.source for item in store.first(10**6)}


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize(
    "damage", ["header", "codes cut", "rows cut", "garbage", "another database", "no rights"]
)
def test_files_of_vectors_that_are_of_no_use(tmp_path: Path, damage: str) -> None:
    """They are left alone or written again, and the answers are those of the database."""
    vectors = sample("random", 60)
    store = SqliteStore(tmp_path / "a.idx")
    store.put([row(n, vectors[n]) for n in range(50)], META)
    shutil.copy(tmp_path / "a.idx", tmp_path / "early")
    store.file.close()
    shutil.copy(tmp_path / "a.idx", tmp_path / "early")
    store = SqliteStore(tmp_path / "a.idx")
    store.put([row(n, vectors[n]) for n in range(50, 60)], META)
    store.refresh()
    store.close()
    folder = tmp_path / "a.idx.vectors"
    (codes,), (rows,) = folder.glob("*.codes"), folder.glob("*.rows")
    kept = 60
    if damage == "header":
        rows.write_bytes(b"x" + rows.read_bytes()[1:])
    elif damage == "codes cut":
        codes.write_bytes(codes.read_bytes()[:100])
    elif damage == "rows cut":
        rows.write_bytes(rows.read_bytes()[:100])
    elif damage == "garbage":
        rows.write_bytes(rows.read_bytes()[:64] + bytes(rows.stat().st_size - 64))
    elif damage == "another database":  # an older copy, after which others are added
        shutil.copy(tmp_path / "early", tmp_path / "a.idx")
        other = SqliteStore(tmp_path / "a.idx")
        vectors[50:] = sample("random", 10, seed=9)
        other.put([row(n, vectors[n]) for n in range(50, 60)], META)
    else:
        folder.chmod(0)
    store = SqliteStore(tmp_path / "a.idx")
    for query in vectors[[0, 55]]:
        wanted = expected(vectors, query, 10, np.ones(kept, bool))
        assert [number - 1 for number, _ in store.nearest(query, 10)] == wanted
    store.refresh()
    folder.chmod(0o755)


def test_a_million_items_of_one_image_in_small(tmp_path: Path) -> None:
    """Ties of very many rows are broken by the order in which they were added."""
    store = SqliteStore(tmp_path / "a.idx")
    vector = sample("random", 2)
    store.put([row(n, vector[int(n == 1500)]) for n in range(3000)], META)
    assert len(store.vectors_of([row(0, vector[0]).content])) == 1
    assert [number for number, _ in store.nearest(vector[0], 5)] == [1, 2, 3, 4, 5]
    assert [number for number, _ in store.nearest(vector[1], 3)] == [1501, 1, 2]
