"""An on-disk store of one model's embeddings, keyed by content.

    <folder>/vectors.f32    rows [D] float32, one after another, appended
    <folder>/keys           the key of each row, a line each, written after the row is on disk

A killed run loses at most its current batch: opening truncates incomplete rows. One process writes
a folder at a time.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from visavis.errors import StoreError
from visavis.utils import write_atomically


class EmbeddingStore:
    """Rows by key; they are never changed, only added. Use it as a context.

    Args:
        folder: of one model; another model's vectors belong into another folder.
        dim: numbers of each vector.

    Raises:
        StoreError: another process has it open, or it cannot be read or written.
    """

    def __init__(self, folder: Path, dim: int) -> None:
        self.folder, self.dim = folder, dim
        self.data_path, self.keys_path = folder / "vectors.f32", folder / "keys"
        self.lock = FileLock(folder / "lock")
        self.rows: dict[str, int] = {}

    def __enter__(self) -> EmbeddingStore:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock.acquire(timeout=0)
            self._recover()
        except Timeout:
            raise StoreError(
                f"another process is using the vectors in {self.folder}; wait until it is done, "
                "or keep these elsewhere."
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise self._unusable(error) from error
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.release()

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, keys: Sequence[str], vectors: np.ndarray) -> None:
        """Append rows [N, D]; they are on disk when this returns.

        Raises:
            StoreError: the disk is full, or the files may not be written.
        """
        assert vectors.shape == (len(keys), self.dim)
        try:
            _append(self.data_path, np.ascontiguousarray(vectors, "<f4").tobytes())
            _append(self.keys_path, "".join(f"{key}\n" for key in keys).encode())
        except OSError as error:
            raise self._unusable(error) from error
        first = self.num_rows
        self.rows.update((key, first + i) for i, key in enumerate(keys))
        self.num_rows += len(keys)

    def numbers(self, keys: Sequence[str]) -> np.ndarray:
        """Return the row of each key, int64 [N]; all of them must be there."""
        return np.array([self.rows[key] for key in keys], np.int64)

    def matrix(self) -> np.ndarray:
        """Return all rows [N, D], float32, read from disk where they are touched."""
        if not self.num_rows:
            return np.zeros((0, self.dim), np.float32)
        return np.memmap(self.data_path, "<f4", "r", shape=(self.num_rows, self.dim))

    def _recover(self) -> None:
        """Read the keys; truncate rows that a crash left incomplete in either file."""
        for path in (self.data_path, self.keys_path):
            path.touch()
        text = self.keys_path.read_text(encoding="utf-8")
        keys = text.split("\n")[:-1]  # without the last one if it is cut off
        row_bytes = 4 * self.dim
        self.num_rows = min(len(keys), self.data_path.stat().st_size // row_bytes)
        os.truncate(self.data_path, self.num_rows * row_bytes)
        whole = "".join(f"{key}\n" for key in keys[: self.num_rows])
        if whole != text:
            with write_atomically(self.keys_path) as temporary:
                temporary.write_text(whole, encoding="utf-8")
        self.rows = {key: number for number, key in enumerate(keys[: self.num_rows])}

    def _unusable(self, error: Exception) -> StoreError:
        reason = getattr(error, "strerror", None) or error
        return StoreError(
            f"cannot use the vectors in {self.folder} ({reason}); check that there is room on the "
            "disk and that the folder may be written to. What is finished is kept: run the same "
            "command again."
        )


def _append(path: Path, content: bytes) -> None:
    with path.open("ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
