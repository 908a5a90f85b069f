"""Scene graphs: things in an image, each with a box, and predicates between them.

    {"id": 7, "image_id": 1, "image": "1.jpg", "predicate": "on",
     "subject": {"class_name": "cup", "bbox": [x1, y1, x2, y2]}, "object": {…}}

Predicate classification as matching: the image with a question about two things finds "The
subject is on the object." Here are the rows' meaning, the wording, and the three label files that
an offline step writes and samples take their negatives from:

    predicate_vocab.json        {predicates, vocab_size, predicate_to_idx, idx_to_predicate}
    predicate_neighbors.json    {predicate: {neighbors, scores}}, by cosine of their texts
    same_image_negatives.json   {sample id: predicates of other pairs of boxes of its image}

After a fork of VLM2Vec for VG150, whose last file holds predicates that are true for the pair as
well; here it does not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from visavis.errors import InputError, TrainError
from visavis.utils import parse_json, write_atomically

Box: TypeAlias = tuple[float, float, float, float]  # x1, y1, x2, y2, in pixels
Pair: TypeAlias = tuple[Box, Box]

QUESTION = (
    "In the given image, the subject {subject} is located at {subject_box}, the object {object} is "
    "located at {object_box}. Please return the predicate relationship between the subject and the "
    "object."
)
STATEMENT = "The subject is {} the object."
NO_RELATION = "no relation"
SCALE = 1000  # boxes are written in thousandths of the picture's width and height
VOCABULARY, NEIGHBORS, SAME_IMAGE = (
    f"{name}.json" for name in ("predicate_vocab", "predicate_neighbors", "same_image_negatives")
)


@dataclass(frozen=True)
class Thing:
    """Something in an image."""

    name: str
    box: Box


@dataclass(frozen=True)
class Relation:
    """A parsed row."""

    id: str
    image_id: str
    predicate: str
    subject: Thing
    object: Thing

    @property
    def pair(self) -> Pair:
        """Identifies a pair of objects in an image."""
        return self.subject.box, self.object.box


def relation(row: Mapping[str, Any]) -> Relation:
    """Parse a row.

    Raises:
        InputError: a field is missing or no such thing.
    """
    for name in ("image_id", "predicate", "subject", "object"):
        if row.get(name) in (None, ""):
            raise InputError(f"it has no {name!r}; it has {', '.join(map(repr, row))}")
    things = [_thing(row[name], name) for name in ("subject", "object")]
    return Relation(
        str(row.get("id", "")), str(row["image_id"]), str(row["predicate"]), things[0], things[1]
    )


def _thing(value: Any, what: str) -> Thing:
    box = value.get("bbox") if isinstance(value, dict) else None
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite, box)):
        raise InputError(
            f"its {what} is {str(value)[:80]!r}, expected {{class_name, bbox: [x1, y1, x2, y2]}} "
            "with the box in pixels"
        )
    if not isinstance(value.get("class_name"), str):
        raise InputError(f"its {what} has no 'class_name', expected a text")
    return Thing(value["class_name"], (box[0], box[1], box[2], box[3]))


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


# ---- wording -------------------------------------------------------------------------------------


def scaled(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return a box in 0..999 of the image's width and height, at least 1 wide and high.

    Example:
        (64, 0, 640, 480) of an image of 640 × 480  ->  (100, 0, 999, 999)
    """
    low, high = [], []
    for axis in (0, 1):
        ends = (box[axis], box[axis + 2])
        first, last = sorted(max(0, min(int(end / size[axis] * SCALE), SCALE - 1)) for end in ends)
        low.append(first)
        high.append(min(first + 1, SCALE - 1) if first == last else last)
    return low[0], low[1], high[0], high[1]


def question(
    subject: Thing, object: Thing, size: tuple[int, int], *, form: str, marks: bool
) -> str:
    """Return the question about two things of an image of a size in pixels.

    Args:
        form: `QUESTION`, or another text with the same fields.
        marks: put Qwen2-VL's tokens for things and places around them.
    """
    fields = {}
    for role, thing in (("subject", subject), ("object", object)):
        x1, y1, x2, y2 = scaled(thing.box, size)
        place = f"({x1}, {y1}), ({x2}, {y2})"
        fields[role] = (
            f"<|object_ref_start|>{thing.name}<|object_ref_end|>" if marks else thing.name
        )
        fields[f"{role}_box"] = f"<|box_start|>{place}<|box_end|>" if marks else place
    return form.format(**fields)


# ---- label files ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labels:
    """Contents of the three label files."""

    predicates: tuple[str, ...]
    neighbors: Mapping[str, Sequence[str]]
    same_image: Mapping[str, Sequence[str]]


def vocabulary(text: str) -> tuple[str, ...]:
    """Return predicates of a text with commas between them, in order, each once."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def write_labels(
    folder: Path,
    relations: Iterable[Relation],
    embed: Callable[[list[str]], np.ndarray],
    *,
    predicates: Sequence[str] = (),
    num_neighbors: int = 10,
) -> Labels:
    """Write the three label files and return their content.

    Args:
        embed: texts to unit vectors [N, D].
        predicates: the vocabulary; empty: those of the relations, sorted.

    Raises:
        TrainError: a predicate is not in the vocabulary, or two samples have one id.
    """
    relations = list(relations)
    said = sorted({one.predicate for one in relations})
    known = tuple(predicates) or tuple(said)
    strange = sorted(set(said) - set(known))
    if strange:
        raise TrainError(
            f"{len(strange)} of the {len(said)} predicates that samples have are not in the "
            f"vocabulary, the first is {strange[0]!r}; "
            "complete it, or leave it away to take those of the data."
        )
    same_image = other_pairs(relations)
    if len(same_image) < len(relations):
        raise TrainError(
            f"{len(relations)} samples have {len(same_image)} different ids; negatives are joined "
            "by them: give each its own."
        )
    vectors = embed([STATEMENT.format(predicate) for predicate in known])
    near = neighbors(known, vectors, num_neighbors)
    numbered = dict(enumerate(known))
    files: dict[str, Any] = {
        VOCABULARY: {
            "predicates": list(known),
            "vocab_size": len(known),
            "predicate_to_idx": {predicate: number for number, predicate in numbered.items()},
            "idx_to_predicate": numbered,
        },
        NEIGHBORS: near,
        SAME_IMAGE: same_image,
    }
    for name, content in files.items():
        with write_atomically(folder / name) as temporary:
            text = json.dumps(content, indent=None if name == SAME_IMAGE else 2)
            temporary.write_text(text, encoding="utf-8")
    return read_labels(folder)


def neighbors(
    predicates: Sequence[str], vectors: np.ndarray, number: int
) -> dict[str, dict[str, list[Any]]]:
    """Return the nearest other predicates of each and their scores, nearest first."""
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -np.inf)
    order = np.argsort(-scores, axis=1, kind="stable")[:, : min(number, len(predicates) - 1)]
    return {
        predicate: {
            "neighbors": [predicates[j] for j in order[i]],
            "scores": [float(scores[i, j]) for j in order[i]],
        }
        for i, predicate in enumerate(predicates)
    }


def other_pairs(relations: Iterable[Relation]) -> dict[str, list[str]]:
    """Return, for each sample, the predicates of other pairs of its image but not of its own."""
    relations = list(relations)
    said: dict[str, dict[Pair, dict[str, None]]] = {}
    for one in relations:
        said.setdefault(one.image_id, {}).setdefault(one.pair, {})[one.predicate] = None
    found = {}
    for one in relations:
        pairs = said[one.image_id]
        others = dict.fromkeys(p for pair, each in pairs.items() if pair != one.pair for p in each)
        found[one.id] = [predicate for predicate in others if predicate not in pairs[one.pair]]
    return found


def read_labels(folder: Path) -> Labels:
    """Read the three label files.

    Raises:
        TrainError: one is missing, damaged, or does not fit the others.
    """
    contents = {}
    for name in (VOCABULARY, NEIGHBORS, SAME_IMAGE):
        try:
            contents[name] = parse_json((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TrainError(
                f"cannot read {folder / name}: {error}; `visavis mine … --label-files {folder}` "
                "writes it."
            ) from error
    try:
        predicates = tuple(contents[VOCABULARY]["predicates"])
        near = {predicate: contents[NEIGHBORS][predicate]["neighbors"] for predicate in predicates}
        same_image = {id: list(each) for id, each in contents[SAME_IMAGE].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise TrainError(
            f"the files in {folder} do not fit each other ({type(error).__name__}: {error}); they "
            f"are of different runs: `visavis mine … --label-files {folder}` writes all three."
        ) from error
    return Labels(predicates, near, same_image)
