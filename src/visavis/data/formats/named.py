"""The data sets of `data.sources`, by name, as conversations or as texts with their pictures.

Wording and grouping are drawn once, from the option `seed`: the same in every epoch and run.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Literal

from pydantic import Field

from visavis.data.formats.place import Options, Place
from visavis.data.formats.rows import Row
from visavis.data.records import Record
from visavis.data.samples import Chat, Match, Sample
from visavis.data.sources import load_source
from visavis.data.wording import chat_pairs, text_to_match
from visavis.prompt import Image, Message, Prompt, Text


class RecordOptions(Options):
    """Options of `records`.

    Args:
        as: `chat`: questions in groups, captions and labels as answers; `match`: a text of each
            record as query, its picture as target.
        questions_per_example: questions about one picture that share its tokens.
        max_caption_words: longer captions are cut after a sentence.
        seed: of wording and grouping.
    """

    kind: Literal["chat", "match"] = Field("chat", alias="as")
    questions_per_example: int = Field(3, ge=1)
    max_caption_words: int = Field(24, ge=1)
    seed: int = 0


class Records:
    """A row for each conversation or text that the records of a data set give.

    Raises:
        TrainError: the data set is not there.
    """

    def __init__(self, name: str, root: Path, options: RecordOptions) -> None:
        self.name = name
        self.rows: list[Row] = []
        for record in load_source(name, root):
            draw = random.Random(f"{options.seed}/{record.key}")
            self.rows += _rows(record, draw, options)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Row:
        return self.rows[number]

    def where(self, number: int) -> str:
        return f"{self.name}, {self.rows[number]['id']!r}"


def _rows(record: Record, draw: random.Random, options: RecordOptions) -> list[Row]:
    if options.kind == "match":
        if not (record.caption or record.also):
            return []
        return [{"id": record.key, "text": text_to_match(record, draw), "record": record}]
    groups = chat_pairs(
        record,
        draw,
        questions_per_example=options.questions_per_example,
        max_caption_words=options.max_caption_words,
    )
    return [
        {"id": f"{record.key}#{number}", "pairs": pairs, "record": record}
        for number, pairs in enumerate(groups)
    ]


def from_record(row: Row, place: Place, options: RecordOptions) -> Sample:
    """Return one conversation, or one text with its picture."""
    record: Record = row["record"]
    picture = Image(record.image)
    if options.kind == "match":
        return Match(row["id"], Prompt.of(row["text"]), Prompt.of(picture), group=record.label)
    messages = []
    for number, (question, answer) in enumerate(row["pairs"]):
        parts = (picture, Text(question)) if number == 0 else (Text(question),)
        messages += [Message("user", parts), Message("assistant", (Text(answer),))]
    return Chat(row["id"], Prompt(tuple(messages)))
