"""Atomic file writes, name lookup with suggestions, progress bars and previews."""

from __future__ import annotations

import ctypes
import difflib
import errno
import importlib
import io
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from visavis.errors import UnknownNameError

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage
    from rich.progress import Progress

# Without it (Windows) folders that killed processes leave are not removed.
fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None

_AT_FDCWD, _EXCHANGE = -100, 2  # from fcntl.h and linux/fs.h


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`, removed in the end.

    It is locked while in use: those that killed processes have left are removed here.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    names = (path.with_name(f".{path.name}.tmp{number}") for number in itertools.count())
    folder, lock = next((name, lock) for name in names if (lock := _lock(name)) is not None)
    try:
        for child in folder.iterdir():
            _remove(child)
        for later in itertools.takewhile(os.path.isdir, names):
            remove_unfinished(later)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def remove_unfinished(folder: Path) -> None:
    """Remove a temporary folder that a killed process has left; one in use stays."""
    lock = _lock(folder)
    if lock is not None:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _lock(folder: Path) -> int | None:
    """Make a folder if it is not there and lock it; return its descriptor, or None if a running
    process has it."""
    while True:
        try:
            folder.mkdir(mode=0o700)
            is_new = True
        except FileExistsError:
            is_new = False
        try:
            if fcntl is None:
                return os.open(os.devnull, os.O_RDONLY) if is_new else None
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # it was removed meanwhile
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # In use; or the file system has no locks: then nobody can tell whether another is.
            if isinstance(error, BlockingIOError) or not is_new:
                os.close(handle)
                return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(folder)):
                return handle
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file; on success sync it and rename it to `path`.

    On any error, Ctrl-C included, the temporary file is removed and `path` is as it was.
    """
    with temporary_folder(path) as folder:
        temporary = folder / path.name
        temporary.touch()
        yield temporary
        _sync(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)


@contextmanager
def write_folder_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary folder; on success sync its files and put it at `path`, where it replaces
    what is there in one step (in two where the system cannot exchange folders).

    On any error, Ctrl-C included, the temporary folder is removed and `path` is as it was.
    """
    with temporary_folder(path) as folder:
        temporary = folder / path.name
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        temporary.chmod(0o755)
        if not os.path.lexists(path):
            temporary.replace(path)
        elif not _exchange(temporary, path):
            before = folder / f"{path.name}.before"
            path.replace(before)
            try:
                temporary.replace(path)
            except BaseException:
                before.replace(path)
                raise


def _sync(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; return False where the system cannot do that.

    See renameat2(2), flag RENAME_EXCHANGE: Linux 3.15 or newer, glibc 2.28 or newer.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if fcntl else None
    if renameat2 is None:
        return False
    if not renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE):
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(other))


Value = TypeVar("Value")


def suggest(name: str, known: Iterable[str]) -> str:
    """Return "did you mean …; known: …" for a name that is not in `known`."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return f"{hint}Known names: {', '.join(names)}."


def lookup(kind: str, name: str, table: Mapping[str, Value]) -> Value:
    """Return `table[name]`.

    Raises:
        UnknownNameError: `name` is not in the table; the message lists the nearest names.
    """
    if name not in table:
        raise UnknownNameError(f"unknown {kind} {name!r}: {suggest(name, table)}")
    return table[name]


Item = TypeVar("Item")


def track(
    items: Iterable[Item], description: str, *, weights: Sequence[int], show: bool
) -> Iterator[Item]:
    """Yield `items`, moving a bar by each item's weight; no bar when `show` is off."""
    if not show:
        yield from items
        return
    with progress_bars(show=True) as bar:
        task = bar.add_task(description, total=sum(weights))
        for item, weight in zip(items, weights, strict=True):
            yield item
            bar.advance(task, weight)


def progress_bars(*fields: str, show: bool) -> Progress:
    """Return progress bars on stderr: description, count, remaining time, then fields of the task.

    Args:
        fields: names of task fields whose text is shown too.
        show: draw them; else nothing is written.
    """
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        *(progress.TextColumn(f"{{task.fields[{name}]}}") for name in fields),
        console=Console(stderr=True),
        disable=not show,
    )


def jpeg_preview(image: PILImage, size: int) -> bytes:
    """Return a JPEG of an image, at most `size` pixels a side."""
    small = image.convert("RGB")
    small.thumbnail((size, size))
    encoded = io.BytesIO()
    small.save(encoded, "JPEG", quality=85)
    return encoded.getvalue()


def check_regular(path: Path) -> None:
    """Refuse a device, pipe or socket: reading one may block for ever.

    Raises:
        OSError: it is one.
    """
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise OSError(errno.EINVAL, "a device, pipe or socket, not a file", str(path))


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON document.

    Raises:
        ValueError: it is not JSON, or nested more deeply than can be read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML document, of plain types.

    Raises:
        ValueError: it is not YAML, has a value that cannot be (a 99th month), or is nested more
            deeply than can be read.
    """
    import yaml

    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split())) from None


def type_name(value: Any) -> str:
    """Return the type of a value as messages name it."""
    kind = type(value)
    if kind.__module__ == "builtins":
        return f"of type {kind.__qualname__}" if value is not None else "None"
    return f"of type {kind.__module__}.{kind.__qualname__}"


def shortened(text: str) -> str:
    """Return a text of at most 80 characters."""
    return text if len(text) <= 80 else text[:77] + "…"
