"""Tables of an index in a PostgreSQL database, and values as its tables hold them.

visavis_meta       format, model, fingerprint, dim; numbers of items and of their tokens
visavis_vectors    content hash (unique) → float32 vector
visavis_items      source (unique) and everything else that is known of an item; `words`: how often
                   each word stands in its texts
visavis_left_out   numbers of files that were not indexed, by place, suffix and reason
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from visavis.errors import StoreError
from visavis.index.filters import Filter

FORMAT_VERSION = "1"
MAX_PLAIN = 7000  # bytes of a vector that fits into a page of the table
MAX_DIM = 16_000  # of pgvector
LOCK = "SELECT pg_advisory_xact_lock(hashtext('visavis ' || current_schema()))"

_TABLES = """
CREATE EXTENSION IF NOT EXISTS vector;
CREATE TABLE visavis_meta (key text PRIMARY KEY, value text NOT NULL);
CREATE TABLE visavis_vectors (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  content text NOT NULL UNIQUE,
  vector vector({dim}) NOT NULL
);
ALTER TABLE visavis_vectors ALTER COLUMN vector SET STORAGE {storage};
CREATE TABLE visavis_items (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  vector bigint NOT NULL REFERENCES visavis_vectors,
  key text NOT NULL UNIQUE,
  source text NOT NULL,
  kind text NOT NULL,
  path text NOT NULL,
  path_key text NOT NULL,
  page integer,
  begin_s double precision,
  end_s double precision,
  date double precision,
  place text NOT NULL,
  text text NOT NULL,
  found_text text NOT NULL,
  metadata text NOT NULL,
  metadata_values text[] NOT NULL,
  size bigint NOT NULL,
  mtime_ns bigint NOT NULL,
  parts integer NOT NULL,
  settings text NOT NULL,
  preview bytea,
  words jsonb NOT NULL,
  num_tokens integer NOT NULL
);
CREATE INDEX visavis_items_by_path ON visavis_items (path_key);
CREATE INDEX visavis_items_by_vector ON visavis_items (vector);
CREATE INDEX visavis_items_by_word ON visavis_items USING gin (words);
CREATE INDEX visavis_items_by_value ON visavis_items USING gin (metadata_values);
CREATE INDEX visavis_items_by_date ON visavis_items (date);
CREATE TABLE visavis_left_out (
  place text NOT NULL, suffix text NOT NULL, reason text NOT NULL, files integer NOT NULL
);
"""


def make_tables(connection: Any, meta: Mapping[str, str], name: str) -> None:
    """Make the tables of a new index; the caller commits.

    Raises:
        StoreError: the vectors are longer than pgvector's.
    """
    dim = int(meta["dim"])
    if dim > MAX_DIM:
        raise StoreError(
            f"{name}: the model's vectors have {dim} dimensions, and pgvector's at most {MAX_DIM}; "
            "use an index file"
        )
    storage = "PLAIN" if 4 * dim <= MAX_PLAIN else "EXTERNAL"
    connection.execute(_TABLES.format(dim=dim, storage=storage))
    values = {**meta, "format": FORMAT_VERSION, "num_items": "0", "num_tokens": "0"}
    for key, value in values.items():
        connection.execute("INSERT INTO visavis_meta VALUES (%s, %s)", (key, value))


# ---- values --------------------------------------------------------------------------------------

_ESCAPE = "\U0010fffd"  # of private use; before characters that PostgreSQL's text cannot hold
_BAD = re.compile(f"[\0\ud800-\udfff{_ESCAPE}]")
_ESCAPED = re.compile(f"{_ESCAPE}(.)", re.DOTALL)
_OFFSET = 0x100000


def to_text(text: str) -> str:
    """Return a text with NUL and half characters replaced so that `from_text` gives it back."""
    return _BAD.sub(lambda bad: _ESCAPE + chr(ord(bad[0]) % _OFFSET + _OFFSET), text)


def from_text(stored: str) -> str:
    """Return a text as it was given to `to_text`."""

    def original(found: re.Match[str]) -> str:
        return _ESCAPE if found[1] == _ESCAPE else chr(ord(found[1]) % _OFFSET)

    return _ESCAPED.sub(original, stored)


def key_of(text: str) -> str:
    """Return a hash that names a source or path of any length."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def metadata_values(metadata: Mapping[str, Any]) -> list[str]:
    """Return every (key, value) that a filter can ask for, as texts."""
    pairs = [(key, value) for key, given in metadata.items() for value in filter_values(given)]
    return [pair_text(key, value) for key, value in pairs]


def filter_values(value: Any) -> Iterable[str]:
    """Return the texts that `Filter.matches_metadata` finds a metadata value by."""
    if isinstance(value, (list, tuple)):
        return [text for one in value for text in filter_values(one)]
    if value is None or isinstance(value, Mapping):
        return []
    return [value if isinstance(value, str) else json.dumps(value)]


def pair_text(key: str, value: str) -> str:
    return json.dumps([key, value])


# ---- filters -------------------------------------------------------------------------------------


def condition_of(filter: Filter | None) -> tuple[str, dict[str, Any]]:
    """Return a filter as SQL over `visavis_items i`, and its parameters."""
    if filter is None:
        return "TRUE", {}
    found: list[str] = []
    values: dict[str, Any] = {}
    if filter.kinds:
        found.append("i.kind = ANY(%(kinds)s)")
        values["kinds"] = list(filter.kinds)
    if filter.folder:
        found.append("starts_with(i.path, %(folder)s)")
        values["folder"] = to_text(filter.folder.rstrip(os.sep) + os.sep)
    if filter.glob:
        found.append("i.source ~ %(glob)s")
        values["glob"] = regex_of(filter.glob)
    if filter.after is not None:
        found.append("i.date >= %(after)s")
        values["after"] = float(filter.after)
    if filter.before is not None:
        found.append("i.date < %(before)s")
        values["before"] = float(filter.before)
    if filter.metadata:
        found.append("i.metadata_values @> %(pairs)s")
        values["pairs"] = [pair_text(key, value) for key, value in filter.metadata]
    return " AND ".join(found) or "TRUE", values


def regex_of(glob: str) -> str:
    """Return the regular expression of PostgreSQL that matches what `fnmatch.fnmatchcase` does."""
    pieces, at = [], 0
    any_one = f"(?:{_ESCAPE}.|[^{_ESCAPE}])"
    while at < len(glob):
        letter = glob[at]
        at += 1
        if letter == "*":
            pieces.append(".*")
        elif letter == "?":
            pieces.append(any_one)
        elif letter == "[":
            end = glob.find("]", at + 1 + (glob[at : at + 1] == "!"))
            if end < 0:
                pieces.append(r"\[")
                continue
            pieces.append(_set_of(glob[at:end]))
            at = end + 1
        else:
            pieces.append(_literal(letter))
    return f"^(?:{''.join(pieces)})$"


def _set_of(content: str) -> str:
    """Return the regular expression of a set such as `a-z` or `!0-9`."""
    is_negated = content.startswith("!")
    content = content.removeprefix("!")
    choices, at = [], 0
    while at < len(content):
        if content[at + 1 : at + 2] == "-" and at + 2 < len(content):
            first, last = content[at], content[at + 2]
            if first <= last:
                choices.append(f"{_code(first)}-{_code(last)}")
            at += 3
        else:
            choices.append(_code(content[at]))
            at += 1
    if not choices:
        return "." if is_negated else "(?:$.)"
    return f"[{'^' * is_negated}{''.join(choices)}]"


def _code(letter: str) -> str:
    return f"\\U{ord(letter):08X}"


def _literal(letter: str) -> str:
    stored = to_text(letter)
    return "".join(one if one.isalnum() else _code(one) for one in stored)
