"""One record: a picture with what people wrote about it; and the reader of tar shards.

Shards are WebDataset-style: `key.jpg` (or .png) and `key.json` side by side. Knows no data set by
name (see `sources.py`) and decodes no picture.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visavis.errors import TrainError

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp"})


@dataclass(frozen=True)
class Record:
    """A picture and its texts.

    Args:
        key: unique within its source; named in error messages.
        image: the file's bytes.
        caption: what the picture shows, the text to generate and to retrieve by; may be empty.
        also: other texts that describe it as well (a title, keywords): extra positives.
        questions: (question, answer) pairs, each answerable from the picture alone.
        label: class name, for zero-shot evaluation; `group` is its coarser class.
        captions: every reference caption, where there are several.
    """

    key: str
    image: bytes
    caption: str = ""
    also: tuple[str, ...] = ()
    questions: tuple[tuple[str, str], ...] = ()
    label: str = ""
    group: str = ""
    captions: tuple[str, ...] = ()


def read_shards(paths: Sequence[Path]) -> Iterator[tuple[str, dict[str, Any], bytes]]:
    """Yield (key, fields, image bytes) of every record, in the order of the shards.

    Raises:
        TrainError: a shard cannot be read, or a picture and its fields do not come in pairs.
    """
    for path in paths:
        waiting: dict[str, dict[str, bytes]] = {}
        try:
            with tarfile.open(path) as shard:
                for member in shard:
                    key, _, suffix = member.name.rpartition(".")
                    file = shard.extractfile(member)
                    if file is None or (suffix != "json" and suffix not in IMAGE_SUFFIXES):
                        continue
                    kind = "json" if suffix == "json" else "image"
                    parts = waiting.setdefault(key, {})
                    parts[kind] = file.read()
                    if len(parts) == 2:
                        yield key, json.loads(parts["json"]), parts["image"]
                        del waiting[key]
        except (OSError, tarfile.TarError, json.JSONDecodeError) as error:
            raise TrainError(
                f"cannot read {path}: {error}. Expected a tar of key.jpg and key.json pairs; "
                "the copy is probably incomplete, copy it again."
            ) from error
        if waiting:
            raise TrainError(
                f"{path}: {len(waiting)} records lack their picture or their fields, the first is "
                f"{next(iter(waiting))!r}; the tar is incomplete, copy it again."
            )
