"""A disk cache of image features that outlives the process, within a byte budget.

    <hash of key and maker>.features    16 bytes of hash, then tensors as safetensors

A file is written whole or not at all, is checked when it is read, and counts as used then; the
longest unused go first. Several processes may share a folder.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from visavis.errors import InputError
from visavis.utils import write_atomically

SUFFIX = ".features"
DIGEST = 16  # bytes


class DiskFeatureCache:
    """A bounded map from keys to tensors on disk.

    Args:
        folder: made where there is none.
        maker: identifies everything the features depend on; entries of another maker are not found.
        max_bytes: of all files; all makers share them.

    Raises:
        InputError: the folder cannot be made or read.
    """

    def __init__(self, folder: Path, maker: str, max_bytes: int = 4 * 2**30) -> None:
        self.folder, self.maker, self.max_bytes = folder, maker, max_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.num_bytes = sum(size for _, size, _ in self._files())
        except OSError as error:
            raise InputError(
                f"{str(folder)!r} cannot keep what pictures become: {error}; name another folder, "
                "or leave image_cache."
            ) from error

    def get(self, key: str) -> tuple[Tensor, ...] | None:
        """Return the tensors of a key and mark them as used; None, and no file, if they are
        damaged."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        try:
            if _digest(data[DIGEST:]) != data[:DIGEST]:
                raise SafetensorError("another hash")
            found = load(data[DIGEST:])
        except SafetensorError:
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):
            os.utime(path)
        return tuple(found[str(number)] for number in range(len(found)))

    def put(self, key: str, value: tuple[Tensor, ...]) -> None:
        """Keep tensors; remove the longest unused files that no longer fit."""
        tensors = {str(number): tensor.cpu().contiguous() for number, tensor in enumerate(value)}
        data = save(tensors)
        try:
            with write_atomically(self._path(key)) as temporary:
                temporary.write_bytes(_digest(data) + data)
            self.num_bytes += DIGEST + len(data)
            if self.num_bytes > self.max_bytes:
                self._shrink()
        except OSError as error:
            warnings.warn(
                f"what a picture became is not kept in {str(self.folder)!r}: {error}", stacklevel=2
            )

    def _shrink(self) -> None:
        """Remove files until a tenth of the budget is free, so that the next ones need not."""
        files = sorted(self._files())
        self.num_bytes = sum(size for _, size, _ in files)
        for _, size, path in files:
            if self.num_bytes <= 0.9 * self.max_bytes:
                return
            path.unlink(missing_ok=True)
            self.num_bytes -= size

    def _files(self) -> list[tuple[int, int, Path]]:
        """Return when each file was used, its bytes and its path."""
        found = []
        for path in self.folder.glob(f"*{SUFFIX}"):
            with suppress(FileNotFoundError):  # another process removed it
                about = path.stat()
                found.append((about.st_mtime_ns, about.st_size, path))
        return found

    def _path(self, key: str) -> Path:
        return self.folder / (_digest(f"{self.maker}\n{key}".encode()).hex() + SUFFIX)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST).digest()


class FeatureCache:
    """A bounded map from content hash to tensors.

    Args:
        folder: where all of it is kept too, for the next process; None: nowhere.
    """

    def __init__(
        self, max_bytes: int = 128 * 2**20, *, folder: DiskFeatureCache | None = None
    ) -> None:
        self.max_bytes, self.folder = max_bytes, folder
        self.num_bytes = 0
        self.entries: OrderedDict[str, tuple[Tensor, ...]] = OrderedDict()

    def get(self, key: str) -> tuple[Tensor, ...] | None:
        """Return the tensors of a key and mark it as used, or None."""
        if key not in self.entries:
            found = self.folder.get(key) if self.folder is not None else None
            if found is not None:
                self._remember(key, found)
            return found
        self.entries.move_to_end(key)
        return self.entries[key]

    def put(self, key: str, value: tuple[Tensor, ...]) -> None:
        """Keep tensors; drop the least recently used ones that no longer fit."""
        self._remember(key, value)
        if self.folder is not None:
            self.folder.put(key, value)

    def _remember(self, key: str, value: tuple[Tensor, ...]) -> None:
        if key in self.entries:
            self.num_bytes -= _num_bytes(self.entries.pop(key))
        self.entries[key] = value
        self.num_bytes += _num_bytes(value)
        while self.num_bytes > self.max_bytes and len(self.entries) > 1:
            _, dropped = self.entries.popitem(last=False)
            self.num_bytes -= _num_bytes(dropped)


def _num_bytes(tensors: tuple[Tensor, ...]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
