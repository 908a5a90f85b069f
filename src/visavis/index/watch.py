"""Following folders: what is added, changed, moved or deleted in them is so in the index.

    watchfiles ──► changes, gathered until a burst is over ──► add what is there ──► remove what
                                                               is gone (moved files cost nothing:
                                                               their content is known)

A folder that cannot be reached, such as a network drive that is gone, is waited for, and its items
stay. Changes can be missed where the system drops them, so that everything is scanned again from
time to time.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visavis.errors import InputError
from visavis.index.filters import is_below
from visavis.inputs import DOCUMENT_SUFFIXES, VIDEO_SUFFIXES
from visavis.processing.media import SUFFIXES

if TYPE_CHECKING:
    from visavis.index.search import Index

GATHERED_MS = 1600  # changes are gathered until none comes for a step, this long at most
RESCAN_SECONDS = 3600.0
WAIT_SECONDS = 10.0  # until a folder that cannot be reached is tried again


@dataclass
class WatchReport:
    """Changes of one round: numbers of items, and (source, reason) of each failure."""

    added: int = 0
    changed: int = 0
    removed: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether there was nothing to do."""
        return not (self.added or self.changed or self.removed or self.failed)


def watch(
    index: Index,
    folders: Sequence[Path],
    *,
    stop: threading.Event | None = None,
    rescan_s: float = RESCAN_SECONDS,
    wait_s: float = WAIT_SECONDS,
    **options: Any,
) -> Iterator[WatchReport]:
    """Add folders, then yield a report of each round of changes, until `stop` is set.

    Args:
        rescan_s: seconds after which everything is scanned again.
        wait_s: seconds until folders that cannot be reached are tried again.
        options: see `Index.add`.

    Raises:
        InputError: watchfiles is not installed.
        StoreError: the index cannot be written.
    """
    try:
        import watchfiles
    except ImportError:
        raise InputError(
            "following folders needs watchfiles: pip install 'visavis[watch]'"
        ) from None
    roots = [Path(os.path.abspath(folder.expanduser())) for folder in folders]
    stop = stop or threading.Event()
    while not stop.is_set():
        reachable = _reachable(roots)
        yield scan(index, roots, **options)
        if not reachable:
            stop.wait(wait_s)
            continue
        changes = watchfiles.watch(
            *reachable,
            watch_filter=None,
            debounce=GATHERED_MS,
            stop_event=stop,
            raise_interrupt=True,
            yield_on_timeout=True,
            rust_timeout=int(min(wait_s, rescan_s) * 1000),
            ignore_permission_denied=True,
        )
        until = time.monotonic() + rescan_s
        for report in _rounds(index, roots, reachable, changes, until, options):
            if not report.is_empty:
                yield report


def _rounds(
    index: Index,
    roots: Sequence[Path],
    reachable: Sequence[Path],
    changes: Iterator[set[tuple[Any, str]]],
    until: float,
    options: dict[str, Any],
) -> Iterator[WatchReport]:
    """Yield a report of each burst of changes until everything is to be scanned again: after some
    time, or when a folder has become reachable or has gone."""
    is_first = True
    new_folders: set[Path] = set()
    try:
        for burst in changes:
            paths = {Path(path) for _, path in burst}
            if is_first:  # what changed between the scan and the begin of the notifications
                yield scan(index, roots, **options)
            elif paths or new_folders:
                yield apply(index, roots, sorted(paths | new_folders), **options)
            # What came into a new folder before the system reported on it is found a step later.
            new_folders = {path for path in paths if path.is_dir()}
            is_first = False
            if time.monotonic() > until or _reachable(roots) != reachable:
                return
    except OSError:  # a folder disappeared: it is waited for
        return


def _reachable(roots: Sequence[Path]) -> list[Path]:
    return [root for root in roots if is_reachable(root)]


def is_reachable(root: Path) -> bool:
    """Return whether a folder can be listed and is not the empty place of a drive that is gone."""
    try:
        with os.scandir(root) as entries:
            return next(entries, None) is not None
    except OSError:
        return False


def scan(index: Index, roots: Sequence[Path], **options: Any) -> WatchReport:
    """Add everything below the folders, and forget what is gone from those that are reachable."""
    reachable = _reachable(roots)
    report = WatchReport()
    _add(index, reachable, report, options)
    _remove(index, roots, _gone_below(index, reachable), report)
    return report


def apply(
    index: Index, roots: Sequence[Path], paths: Sequence[Path], **options: Any
) -> WatchReport:
    """Bring the index up to date with what is at some paths now.

    Args:
        roots: the folders that are followed; what is gone from one that cannot be reached stays.
        paths: files and folders that may have changed.
    """
    report = WatchReport()
    paths = list(dict.fromkeys(paths))
    there = [path for path in paths if os.path.exists(path) and _is_wanted(path, roots)]
    _add(index, there, report, options)
    missing = [path for path in paths if not os.path.exists(path)]
    if missing and index.store.exists():
        gone = [source for path in missing for source in index.store.sources_of(str(path))]
        known = {folder for _, folder in index.store.folders()}
        folders = [
            path
            for path in missing
            if any(one == str(path) or is_below(one, str(path)) for one in known)
        ]
        _remove(index, roots, [*gone, *_gone_below(index, folders)], report)
    return report


def _add(index: Index, paths: Sequence[Path], report: WatchReport, options: dict[str, Any]) -> None:
    if not paths:
        return
    try:
        found = index.add(paths, **options)
    except InputError as error:  # nothing of it could be used
        report.failed += [(str(path), str(error)) for path in paths if not path.is_dir()]
        return
    report.added, report.changed = found.added, found.changed
    report.removed, report.failed = found.removed, list(found.failed)


def _gone_below(index: Index, folders: Sequence[Path]) -> list[str]:
    """Return the sources of items below folders whose files are no longer there."""
    if not folders or not index.store.exists():
        return []
    return [
        source
        for source, path in index.store.file_items()
        if any(is_below(path, str(folder)) for folder in folders) and not os.path.isfile(path)
    ]


def _remove(
    index: Index, roots: Sequence[Path], sources: Sequence[str], report: WatchReport
) -> None:
    """Forget items, except of folders that became unreachable meanwhile."""
    sure = list(map(str, _reachable(roots)))
    gone = [one for one in dict.fromkeys(sources) if any(is_below(one, root) for root in sure)]
    if gone:
        index.store.remove(gone)
        report.removed += len(gone)


def _is_wanted(path: Path, roots: Sequence[Path]) -> bool:
    """Return whether a scan of the folders would find a path."""
    for root in roots:
        if is_below(str(path), str(root)):
            parts = path.relative_to(root).parts
            if any(part.startswith(".") for part in parts):
                return False
    if path.is_dir():
        return not path.is_symlink()
    return path.suffix.lower() in SUFFIXES | VIDEO_SUFFIXES | DOCUMENT_SUFFIXES
