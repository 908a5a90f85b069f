"""Scene-graph rows as contrastive examples: an image and a question about two objects retrieve a
predicate.

See `data/scene_graph.py` for the rows. Negatives are predicates near the target, those of other
pairs in the image, then random ones; never one that is true for the pair.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from visavis.data.examples import ContrastiveExample
from visavis.data.formats import synthetic
from visavis.data.media_paths import Options, Place
from visavis.data.readers import Row, Rows, find_files, open_rows
from visavis.data.scene_graph import (
    QUESTION,
    STATEMENT,
    Labels,
    Relation,
    Thing,
    question,
    read_labels,
    relation,
)
from visavis.errors import InputError
from visavis.inputs import Image, Prompt, Text
from visavis.processing.images import image_size


class SceneGraphOptions(Options):
    """Options of `scene-graph`.

    Args:
        labels: folder of the label files, below the data folder; None: no negatives of their own.
        nearest, same_image: of a sample's negatives, at most this many of each kind.
        negatives: in all; random predicates fill up.
        question: with the fields subject, subject_box, object and object_box.
        marks: put Qwen2-VL's tokens for things and places around them.
        seed: of random predicates, which are the same in every epoch.
    """

    labels: Path | None = None
    nearest: int = Field(10, ge=0)
    same_image: int = Field(12, ge=0)
    negatives: int = Field(12, ge=0)
    question: str = QUESTION
    marks: bool = True
    seed: int = 0


class Relations:
    """Rows, each with all predicates that hold for its pair as `true`."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.said: dict[tuple[str, Any], list[str]] = {}
        for number in range(len(rows)):
            try:
                one = relation(rows[number])
            except InputError:
                continue  # said when the sample is asked for, with its id
            self.said.setdefault((one.image_id, one.pair), []).append(one.predicate)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Row:
        row = self.rows[number]
        try:
            one = relation(row)
        except InputError:
            return row
        return {**row, "true": self.said[one.image_id, one.pair]}

    def where(self, number: int) -> str:
        return self.rows.where(number)


def open_relations(path: str, root: Path, options: SceneGraphOptions) -> Rows:
    """Return the rows of files, or those that are drawn (`drawn/train`, `drawn/test`)."""
    if path.startswith(synthetic.PREFIX):
        rows: Rows = synthetic.Drawing(path)
    else:
        rows = open_rows(find_files(path, root))
    return Relations(rows) if options.labels else rows


class Predicates:
    """Makes samples of rows.

    Raises:
        TrainError: the label files cannot be read.
    """

    def __init__(self, place: Place, options: SceneGraphOptions) -> None:
        self.place, self.options = place, options
        self.labels: Labels | None = None
        if options.labels is not None:
            self.labels = read_labels(place.root / options.labels)

    def __call__(self, row: Row) -> ContrastiveExample:
        """Return the question about a row's two things, with its predicate.

        Raises:
            InputError: a field is missing, or the image's size cannot be read.
            ImageError: its image cannot be opened.
        """
        one = relation(row)
        picture = self.picture(row)
        return ContrastiveExample(
            row["id"],
            self.query(picture, image_size(picture), one.subject, one.object),
            _statement(one.predicate),
            tuple(map(_statement, self._negatives(one, set(row.get("true", ()))))),
            group=f"{one.image_id} {one.pair}",  # a pair may have several predicates
        )

    def picture(self, row: Row) -> Image:
        """Return the image of a row."""
        return self.place.image(row.get("image") or row.get("image_path"))

    def query(self, picture: Image, size: tuple[int, int], subject: Thing, object: Thing) -> Prompt:
        """Return the question about two things of an image."""
        options = self.options
        text = question(subject, object, size, form=options.question, marks=options.marks)
        return Prompt.of([picture, Text(text)])

    def _negatives(self, one: Relation, true: set[str]) -> list[str]:
        options, labels = self.options, self.labels
        if labels is None:
            return []
        draw = random.Random(f"{options.seed}/{one.id}")
        true = true | {one.predicate}
        near = [p for p in labels.neighbors.get(one.predicate, ()) if p not in true]
        others = [p for p in labels.same_image.get(one.id, ()) if p not in true]
        draw.shuffle(others)
        chosen = dict.fromkeys(near[: options.nearest] + others[: options.same_image])
        rest = [p for p in labels.predicates if p not in true and p not in chosen]
        found = [*chosen, *draw.sample(rest, len(rest))]
        return found[: options.negatives]


@dataclass
class Graph:
    """An image with its annotated objects and relations."""

    picture: Image
    things: list[Thing]
    relations: list[Relation]


def graphs(rows: Iterable[Row], make: Predicates) -> list[Graph]:
    """Return the images of rows, each once, in order."""
    found: dict[str, Graph] = {}
    for row in rows:
        one = relation(row)
        if one.image_id not in found:
            found[one.image_id] = Graph(make.picture(row), [], [])
        graph = found[one.image_id]
        graph.things += [thing for thing in (one.subject, one.object) if thing not in graph.things]
        graph.relations.append(one)
    return list(found.values())


def _statement(predicate: str) -> Prompt:
    return Prompt.of(STATEMENT.format(predicate))
