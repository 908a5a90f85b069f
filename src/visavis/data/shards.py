"""Members of tar shards: where each lies, read when needed. Nothing is unpacked.

WebDataset's convention: what belongs together has one name up to the suffix. Knows no data set.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from visavis.errors import TrainError
from visavis.prompt import Stored


def members(path: Path) -> Iterator[tuple[str, Stored]]:
    """Yield name and bytes-to-be of every file in a tar, in its order.

    Raises:
        TrainError: it cannot be read, or is compressed.
    """
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                if member.isreg():
                    read = partial(read_span, path, member.offset_data, member.size)
                    yield member.name, Stored(f"{path}: {member.name}", read)
    except (OSError, tarfile.TarError) as error:
        raise TrainError(
            f"cannot read {path}: {error}. Expected a tar that is not compressed, of key.jpg and "
            "key.json pairs; the copy is probably incomplete, copy it again."
        ) from error


def read_span(path: Path, start: int, size: int) -> bytes:
    """Return a piece of a file.

    Raises:
        TrainError: the file is gone, or shorter than it was.
    """
    try:
        with path.open("rb") as file:
            file.seek(start)
            content = file.read(size)
    except OSError as error:
        raise TrainError(f"cannot read {path}: {error}; was it moved while in use?") from error
    if len(content) != size:
        raise TrainError(
            f"{path} ends after {start + len(content)} bytes, expected at least {start + size}: it "
            "was changed or cut while in use; copy it again."
        )
    return content
