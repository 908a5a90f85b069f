"""Image folders, one folder per class: the image is the query and its class name the target."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import Field

from visavis.data.datasets import Record, chat_pairs, load_source, text_to_match
from visavis.data.examples import ContrastiveExample, Conversation, Sample
from visavis.data.kinds import ask_presence
from visavis.data.media_paths import Options, Place
from visavis.data.readers import Row
from visavis.errors import TrainError
from visavis.inputs import Image, Message, Prompt, Stored, Text
from visavis.processing.media import find_images


class PictureOptions(Options):
    """Options of `images`.

    Args:
        text: the target, with the class's name for `{}`.
    """

    text: str = "{}"


class Folder:
    """A row for each image below the folders of a folder.

    Raises:
        TrainError: there are none, or some lie beside the folders.
    """

    def __init__(self, path: Path) -> None:
        if not os.path.isdir(path):
            raise TrainError(f"{path} is no folder, expected one with a folder of pictures a class")
        self.path = path
        self.pictures = find_images(path)
        bare = [picture for picture in self.pictures if picture.parent == path]
        if bare:
            raise TrainError(
                f"{path} holds {len(bare)} pictures beside its folders, the first is "
                f"{bare[0].name}; expected each picture in the folder of its class."
            )

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, number: int) -> Row:
        name = self.pictures[number].relative_to(self.path)
        return {"id": name.as_posix(), "class": name.parts[0]}

    def where(self, number: int) -> str:
        return str(self.pictures[number])


def classified(row: Row, place: Place, options: PictureOptions) -> ContrastiveExample:
    """Return an image with the name of its class, underscores as blanks."""
    text = options.text.replace("{}", row["class"].replace("_", " "))
    return ContrastiveExample(
        row["id"], Prompt.of(place.image(row["id"])), Prompt.of(text), group=row["class"]
    )


class RecordOptions(Options):
    """Options of `records`.

    Args:
        as: `chat`: questions in groups, captions and labels as answers; `match`: a text of each
            record as query, its image as target.
        questions_per_example: questions about one image that share its tokens.
        max_caption_words: longer captions are cut after a sentence.
        presence: questions about each label whether a thing is there, yes or no by a coin; 0: one
            of each.
        general: share of names that are replaced by their kind ("a bird" for an owl), so that a
            model that is unsure of the name gives the kind.
        seed: of wording and grouping.
    """

    kind: Literal["chat", "match"] = Field("chat", alias="as")
    questions_per_example: int = Field(3, ge=1)
    max_caption_words: int = Field(24, ge=1)
    presence: int = Field(0, ge=0)
    general: float = Field(0.0, ge=0, le=1)
    seed: int = 0


class Records:
    """A row for each conversation or text that the records of a data set give.

    Raises:
        TrainError: the data set is not there.
    """

    def __init__(self, name: str, root: Path, options: RecordOptions) -> None:
        self.name = name
        self.rows: list[Row] = []
        records = load_source(name, root)
        if options.presence:
            records = ask_presence(records, options.presence, options.seed)
        for record in records:
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
        general=options.general,
    )
    return [
        {"id": f"{record.key}#{number}", "pairs": pairs, "record": record}
        for number, pairs in enumerate(groups)
    ]


def from_record(row: Row, place: Place, options: RecordOptions) -> Sample:
    """Return one conversation, or one text with its image."""
    record: Record = row["record"]
    picture = Image(record.image)
    if options.kind == "match":
        return ContrastiveExample(
            row["id"], Prompt.of(row["text"]), Prompt.of(picture), group=record.label
        )
    messages = []
    for number, (question, answer) in enumerate(row["pairs"]):
        parts = (picture, Text(question)) if number == 0 else (Text(question),)
        messages += [Message("user", parts), Message("assistant", (Text(answer),))]
    return Conversation(row["id"], Prompt(tuple(messages)))


def folder_content(path: str, root: Path) -> Iterator[bytes]:
    """Yield name and size of each image in a folder."""
    folder = Folder(root / path)
    for picture in folder.pictures:
        yield f"{picture.relative_to(folder.path)} {picture.stat().st_size} ".encode()


def records_content(path: str, root: Path) -> Iterator[bytes]:
    """Yield texts and images of a data set."""
    for record in load_source(path, root):
        yield repr(replace(record, image=b"")).encode()
        yield record.image.read() if isinstance(record.image, Stored) else record.image
