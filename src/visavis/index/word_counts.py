"""Words of texts as SQLite's full-text search counts them, for stores that have none of their own.

    texts ──► FTS5 in memory ──► stems of words, and how often each stands in a text

So all stores find the same items by the same words.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing

from visavis.index.sql_values import readable

TOKENIZE = "porter unicode61 remove_diacritics 2"
K1, B = 1.2, 0.75  # of BM25, as in FTS5


def count_words(texts: Iterable[str]) -> list[dict[str, int]]:
    """Return the stems of the words of each text and how often each stands in it."""
    counts: list[dict[str, int]] = []
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.execute(f"CREATE VIRTUAL TABLE words USING fts5 (text, tokenize='{TOKENIZE}')")
        connection.execute("CREATE VIRTUAL TABLE found USING fts5vocab (words, instance)")
        for number, text in enumerate(texts):
            connection.execute(
                "INSERT INTO words (rowid, text) VALUES (?, ?)", (number, readable(text))
            )
            counts.append({})
        rows = connection.execute("SELECT doc, term, count(*) FROM found GROUP BY doc, term")
        for number, stem, count in rows:
            counts[number][stem] = count
    return counts


def stems_of(words: Sequence[str]) -> dict[str, list[str]]:
    """Return the stems of each word of a query: nearly always one."""
    return {word: list(found) for word, found in zip(words, count_words(words), strict=True)}


def inverse_frequency(num_items: int, num_found: int) -> float:
    """Return the weight of a word that stands in `num_found` of `num_items` texts (Robertson and
    Zaragoza 2009, "The Probabilistic Relevance Framework: BM25 and Beyond"), as FTS5 bounds it."""
    weight = math.log((num_items - num_found + 0.5) / (num_found + 0.5))
    return weight if weight > 0 else 1e-6
