"""Which items a search considers: by kind, folder, name, date and metadata (`Filter`)."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from visavis.errors import InputError
from visavis.utils import suggest

KINDS = ("image", "page", "video", "text")
_KEYS = ("kind", "folder", "glob", "after", "before")
_OPERATOR = re.compile(rf"({'|'.join(_KEYS)}):(.*)", re.DOTALL)
_NAMED = re.compile(r"([A-Za-z]\w*):(.*)", re.DOTALL)
_METADATA = re.compile(r"([A-Za-z_][\w.-]*)=(.*)", re.DOTALL)
_HELP = (
    "kind:image, folder:/photos, glob:*.png, after:2024-01-31, before:2025, tag=beach, "
    "or one glob such as */2024/*"
)


@dataclass(frozen=True)
class Filter:
    """Conditions that an item has to meet, all of them.

    Attributes:
        kinds: any of these; empty: every kind.
        folder: its file lies in this folder or below it.
        glob: its source matches this glob, case-sensitively; "*" also matches "/".
        after, before: its date in Unix seconds, `after <= date < before`; items without a date
            do not meet it.
        metadata: (key, value) pairs: the item's metadata has this value, or a list that holds it.
            Numbers and booleans compare as JSON writes them.
    """

    kinds: tuple[str, ...] = ()
    folder: str = ""
    glob: str = ""
    after: float | None = None
    before: float | None = None
    metadata: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise InputError(f"the filter's kind is {kind!r}: {suggest(kind, KINDS)}")
        if self.folder:
            folder = os.path.abspath(os.path.expanduser(self.folder))
            object.__setattr__(self, "folder", folder)

    @classmethod
    def of(cls, given: Filter | str | None) -> Filter | None:
        """Return a filter that is one already, is written as `parse` reads it, or is None."""
        return cls.parse(given) if isinstance(given, str) else given

    @classmethod
    def parse(cls, text: str) -> Filter:
        """Return the filter that a text states.

        Conditions are separated by spaces; values with spaces are quoted. A text without any
        condition is one glob.

        Example::

            kind:page folder:/papers after:2024-01-01 before:2025 project="red car"
            */holiday/*

        Raises:
            InputError: a condition is unknown or has an unusable value.
        """
        try:
            reader = shlex.shlex(text, posix=True, punctuation_chars="")
            reader.whitespace_split, reader.escape, reader.commenters = True, "", ""
            tokens = list(reader)
        except ValueError as error:
            message = f"the filter {text!r} cannot be read ({error}); close its quotes"
            raise InputError(message) from None
        if not any(_NAMED.fullmatch(one) or _METADATA.fullmatch(one) for one in tokens):
            return cls(glob=text.strip())
        found: dict[str, Any] = {"kinds": [], "metadata": []}
        for token in tokens:
            _add_condition(found, token)
        kinds, metadata = tuple(found.pop("kinds")), tuple(found.pop("metadata"))
        return cls(kinds=kinds, metadata=metadata, **found)

    def matches(
        self, *, source: str, kind: str, path: str, date: float | None, metadata: Mapping[str, Any]
    ) -> bool:
        """Return whether an item meets all conditions."""
        return (
            (not self.kinds or kind in self.kinds)
            and (not self.folder or is_below(path, self.folder))
            and self.matches_source(source)
            and (self.after is None or (date is not None and date >= self.after))
            and (self.before is None or (date is not None and date < self.before))
            and self.matches_metadata(metadata)
        )

    def matches_source(self, source: str) -> bool:
        """Return whether a source matches the glob."""
        return not self.glob or fnmatch.fnmatchcase(source, self.glob)

    def matches_metadata(self, metadata: Mapping[str, Any]) -> bool:
        """Return whether metadata holds all wanted values."""
        return all(value in _values(metadata.get(key)) for key, value in self.metadata)


def _add_condition(found: dict[str, Any], token: str) -> None:
    if operator := _OPERATOR.fullmatch(token):
        key, value = operator[1], operator[2]
        if not value:
            raise InputError(f"the filter's {key}: has no value; expected for example {_HELP}")
        if key == "kind":
            found["kinds"] += value.split(",")
        elif key in found:
            raise InputError(f"the filter has {key}: twice, expected it once")
        else:
            found[key] = local_date(key, value) if key in ("after", "before") else value
    elif named := _NAMED.fullmatch(token):
        raise InputError(f"unknown filter {named[1]!r}: {suggest(named[1], _KEYS)}")
    elif metadata := _METADATA.fullmatch(token):
        found["metadata"].append((metadata[1], metadata[2]))
    else:
        raise InputError(f"{token!r} is no filter; expected for example {_HELP}")


def local_date(key: str, text: str) -> float:
    """Return Unix seconds of a local date: a year, a month, a day or a time in ISO 8601.

    Args:
        key: of the filter, for messages.

    Raises:
        InputError: it is no date.
    """
    padded = text + {4: "-01-01", 7: "-01"}.get(len(text), "")
    try:
        return datetime.fromisoformat(padded).timestamp()
    except (ValueError, OverflowError, OSError):
        raise InputError(
            f"the filter's {key} is {text[:40]!r}, expected a date such as 2024, 2024-01, "
            "2024-01-31 or 2024-01-31T12:00"
        ) from None


def is_below(path: str, folder: str) -> bool:
    """Return whether a path lies in a folder or below it."""
    return path.startswith(folder if folder.endswith(os.sep) else folder + os.sep)


def _values(value: Any) -> tuple[str, ...]:
    """Return the texts that a metadata value is found by."""
    if isinstance(value, (list, tuple)):
        return tuple(text for one in value for text in _values(one))
    if value is None or isinstance(value, Mapping):
        return ()
    return (value if isinstance(value, str) else json.dumps(value),)
