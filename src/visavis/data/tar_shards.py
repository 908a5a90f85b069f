"""Tar files of images and their fields, as WebDataset writes them: key.jpg beside key.json.

Bytes are read from the tar when they are needed.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from visavis.errors import TrainError
from visavis.inputs import Stored
from visavis.utils import parse_json


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


IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp"})


def read_shards(paths: Sequence[Path]) -> Iterator[tuple[str, dict[str, Any], Stored]]:
    """Yield (key, fields, image) of every record, in the order of the shards.

    Raises:
        TrainError: a shard cannot be read, or an image and its fields do not come in pairs.
    """
    for path in paths:
        waiting: dict[str, dict[str, Stored]] = {}
        for name, file in members(path):
            key, _, suffix = name.rpartition(".")
            if suffix != "json" and suffix not in IMAGE_SUFFIXES:
                continue
            kind = "json" if suffix == "json" else "image"
            parts = waiting.setdefault(key, {})
            parts[kind] = file
            if len(parts) == 2:
                try:
                    fields = parse_json(parts["json"].read())
                except ValueError as error:
                    raise TrainError(
                        f"cannot read {path}: {key}.json is not JSON ({error}); the copy is "
                        "probably incomplete, copy it again."
                    ) from error
                yield key, fields, parts["image"]
                del waiting[key]
        if waiting:
            raise TrainError(
                f"{path}: {len(waiting)} records lack their picture or their fields, the first is "
                f"{next(iter(waiting))!r}; the tar is incomplete, copy it again."
            )
