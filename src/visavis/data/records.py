"""One record: a picture with what people wrote about it; and the reader of tar shards.

Shards are WebDataset-style: `key.jpg` (or .png) and `key.json` side by side. Knows no data set by
name (see `sources.py`) and decodes no picture.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visavis.data.shards import members
from visavis.errors import TrainError
from visavis.prompt import Stored

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp"})


@dataclass(frozen=True)
class Record:
    """A picture and its texts.

    Args:
        key: unique within its source; named in error messages.
        image: the file's bytes, or where they are; empty where there is no picture.
        caption: what the picture shows, the text to generate and to retrieve by; may be empty.
        also: other texts that describe it as well (a title, keywords): extra positives.
        questions: (question, answer) pairs, each answerable from the picture alone.
        label: class name, for zero-shot evaluation; `group` is its coarser class.
        captions: every reference caption, where there are several.
    """

    key: str
    image: bytes | Stored
    caption: str = ""
    also: tuple[str, ...] = ()
    questions: tuple[tuple[str, str], ...] = ()
    label: str = ""
    group: str = ""
    captions: tuple[str, ...] = ()


def read_shards(paths: Sequence[Path]) -> Iterator[tuple[str, dict[str, Any], Stored]]:
    """Yield (key, fields, picture) of every record, in the order of the shards.

    Raises:
        TrainError: a shard cannot be read, or a picture and its fields do not come in pairs.
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
                    fields = json.loads(parts["json"].read())
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
