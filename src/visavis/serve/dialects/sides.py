"""Queries and documents: what the APIs call them, and which instruction belongs to each."""

from __future__ import annotations

from visavis.errors import InputError
from visavis.serve.config import Side

# Every API's names of an input type; None: neither side.
SIDES: dict[str, Side | None] = {
    "query": "query",
    "search_query": "query",
    "retrieval.query": "query",
    "nl2code.query": "query",
    "document": "document",
    "target": "document",
    "passage": "document",
    "search_document": "document",
    "retrieval.passage": "document",
    "retrieval.document": "document",
    "image": "document",
    "classification": None,
    "clustering": None,
    "separation": None,
    "text-matching": None,
}


def side_of(*names: str | None) -> Side | None:
    """Return the side that a request's input type or task names; None: it names none.

    Raises:
        InputError: the name is unknown.
    """
    for name in names:
        if name is not None:
            if name not in SIDES:
                raise InputError(
                    f"the input type is {name[:60]!r}, expected one of {', '.join(SIDES)}"
                )
            return SIDES[name]
    return None
