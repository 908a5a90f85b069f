"""Adding folders to the index from the web page, one at a time, with their progress.

Only folders that the server was started with (`allow_folders`) and those inside them are read.
Links that lead out of them are left out.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visavis.errors import InputError, StoreError
from visavis.index import AddReport, Index
from visavis.processing.media import scan_media
from visavis.serve.errors import ApiError, as_api_error

if TYPE_CHECKING:
    from visavis.serve.service import Service

CHUNK = 16  # files between two updates of the progress
MAX_LISTED = 100  # failures, and folders of a folder, that a client is told
OUTSIDE = "a link that leads out of the allowed folder"


@dataclass
class Progress:
    """How far an addition is; numbers of files for `done` and `total`, of items for the others.

    Attributes:
        failed: (name, reason) of the first files that cannot be read.
        left_out: (suffix, reason) → number of files that were not tried.
        error: why it ended early; empty: it did not.
    """

    folder: str = ""
    running: bool = False
    stopped: bool = False
    total: int = 0
    done: int = 0
    added: int = 0
    changed: int = 0
    unchanged: int = 0
    num_failed: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    left_out: Counter[tuple[str, str]] = field(default_factory=Counter)
    error: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return it for clients."""
        left_out = [(*key, number) for key, number in self.left_out.most_common(MAX_LISTED)]
        return {**vars(self), "left_out": left_out}


class FolderAdding:
    """Adds allowed folders to an index, in a thread beside the event loop.

    Args:
        folders: what may be added, as the configuration names them.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = [folder.expanduser().resolve() for folder in folders]
        self.progress = Progress()
        self._stopping = threading.Event()
        self._task: asyncio.Task[None] | None = None

    def resolve(self, number: int, inside: str) -> Path:
        """Return a folder in an allowed folder.

        Raises:
            ApiError: it lies outside of it, or the number is none of the list (403).
            InputError: it is no folder.
        """
        if not 0 <= number < len(self.folders):
            raise ApiError(403, "this server adds no such folder; start it with --allow-folder DIR")
        root = self.folders[number]
        try:
            found = (root / inside).resolve()
            is_folder = found.is_dir()
        except (OSError, ValueError):  # too long, a null character, no rights
            raise InputError(f"{inside[:100]!r} cannot be opened") from None
        if not found.is_relative_to(root):
            raise ApiError(403, f"{inside[:100]!r} lies outside of the allowed folder {root.name}")
        if not is_folder:
            raise InputError(f"there is no folder {inside[:100]!r} in {root.name}")
        return found

    def inside(self, number: int, inside: str) -> list[str]:
        """Return the folders in a folder, relative to the allowed one, hidden ones left out."""
        folder, root = self.resolve(number, inside), self.folders[number]
        try:
            with os.scandir(folder) as entries:
                names = [
                    entry.name
                    for entry in entries
                    if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)
                ]
        except OSError as error:
            raise InputError(f"{inside[:100]!r} cannot be read ({error.strerror})") from None
        return [str((folder / name).relative_to(root)) for name in sorted(names)[:MAX_LISTED]]

    def start(self, service: Service, number: int, inside: str) -> None:
        """Begin to add a folder.

        Raises:
            ApiError: another one is being added (409), or it is not allowed (403).
            InputError: it is no folder.
        """
        folder = self.resolve(number, inside)
        if self.progress.running:
            raise ApiError(409, "a folder is being added; wait for it, or stop it")
        name = str(folder.relative_to(self.folders[number].parent))
        self.progress = Progress(name, running=True)
        self._stopping.clear()
        self._task = asyncio.create_task(self._run(service, folder, self.folders[number]))

    def stop(self) -> None:
        """End the addition after the files in hand; those added stay."""
        self._stopping.set()

    async def _run(self, service: Service, folder: Path, root: Path) -> None:
        progress = self.progress
        try:
            async with service.pool.using(None) as served:
                index = service.indexes.open(None, served)
                await asyncio.to_thread(self._add, index, folder, root)
        except Exception as error:
            progress.error = as_api_error(error).message
        finally:
            progress.running = False

    def _add(self, index: Index, folder: Path, root: Path) -> None:
        progress = self.progress
        scan = scan_media(folder, with_others=True)
        progress.left_out += scan.left_out
        self._note(root, [(str(path), reason) for path, reason in scan.unreadable])
        files = []
        for path in scan.files:
            if path.resolve().is_relative_to(root):
                files.append(path)
            else:
                progress.left_out[path.suffix, OUTSIDE] += 1
        progress.total = len(files)
        for start in range(0, len(files), CHUNK):
            if self._stopping.is_set():
                progress.stopped = True
                return
            chunk = files[start : start + CHUNK]
            report = _added(index, chunk)
            progress.added += report.added
            progress.changed += report.changed
            progress.unchanged += report.unchanged
            progress.left_out += report.left_out
            self._note(root, report.failed)
            progress.done += len(chunk)

    def _note(self, root: Path, failed: Sequence[tuple[str, str]]) -> None:
        progress = self.progress
        progress.num_failed += len(failed)
        for source, reason in failed[: MAX_LISTED - len(progress.failed)]:
            progress.failed.append((os.path.relpath(source, root), reason))


def _added(index: Index, files: Sequence[Path]) -> AddReport:
    try:
        return index.add(files, segments=True)
    except StoreError:
        raise
    except InputError as error:  # not one of them could be used
        return AddReport(failed=[(str(path), str(error)) for path in files])
