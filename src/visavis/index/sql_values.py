"""Texts of the index as SQLite stores them: file names that are not UTF-8 are bytes."""

from __future__ import annotations

import os


def to_sql(text: str) -> str | bytes:
    """Return a text as it is stored."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")
    return text


def from_sql(stored: str | bytes) -> str:
    """Return a text as it was given."""
    if isinstance(stored, str):
        return stored
    try:
        return stored.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:  # of another program
        return os.fsdecode(stored)


def readable(text: str) -> str:
    """Return a text that every database can hold: half characters and NULs are replaced."""
    return text.encode("utf-8", "replace").decode().replace("\0", " ")
