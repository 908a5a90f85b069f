"""Exact names and helpful answers for wrong ones. Never matches substrings, never guesses."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

from visavis.errors import UnknownNameError

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
