"""Image and video paths, required fields and options shared by all data formats.

Raises `InputError` without naming the record; `data.sources.Source` adds the record's id.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from visavis.data.readers import Row
from visavis.errors import InputError
from visavis.inputs import Image, Part, Stored, Text, Video

_SCHEME = re.compile(r"^(data:|[A-Za-z][A-Za-z0-9+.-]+://)")
_ITEM_KEYS = ("text", "image", "video")


class Options(BaseModel):
    """Options of a data format; unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Place:
    """Where a source's files lie.

    Args:
        root: the folder of data sets.
        folder: paths of images start here.
        within: and stay below this; None: below `folder`.
    """

    root: Path
    folder: Path
    within: Path | None = None

    def image(self, value: Any) -> Image:
        """Return an image of a row: a path, or bytes that lie in the data file."""
        if isinstance(value, (Stored, bytes)):
            return Image(value)
        return Image(self.file(value, "picture"))

    def video(self, value: Any, frames: int | None = None) -> Video:
        """Return a video of a row: a path of a file or a folder of frames, a list of paths of
        frames, or bytes that lie in the data file."""
        if isinstance(value, (list, tuple)):
            return Video(tuple(map(self.image, value)), frames)
        if isinstance(value, Stored):
            value = value.read()
        return Video(value if isinstance(value, bytes) else self.file(value, "video"), frames)

    def file(self, value: Any, what: str) -> Path:
        """Return the whole path of a row's file.

        Raises:
            InputError: it is no path below the folder.
        """
        expected = f"a path of a {what} below {self.folder}"
        if not isinstance(value, str) or not value.strip() or "\0" in value:
            raise InputError(f"its {what} is {value!r}, expected {expected}")
        if _SCHEME.match(value):
            raise InputError(
                f"its {what} is {value[:60]!r}, expected {expected}; nothing is downloaded while "
                "training: download it first"
            )
        within = self.within or self.folder
        path = Path(os.path.normpath(os.path.join(self.folder, value)))
        if not path.is_relative_to(os.path.normpath(within)):
            raise InputError(
                f"its {what} {value!r} lies outside of {within}; give the folder that all "
                "paths start at as `images`"
            )
        return path

    def item(self, value: Any) -> tuple[Part, ...]:
        """Return the parts of an item {text, image, video}, in the order of its keys;
        a list of images is several, a list given as a video is its frames."""
        if isinstance(value, str):
            return (Text(value),)
        if not isinstance(value, dict):
            raise InputError(f"an item is {str(value)[:60]!r}, expected a text or an object")
        parts: list[Part] = []
        for key, content in value.items():
            if key not in _ITEM_KEYS:
                raise InputError(
                    f"an item has the key {key!r}, expected some of {', '.join(_ITEM_KEYS)}"
                )
            if content is None or content == "":
                continue
            if key == "text":
                parts.append(Text(content))
            elif key == "image":
                parts += map(self.image, listed(content))
            else:
                parts.append(self.video(content))
        if not parts:
            raise InputError("an item is empty, expected a text or a picture")
        return tuple(parts)


def listed(value: Any) -> list[Any]:
    """Return the values of a field as a list; empty for None and for an empty text."""
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def field(row: Row, name: str, kind: type, *, what: str = "") -> Any:
    """Return a field that a row must have.

    Raises:
        InputError: it is missing, or of another type.
    """
    expected = what or ("a text" if kind is str else "a list")
    if name not in row:
        raise InputError(f"it has no {name!r}, expected {expected}; it has {_keys(row)}")
    if not isinstance(row[name], kind):
        raise InputError(f"its {name!r} is {str(row[name])[:60]!r}, expected {expected}")
    return row[name]


def _keys(row: Iterable[str]) -> str:
    return ", ".join(map(repr, row)) or "nothing"
