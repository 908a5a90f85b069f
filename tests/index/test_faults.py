"""kill -9 at random points of add, migrate and watch; several writers; readers while writing."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.index.kills import PixelModel, write
from visavis import Index
from visavis.errors import StoreError
from visavis.index.sqlite_store import SqliteStore
from visavis.index.store import IndexRow, cosines

KILLS = Path(__file__).parent / "kills.py"


def run_until_killed(root: Path, task: str, seed: int, seconds: float) -> list[str]:
    """Run the program for a time after it has begun, kill it, and return what it has said."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
    }
    child = subprocess.Popen(
        [sys.executable, KILLS, root, task, str(seed)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert child.stdout is not None and child.stderr is not None
    said = [child.stdout.readline().strip()]
    time.sleep(seconds)
    child.send_signal(signal.SIGKILL)
    child.wait()
    *rest, _ = child.stdout.read().split("\n")
    errors = child.stderr.read()
    child.stdout.close()
    child.stderr.close()
    assert child.returncode == -signal.SIGKILL, errors
    return [line for line in [*said, *rest] if line]


def assert_sound(root: Path, said: list[str]) -> None:
    """Everything acknowledged is there, and answers are those of a comparison with all vectors."""
    store = SqliteStore(root / "a.idx")
    models = [line.split()[1] for line in said if line.startswith("model")]
    model: Any = PixelModel(store.meta()["model"] == "other")
    assert not models or models[-1] == model.name or models[-1] != store.meta()["model"]
    store.close()
    with Index(root / "a.idx", model) as index:
        items = {item.source: item for item in index.items(1000)}
        for line in said:
            if line.startswith("has") and os.path.exists(line[4:]):  # `watch` deletes some later
                assert line[4:] in items
        ids = sorted(item.id for item in items.values())
        vectors = np.stack([index.store.vectors([number])[number] for number in ids])
        for query in vectors[:3]:
            scores = cosines(vectors, query)
            best = np.lexsort((ids, -scores))[:10]
            assert index.store.nearest(query, 10) == [(ids[i], float(scores[i])) for i in best]
        unchanged = [s for s in list(items)[:5] if os.path.exists(s)]
        for source in unchanged:  # vectors are those of the model that the index names
            if index.add(source).unchanged:
                vector = index.store.vectors([items[source].id])[items[source].id]
                np.testing.assert_allclose(vector, model.embed([Path(source)])[0], atol=1e-6)
        check = index.store.file.all("PRAGMA integrity_check")  # type: ignore[attr-defined]
        assert check == [("ok",)]


def kill_many(root: Path, task: str, number: int) -> None:
    (root / "images").mkdir()
    random = np.random.default_rng(number)
    write(root / "images", random)
    with Index(root / "a.idx", PixelModel()) as index:  # type: ignore[arg-type]
        index.add(root / "images")
    said: list[str] = []
    for seed in range(number):
        said += run_until_killed(root, task, seed, float(random.uniform(0, 0.4)))
        assert_sound(root, said)


@pytest.mark.parametrize("task", ["add", "migrate", "watch"])
def test_killed_at_random_points(tmp_path: Path, task: str) -> None:
    kill_many(tmp_path, task, 2)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["add", "migrate", "watch"])
def test_killed_at_very_many_random_points(tmp_path: Path, task: str) -> None:
    kill_many(tmp_path, task, 67)


def row(number: int) -> IndexRow:
    vector = np.random.default_rng(number).normal(size=8).astype(np.float32)
    return IndexRow(f"{number}", f"c{number}", vector / np.linalg.norm(vector))


META = {"model": "m", "fingerprint": "f", "dim": "8"}


def test_two_writers_and_a_reader_at_the_same_time(tmp_path: Path) -> None:
    """Every answer of the reader is that of some state between the writers' batches."""
    path = tmp_path / "a.idx"
    SqliteStore(path).put([row(0)], META)
    errors: list[BaseException] = []

    def writer(first: int) -> None:
        try:
            store = SqliteStore(path)
            for number in range(first, first + 200, 10):
                store.put([row(n) for n in range(number, number + 10)], META)
                store.remove([str(number)])
            store.close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=writer, args=(first,)) for first in (1000, 2000)]
    for thread in threads:
        thread.start()
    reader = SqliteStore(path)
    query = row(0).vector
    while any(thread.is_alive() for thread in threads):
        found = reader.nearest(query, 1000)
        assert found[0] == (1, pytest.approx(1))
        assert [s for _, s in found] == sorted((s for _, s in found), reverse=True)
    assert errors == []
    assert reader.count() == len(reader.nearest(query, 1000)) == 1 + 2 * 180


def test_a_lock_that_stays_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visavis.index.sqlite_file.BUSY_SECONDS", 0.1)
    path = tmp_path / "a.idx"
    SqliteStore(path).put([row(0)], META)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    store = SqliteStore(path)
    assert store.nearest(row(0).vector, 1) == [(1, pytest.approx(1))]
    with pytest.raises(StoreError, match=r"locked.*another process is writing"):
        store.put([row(1)], META)
    other.rollback()
    other.close()
    store.put([row(1)], META)
    assert store.count() == 2


def test_files_that_change_while_they_are_added(tmp_path: Path) -> None:
    """A file that is replaced after it was hashed has the vector of what was embedded at the next
    call."""
    folder = tmp_path / "images"
    folder.mkdir()
    paths = write(folder, np.random.default_rng(0))

    class Replacing(PixelModel):
        def embed(self, items: Any) -> np.ndarray:
            write(folder, np.random.default_rng(0))
            for path in set(paths):
                os.utime(path, ns=(1, time.time_ns()))
            return super().embed(items)

    with Index(tmp_path / "a.idx", Replacing()) as index:  # type: ignore[arg-type]
        index.add(folder)
    with Index(tmp_path / "a.idx", PixelModel()) as index:  # type: ignore[arg-type]
        report = index.add(folder)
        assert report.failed == []
        for item in index.items():
            vector = index.store.vectors([item.id])[item.id]
            expected = PixelModel().embed([Path(item.source)])[0]
            np.testing.assert_allclose(vector, expected, atol=1e-6)


@pytest.mark.slow
def test_a_million_items_of_one_image(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "a.idx")
    vector = row(0).vector
    for first in range(0, 1_000_000, 20_000):
        store.put([IndexRow(f"{n}", "same", vector) for n in range(first, first + 20_000)], META)
    assert store.nearest(vector, 5) == [(n, pytest.approx(1)) for n in range(1, 6)]
    assert store.file.all("SELECT count(*) FROM vectors") == [(1,)]
