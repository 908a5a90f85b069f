"""JSON lines of queries with what they should find, and what they should not: our own format.

    {"id": 7, "query": {"text": "a cat"}, "positives": [{"image": "a.jpg", "score": 0.9}],
     "negatives": [{"image": "b.jpg", "score": 0.4, "source": "nano"}], "group": "cats"}

Items are objects {text, image, video}, whose keys' order is the order of the parts, or texts; with
the option `corpus`, texts are ids of lines {id, text, image, …} of that file. Several positives are
as many samples that are no negatives of each other.

Mined negatives (`visavis mine`) are lines {id, negatives} of the same items, whose paths start at
their own file.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from visavis.data.formats.place import Options, Place, field
from visavis.data.formats.rows import Row, Rows, open_rows
from visavis.data.samples import Match
from visavis.errors import InputError, TrainError
from visavis.prompt import Message, Prompt

Lookup: TypeAlias = Callable[[str], Row]

_NOTES = ("score", "source")  # what an item says of itself, for people and for miners


class PairOptions(Options):
    """Options of `pairs`.

    Args:
        corpus: JSON lines of items with their ids; a path below the data folder.
    """

    corpus: Path | None = None


class Spread:
    """A row for each positive of each row, `positive` its number."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.numbers, self.positives = array("Q"), array("Q")
        for number in range(len(rows)):
            found = rows[number].get("positives")
            for positive in range(len(found) if isinstance(found, list) and found else 1):
                self.numbers.append(number)
                self.positives.append(positive)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: int) -> Row:
        return {**self.rows[self.numbers[number]], "positive": self.positives[number]}

    def where(self, number: int) -> str:
        return self.rows.where(self.numbers[number])


class Pairs:
    """Makes samples of rows.

    Raises:
        TrainError: the corpus cannot be read.
    """

    def __init__(self, place: Place, options: PairOptions) -> None:
        self.place = place
        self.find = Corpus(place.root / options.corpus).find if options.corpus else None

    def __call__(self, row: Row) -> Match:
        """Return the query of a row with one of its positives.

        Raises:
            InputError: an item is missing, or of no kind that is known.
        """
        positives = field(row, "positives", list, what="a list of items")
        if not positives:
            raise InputError("its 'positives' are empty, expected what the query should find")
        if "query" not in row:
            raise InputError(f"it has no 'query', expected an item; it has {', '.join(row)}")
        id, number = row["id"], row["positive"]
        group = row.get("group") or (id if len(positives) > 1 else "")
        return Match(
            id if number == 0 else f"{id}#{number}",
            _prompt(row["query"], self.place, self.find),
            _prompt(positives[number], self.place, self.find),
            negatives(row, self.place, self.find),
            group=str(group),
        )


def negatives(row: Row, place: Place, find: Lookup | None = None) -> tuple[Prompt, ...]:
    """Return a row's negatives."""
    found = row.get("negatives") or []
    if not isinstance(found, list):
        raise InputError(f"its 'negatives' are {str(found)[:60]!r}, expected a list of items")
    return tuple(_prompt(item, place, find) for item in found)


def _prompt(item: Any, place: Place, find: Lookup | None) -> Prompt:
    if isinstance(item, str) and find is not None:
        item = find(item)
    if isinstance(item, dict):
        item = {key: value for key, value in item.items() if key not in _NOTES}
    return Prompt((Message("user", place.item(item)),))


class Mined:
    """Mined negatives, joined by id.

    Raises:
        TrainError: the file cannot be read, a line has no id, or two have the same.
    """

    def __init__(self, path: Path) -> None:
        self.rows, self.folder = open_rows([path]), path.parent
        self.numbers = index_by_id(self.rows)

    def of(self, id: str, place: Place) -> tuple[Prompt, ...]:
        """Return the negatives of a sample; none if it has no line. Paths start at the file."""
        number = self.numbers.get(id)
        here = Place(place.root, self.folder, within=place.root)
        return () if number is None else negatives(self.rows[number], here)


def index_by_id(rows: Rows) -> dict[str, int]:
    """Return where each id is.

    Raises:
        TrainError: a row has none, or two have the same.
    """
    numbers: dict[str, int] = {}
    for number in range(len(rows)):
        id = rows[number].get("id")
        if id in (None, "") or str(id) in numbers:
            raise TrainError(
                f"{rows.where(number)} has the id {id!r}, expected one of its own; negatives and "
                "corpora are found by it."
            )
        numbers[str(id)] = number
    return numbers


class Corpus:
    """Items by id.

    Raises:
        TrainError: the file cannot be read, a line has no id, or two have the same.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, open_rows([path])
        self.numbers = index_by_id(self.rows)

    def find(self, id: str) -> Row:
        """Return an item.

        Raises:
            InputError: there is none of this id.
        """
        if id not in self.numbers:
            raise InputError(f"it names the item {id!r}, which {self.path.name} has not")
        item = self.rows[self.numbers[id]]
        return {key: value for key, value in item.items() if key != "id"}
