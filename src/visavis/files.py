"""Writing files so that a reader never sees half of one. Knows nothing of what is in them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
