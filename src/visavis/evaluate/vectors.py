"""Vectors of many items: embedded in shards, kept in a folder, mapped into memory.

A shard's name holds a hash of all that decides its vectors: the weights, the prompt profile, the
image processing, the number type, the device and the content of its items. A shard that is there is
not computed again, so that a run that was killed resumes; it is written whole or not at all.
Several processes compute shards in turn.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from visavis.errors import InputError, OutOfMemoryError, VisavisError
from visavis.evaluate.items import Item
from visavis.evaluate.prompts import embed_items, model_key
from visavis.utils import write_atomically

if TYPE_CHECKING:
    from visavis.api import Model

SHARD = 1024  # items
VERSION = 1  # goes up when the same items get other vectors


@dataclass
class Vectors:
    """float32 [N, D] in shards, some of them mapped from files.

    Args:
        bad: items without a usable vector, by number, each with the reason; their rows are zero.
    """

    shards: list[np.ndarray]
    dim: int
    bad: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0
    computed: int = 0

    def __len__(self) -> int:
        return sum(map(len, self.shards))

    def blocks(self, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (number of the first, rows [≤ size, D])."""
        first = 0
        for shard in self.shards:
            for start in range(0, len(shard), size):
                yield first + start, np.asarray(shard[start : start + size])
            first += len(shard)

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """Return the rows with some numbers, float32 [len(numbers), D]."""
        found = np.empty((len(numbers), self.dim), np.float32)
        ends = np.cumsum([len(shard) for shard in self.shards])
        of = np.searchsorted(ends, numbers, side="right")
        for number in np.unique(of):
            inside = of == number
            start = ends[number] - len(self.shards[number])
            found[inside] = self.shards[number][numbers[inside] - start]
        return found


@dataclass(frozen=True)
class Workers:
    """This process among those that share a run.

    Args:
        wait: returns when all of them have called it.
    """

    rank: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None


ALONE = Workers()


def embed_all(
    model: Model,
    items: Sequence[Item],
    *,
    folder: Path | None = None,
    workers: Workers = ALONE,
    progress: Callable[[int], None] = lambda done: None,
) -> Vectors:
    """Return a vector for each item, unit length, float32 [N, D].

    An item that cannot be read, or whose vector is not finite, is listed in `bad`; the others are
    embedded.

    Args:
        folder: keeps the shards; None: they stay in memory.
        workers: with more than one process, `folder` is needed.
    """
    started = time.perf_counter()
    key = f"{VERSION} {model_key(model)}"
    shards: list[np.ndarray] = []
    found = Vectors(shards, model.embedding_dim)
    names: list[tuple[int, Path | None]] = []
    for number, first in enumerate(range(0, len(items), SHARD)):
        chunk = items[first : first + SHARD]
        path = None
        if folder is not None:
            digest = hashlib.blake2b(key.encode(), digest_size=12)
            for item in chunk:
                digest.update(item.key().encode())
            path = folder / f"{number:05d}-{digest.hexdigest()}.npy"
        names.append((first, path))
    for number, (first, path) in enumerate(names):
        chunk = items[first : first + SHARD]
        if path is None or (number % workers.count == workers.rank and not path.is_file()):
            rows, bad = _embed(model, chunk)
            found.computed += len(chunk)
            found.bad |= {first + i: reason for i, reason in bad.items()}
            if path is not None:
                _write(path, rows, bad)
            else:
                shards.append(rows)
        progress(len(chunk))
    if folder is not None:
        workers.wait()
        found.bad = {}
        for first, path in names:
            assert path is not None
            rows, bad = _read(path)
            shards.append(rows)
            found.bad |= {first + i: reason for i, reason in bad.items()}
    found.seconds = time.perf_counter() - started
    return found


def _embed(model: Model, items: Sequence[Item]) -> tuple[np.ndarray, dict[int, str]]:
    bad: dict[int, str] = {}
    rows = np.zeros((len(items), model.embedding_dim), np.float32)

    def fill(numbers: Sequence[int]) -> None:
        """Embed some items; where that fails, halves of them, down to the one that fails."""
        try:
            rows[numbers] = embed_items(model, [items[i] for i in numbers])
        except OutOfMemoryError:
            raise
        except VisavisError as error:
            if len(numbers) == 1:
                bad[numbers[0]] = str(error)
                return
            half = len(numbers) // 2
            fill(numbers[:half])
            fill(numbers[half:])

    if items:
        fill(range(len(items)))
    for i in np.flatnonzero(~np.isfinite(rows).all(1)):
        bad[int(i)] = (
            "its vector holds a number that is not finite; the model overflows in this precision, "
            "load it with precision='f32'"
        )
        rows[i] = 0
    return rows, bad


def _write(path: Path, rows: np.ndarray, bad: dict[int, str]) -> None:
    """Write a shard, and beside it the reasons of items without a usable vector."""
    try:
        if bad:
            with write_atomically(path.with_suffix(".bad.json")) as temporary:
                temporary.write_text(json.dumps(bad))
        else:
            path.with_suffix(".bad.json").unlink(missing_ok=True)
        with write_atomically(path) as temporary, temporary.open("wb") as file:
            np.save(file, rows)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}; give another --output") from error


def _read(path: Path) -> tuple[np.ndarray, dict[int, str]]:
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
        beside = path.with_suffix(".bad.json")
        bad = json.loads(beside.read_text()) if beside.is_file() else {}
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}; delete it and run again") from error
    return rows, {int(number): reason for number, reason in bad.items()}
