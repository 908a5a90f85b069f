"""Words: of file names, of queries, and the fusion of found words with near vectors.

Ranks are fused by reciprocal rank fusion (Cormack, Clarke and Büttcher 2009, "Reciprocal rank
fusion outperforms Condorcet and individual rank learning methods"):

    score(d) = Σ over lists of 1 / (60 + rank of d in the list)
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from visavis.index.sql_values import readable

FUSION_K = 60
MAX_WORDS = 32  # of a query; a longer one is a text whose meaning counts
_WORD = re.compile(r"\w+")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Za-z])(?=[0-9])|(?<=[0-9])(?=[A-Za-z])")
# Function words of some languages: they are in every text and say nothing about it.
_STOP = (
    "a an and are as at be by for from has have he her his i in is it its me my no not of on or "
    "our she that the their them they this to was we were what when where which who with you your "
    "der die das dem des ein eine einen einem einer und oder im am auf aus bei mit nach von vom zu "
    "zum zur ist sind le la les un une du de et ou en dans sur avec pour par est sont el y o del "
    "al por para es il lo di da e è"
)
_STOP_WORDS = frozenset(_STOP.split())


def file_words(path: str) -> str:
    """Return the words of a file name and of the folder it lies in, for searching.

    Example:
        "/photos/Summer2024/IMG_redCar.jpg" -> "Summer2024 Summer 2024 IMG_redCar jpg IMG red Car"
    """
    folder, name = os.path.split(path)
    pieces: list[str] = []
    for text in (os.path.basename(folder), name):
        found = _WORD.findall(text.replace("_", " "))
        parts = [part for word in found for part in _CAMEL.split(word)]
        pieces += dict.fromkeys([*found, *parts])
    return readable(" ".join(pieces))


def query_words(text: str) -> tuple[str, ...]:
    """Return the words of a query that say something, each once, as they were written."""
    found = dict.fromkeys(word.casefold() for word in _WORD.findall(text.replace("_", " ")))
    words = tuple(word for word in found if word not in _STOP_WORDS)
    return words if len(words) <= MAX_WORDS else ()


def fuse(*rankings: Sequence[int]) -> list[tuple[int, float]]:
    """Return (item, score) of the items of several rankings, highest score first; of equal scores
    the item that is higher in the first ranking, then that with the lower number, comes first."""
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, item in enumerate(ranking, 1):
            scores[item] = scores.get(item, 0.0) + 1 / (FUSION_K + rank)
    place = {item: rank for rank, item in enumerate(rankings[0])} if rankings else {}
    last = len(place)
    return sorted(scores.items(), key=lambda one: (-one[1], place.get(one[0], last), one[0]))
