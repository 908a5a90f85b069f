"""The rows that VLM2Vec and LLaVE train on: MMEB-train, LLaVA-Hound, ViDoRe, VisRAG.

    mmeb         {qry, qry_image_path, pos_text, pos_image_path, neg_text, neg_image_path}
    llava-hound  {id, video, conversations: [human with <video>, gpt]}
    vidore       {image, query, answer}: questions about a page, their answers as targets
    visrag       {query, image, source}: queries and the page that answers them

Texts are those of VLM2Vec's code, blanks included. What stands behind an image's token (a newline,
a blank) is left to the model's profile.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, TypeAlias

import yaml

from visavis.data.examples import ContrastiveExample
from visavis.data.formats.llava import KINDS, LlavaOptions, read_messages
from visavis.data.media_paths import Options, Place, field, listed
from visavis.data.readers import Row, Rows, open_rows
from visavis.errors import InputError, TrainError
from visavis.inputs import Message, Part, Prompt, Stored, Text, Visual

_TOKEN = re.compile(r"(?:<\|image_1\|>|<image>|<\|image_pad\|>|<video>)\n?")


@dataclass(frozen=True)
class Instructions:
    """Instructions of one task.

    Args:
        query: text before a query.
        target: text before a candidate; empty: candidates are text alone.
    """

    query: str = ""
    target: str = ""


@cache
def task_instructions(group: str) -> dict[str, Instructions]:
    """Return the instructions of a group of tasks by task name, from `data/mmeb.yaml`.

    Args:
        group: `image` (MMEB-V1), `video` or `document` (MMEB-V2), `visrag` or `llava-hound`.
    """
    text = Path(__file__).parents[1].joinpath("mmeb.yaml").read_text(encoding="utf-8")
    return {name: Instructions(**one) for name, one in yaml.safe_load(text)[group].items()}


class HoundOptions(Options):
    """Options of `llava-hound`.

    Args:
        mode: `qa`: question with video → answer; `caption_retrieval`: question with video → what it
            shows; `video_retrieval`: what it shows → video.
        frames: of each video; None: as many as the model takes. VLM2Vec takes 8.
    """

    mode: Literal["qa", "caption_retrieval", "video_retrieval"]
    frames: int | None = None


def mmeb(row: Row, place: Place, options: Options) -> ContrastiveExample:
    """Return a row of MMEB-train.

    A token without an image (WebQA's queries have one) is dropped, an image without a token
    stands first.
    """
    texts = listed(row.get("neg_text"))
    paths = listed(row.get("neg_image_path"))
    negatives = [
        _marked(text or "", listed(path), place)
        for text, path in zip_longest(texts, paths)
        if text or path
    ]
    return ContrastiveExample(
        row["id"],
        _marked(field(row, "qry", str), listed(row.get("qry_image_path")), place),
        _marked(field(row, "pos_text", str), listed(row.get("pos_image_path")), place),
        tuple(negatives),
    )


def _marked(text: str, paths: list[Any], place: Place) -> Prompt:
    """Return a text with its image in the place of its token."""
    found = list(_TOKEN.finditer(text))
    if len(paths) > 1 or len(found) > 1:
        raise InputError(
            f"{text[:60]!r} has {len(found)} image tokens and {len(paths)} pictures, expected at "
            "most one of each"
        )
    if not paths:
        return _prompt(Text(_TOKEN.sub("", text)))
    picture = place.image(paths[0])
    if not found:
        return _prompt(picture, Text(text))
    return _prompt(Text(text[: found[0].start()]), picture, Text(text[found[0].end() :]))


def hound(row: Row, place: Place, options: HoundOptions) -> ContrastiveExample:
    """Return a row of LLaVA-Hound."""
    turns = field(row, "conversations", list, what="a question and an answer")
    values = [str(turn["value"]) for turn in turns if isinstance(turn, dict) and "value" in turn]
    if len(turns) != 2 or len(values) != 2:
        raise InputError(
            f"its conversation has {len(turns)} turns, expected a question and an answer as "
            "{from, value}"
        )
    question, answer = values
    video = place.video(row.get("video"), options.frames)
    instructions = task_instructions("llava-hound")
    if options.mode == "video_retrieval":
        words = instructions["retrieval"]
        query, target = _prompt(Text(words.query + answer)), _prompt(Text(words.target), video)
    else:
        before = instructions["qa"].query if options.mode == "qa" else ""
        query, target = _filmed(before + question, video), _prompt(Text(answer))
    return ContrastiveExample(row["id"], query, target)


def _filmed(text: str, video: Visual) -> Prompt:
    found = list(_TOKEN.finditer(text))
    if len(found) != 1:
        raise InputError(f"its question has {len(found)} <video>, expected one: {text[:60]!r}")
    return _prompt(Text(text[: found[0].start()]), video, Text(text[found[0].end() :]))


def vidore(row: Row, place: Place, options: Options) -> ContrastiveExample:
    """Return a row of vidore/colpali_train_set."""
    query = _prompt(place.image(row.get("image")), Text(field(row, "query", str)))
    return ContrastiveExample(row["id"], query, _prompt(Text(field(row, "answer", str))))


def visrag(row: Row, place: Place, options: Options) -> ContrastiveExample:
    """Return a row of VisRAG's training data; sources that are not its own get no description."""
    words = task_instructions("visrag").get(str(row.get("source") or ""), Instructions())
    query = f"{words.query} {field(row, 'query', str)} ".removeprefix(" ")
    target = f"{words.target}  " if words.target else ""
    return ContrastiveExample(
        row["id"], _prompt(Text(query)), _prompt(Text(target), place.image(row.get("image")))
    )


def _prompt(*parts: Part) -> Prompt:
    kept = tuple(part for part in parts if not isinstance(part, Text) or part.text)
    return Prompt((Message("user", kept),))


Lookup: TypeAlias = Callable[[str], Row]

_NOTES = ("score", "source")  # what an item says of itself, for people and for miners
# Columns of sentence-transformers, and keys of ms-swift; the first of them says which it is.
_COLUMNS = re.compile(r"anchor|query|positive|negative(_[0-9]{1,6})?")
_SWIFT = re.compile(r"(positive_|negative_)?(messages|images|videos)")
_OWN = ("query", "positives", "negatives")
ROW, POSITIVE = "#row", "#positive"  # which of a file's rows and of its positives a sample is of
_EVERY = ("id", "group", ROW, POSITIVE, *_NOTES)


class PairOptions(Options):
    """Options of `pairs`.

    Args:
        corpus: JSON lines of items with their ids; a path below the data folder.
    """

    corpus: Path | None = None


class Spread:
    """A row for each positive of each row, with the numbers of both."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.numbers, self.positives = array("Q"), array("Q")
        for number in range(len(rows)):
            row = rows[number]
            found = row.get("positives")
            if "positive_messages" in row:
                found = _conversations(row["positive_messages"])
            for positive in range(len(found) if isinstance(found, list) and found else 1):
                self.numbers.append(number)
                self.positives.append(positive)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: int) -> Row:
        row = self.numbers[number]
        return {**self.rows[row], ROW: row, POSITIVE: self.positives[number]}

    def where(self, number: int) -> str:
        return self.rows.where(self.numbers[number])


class Pairs:
    """Makes samples of rows: our own {query, positives, negatives}, the columns of
    sentence-transformers (anchor or query, positive, negative, negative_1, …) or those of ms-swift
    (messages, positive_messages, negative_messages, each with images and videos).

    Raises:
        TrainError: the corpus cannot be read.
    """

    def __init__(self, place: Place, options: PairOptions) -> None:
        self.place = place
        self.find = CorpusFile(place.root / options.corpus).find if options.corpus else None

    def __call__(self, row: Row) -> ContrastiveExample:
        """Return the query of a row with one of its positives.

        Raises:
            InputError: an item is missing, or of no kind that is known; a key is unknown.
        """
        if "messages" in row:
            query, positives, hard = self._swift(row)
        elif "positive" in row:
            query, positives, hard = self._columns(row)
        else:
            query, positives, hard = self._own(row)
        id, number = row["id"], row[POSITIVE]
        group = row.get("group") or (id if len(positives) > 1 else "")
        return ContrastiveExample(
            id if number == 0 else f"{id}#{number}", query, positives[number], hard, str(group)
        )

    def _own(self, row: Row) -> tuple[Prompt, list[Prompt], tuple[Prompt, ...]]:
        _check_keys(row, re.compile("|".join(_OWN)), ", ".join(_OWN))
        positives = field(row, "positives", list, what="a list of items")
        if not positives:
            raise InputError("its 'positives' are empty, expected what the query should find")
        if "query" not in row:
            raise InputError(f"it has no 'query', expected an item; it has {', '.join(row)}")
        query, *found = self._items([row["query"], *positives])
        return query, found, negatives(row, self.place, self.find)

    def _columns(self, row: Row) -> tuple[Prompt, list[Prompt], tuple[Prompt, ...]]:
        _check_keys(row, _COLUMNS, "anchor or query, positive, negative, negative_1, …")
        queries = [row[name] for name in ("anchor", "query") if row.get(name) is not None]
        if len(queries) != 1:
            raise InputError(f"it has {len(queries)} of 'anchor' and 'query', expected one of them")
        names = [name for name in row if name.startswith("negative")]
        names.sort(key=lambda name: int(name.partition("_")[2] or 0))
        hard = [item for name in names for item in listed(row[name])]
        query, positive, *found = self._items([*queries, row["positive"], *hard])
        return query, [positive], tuple(found)

    def _swift(self, row: Row) -> tuple[Prompt, list[Prompt], tuple[Prompt, ...]]:
        _check_keys(row, _SWIFT, "messages, positive_messages, negative_messages, and images")
        queries = self._messages(row, "")
        if len(queries) != 1:
            raise InputError(f"it has {len(queries)} 'messages', expected one conversation")
        positives = self._messages(row, "positive_")
        if not positives:
            raise InputError("its 'positive_messages' are empty, expected what should be found")
        return queries[0], positives, tuple(self._messages(row, "negative_"))

    def _messages(self, row: Row, prefix: str) -> list[Prompt]:
        """Return the prompts of `messages`, with the files under `images` and `videos`."""
        found = _conversations(row.get(f"{prefix}messages"))
        files = {}
        for kind in KINDS:
            each = listed(row.get(f"{prefix}{kind}s"))
            # Files of one conversation may stand alone; of several each has a list of its own.
            files[kind] = each if each and isinstance(each[0], (list, tuple)) else [each]
            if len(files[kind]) != len(found) and any(files[kind]):
                raise InputError(
                    f"it has {len(found)} '{prefix}messages' and {len(files[kind])} lists of "
                    f"'{prefix}{kind}s', expected a list for each"
                )
            files[kind] = files[kind] if any(files[kind]) else [[]] * len(found)
        return [
            Prompt(
                read_messages(
                    turns, {kind: files[kind][i] for kind in KINDS}, self.place, LlavaOptions()
                )
            )
            for i, turns in enumerate(found)
        ]

    def _items(self, items: list[Any]) -> list[Prompt]:
        return [_pair_prompt(item, self.place, self.find) for item in items]


def _check_keys(row: Row, known: re.Pattern[str], expected: str) -> None:
    """Refuse a row with a key that would be ignored.

    Raises:
        InputError: it has one.
    """
    for key in row:
        if key not in _EVERY and not known.fullmatch(key):
            raise InputError(
                f"it has the key {key!r}, which is not read; expected {expected}, and maybe id, "
                "group, score and source"
            )


def _conversations(messages: Any) -> list[Any]:
    """Return lists of messages: one, or several."""
    found = listed(messages)
    return [found] if found and not isinstance(found[0], (list, tuple)) else found


def negatives(row: Row, place: Place, find: Lookup | None = None) -> tuple[Prompt, ...]:
    """Return a row's negatives."""
    found = row.get("negatives") or []
    if not isinstance(found, list):
        raise InputError(f"its 'negatives' are {str(found)[:60]!r}, expected a list of items")
    return tuple(_pair_prompt(item, place, find) for item in found)


def _pair_prompt(item: Any, place: Place, find: Lookup | None) -> Prompt:
    if isinstance(item, str) and find is not None:
        item = find(item)
    if isinstance(item, (Stored, bytes)):
        return Prompt((Message("user", (place.image(item),)),))
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


class CorpusFile:
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
            raise InputError(f"it names the item {id!r}, which {self.path.name} does not have")
        item = self.rows[self.numbers[id]]
        return {key: value for key, value in item.items() if key != "id"}
