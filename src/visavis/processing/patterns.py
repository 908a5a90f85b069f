"""Patterns of PEFT's `rank_pattern` and `alpha_pattern`, matched in a bounded child process.

A regular expression of a file may take forever on a name that it almost matches, so all but plain
names are tried in a child (`bounded.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from visavis.errors import CheckpointError
from visavis.processing import bounded

SECONDS = 10.0
MEMORY = 1 << 30
MAX_PATTERNS = 10_000
PLAIN = re.compile(r"[\w.]+")


def first_matches(patterns: Sequence[str], names: Sequence[str]) -> list[str | None]:
    """Return for each module name the first pattern that matches it, as PEFT does.

    A pattern is a regular expression that has to match the whole name, or its end after a dot.

    Raises:
        CheckpointError: a pattern is none, or takes too long.
    """
    strange = [one for one in patterns if not isinstance(one, str)]
    if strange or len(patterns) > MAX_PATTERNS:
        raise CheckpointError(
            f"the adapter's patterns of ranks are {str(patterns)[:80]}, expected at most "
            f"{MAX_PATTERNS} regular expressions"
        )
    if all(map(PLAIN.fullmatch, patterns)):
        return _matches(patterns, names)
    data = json.dumps([list(patterns), list(names)]).encode()
    try:
        found, _ = bounded.call(
            "visavis.processing.patterns:match_in_child", seconds=SECONDS, memory=MEMORY, data=data
        )
    except bounded.BoundExceededError as error:
        raise CheckpointError(
            f"the adapter's patterns of ranks take too long to match ({error}): "
            f"{', '.join(patterns)[:120]}; write them without nested repetitions"
        ) from error
    return list(found)


def match_in_child(data: bytes) -> tuple[list[str | None], bytes]:
    """Match patterns with names; runs in the child."""
    patterns, names = json.loads(data)
    try:
        return _matches(patterns, names), b""
    except re.error as error:
        raise CheckpointError(
            f"the adapter's pattern of ranks {error.pattern!r} is no regular expression: {error}"
        ) from None


def _matches(patterns: Sequence[str], names: Sequence[str]) -> list[str | None]:
    compiled = [(one, re.compile(rf"(.*\.)?({one})$")) for one in patterns]
    return [next((p for p, found in compiled if found.match(name)), None) for name in names]
