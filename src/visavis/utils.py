"""Atomic file writes, name lookup with suggestions, progress bars and previews."""

from __future__ import annotations

import difflib
import io
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from visavis.errors import UnknownNameError

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage
    from rich.progress import Progress


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success sync it and rename it into place.

    On any error, Ctrl-C included, the temporary file is removed and `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def write_folder_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success rename it into place, where it replaces
    what is there.

    On any error, Ctrl-C included, the temporary folder is removed and `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{path.name}.tmp-"))
    try:
        yield temporary
        temporary.chmod(0o755)
        if path.exists():  # a folder cannot replace one that holds something in one step
            before = Path(tempfile.mkdtemp(dir=temporary.parent, prefix=f"{path.name}.tmp-"))
            path.replace(before)
            try:
                temporary.replace(path)
            except BaseException:
                before.replace(path)
                raise
            shutil.rmtree(before)
        else:
            temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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


def type_name(value: Any) -> str:
    """Return the type of a value as messages name it."""
    kind = type(value)
    if kind.__module__ == "builtins":
        return f"of type {kind.__qualname__}" if value is not None else "None"
    return f"of type {kind.__module__}.{kind.__qualname__}"


def shortened(text: str) -> str:
    """Return a text of at most 80 characters."""
    return text if len(text) <= 80 else text[:77] + "…"
