"""Drawn pictures of shapes whose relations are known: a scene graph of no files, to try things on.

    {format: scene-graph, path: drawn/train}

Every ordered pair of a picture's things has one predicate, which follows from the boxes. All
follows from the split and the picture's number. Knows neither samples nor models.
"""

from __future__ import annotations

import io
import random
from functools import partial
from typing import Any

from PIL import Image as pil
from PIL import ImageDraw

from visavis.errors import TrainError
from visavis.prompt import Stored

PREFIX = "drawn/"
VERSION = 1  # of the drawings
PICTURES = {"train": 400, "test": 12}
SIDE = 100  # pixels
NAMES = {
    "sun": "gold",
    "lamp": "orange",
    "ball": "red",
    "tin": "green",
    "egg": "blue",
    "mat": "tan",
}
USUAL = {
    "sun": 0,
    "mat": 2,
}  # row of a 3 by 3 grid; where a thing is says much of what it is to others
PREDICATES = ("left of", "right of", "above", "below", "inside", "around")


class Drawn:
    """A row for each ordered pair of things of each picture of a split.

    Raises:
        TrainError: there is no such split.
    """

    def __init__(self, path: str) -> None:
        self.split = path.removeprefix(PREFIX)
        if self.split not in PICTURES:
            known = ", ".join(PREFIX + split for split in PICTURES)
            raise TrainError(f"the path is {path!r}, expected one of {known}")
        num = len(NAMES)
        self.pairs = [(i, j) for i in range(num) for j in range(num) if i != j]

    def __len__(self) -> int:
        return PICTURES[self.split] * len(self.pairs)

    def __getitem__(self, number: int) -> dict[str, Any]:
        picture, pair = divmod(number, len(self.pairs))
        things = scene(f"{self.split}-{picture}")
        subject, object = (things[i] for i in self.pairs[pair])
        name = f"{self.split}-{picture}"
        return {
            "id": self.where(number),
            "image_id": name,
            "image": Stored(f"the drawing {name}", partial(drawing, name)),
            "predicate": predicate(subject["bbox"], object["bbox"]),
            "subject": subject,
            "object": object,
        }

    def where(self, number: int) -> str:
        picture, pair = divmod(number, len(self.pairs))
        return f"{self.split}-{picture}/{pair}"


def scene(name: str) -> list[dict[str, Any]]:
    """Return the things of a picture: class_name, and bbox in pixels. The egg lies inside the tin,
    the others overlap nothing; the sun stands above and the mat below."""
    draw = random.Random(f"scene {name}")
    boxes: dict[str, list[int]] = {}
    free = [(x, y) for y in range(3) for x in range(3)]
    for thing in [*USUAL, *(one for one in NAMES if one not in USUAL)]:
        if thing == "egg":
            left, top, right, bottom = boxes["tin"]
            ends = [right - draw.randint(3, 5), bottom - draw.randint(3, 5)]
            boxes[thing] = [left + 4, top + 4, *ends]
            continue
        x, y = draw.choice([cell for cell in free if cell[1] == USUAL.get(thing, cell[1])])
        free.remove((x, y))
        left, top = x * 33 + draw.randint(0, 8), y * 33 + draw.randint(0, 8)
        boxes[thing] = [left, top, left + draw.randint(14, 24), top + draw.randint(14, 24)]
    return [{"class_name": one, "bbox": boxes[one]} for one in NAMES]


def predicate(subject: list[int], object: list[int]) -> str:
    """Return what a box is to another."""
    if _within(subject, object):
        return "inside"
    if _within(object, subject):
        return "around"
    dx, dy = (subject[i] + subject[i + 2] - object[i] - object[i + 2] for i in (0, 1))
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def _within(inner: list[int], outer: list[int]) -> bool:
    return (
        inner[0] >= outer[0]
        and inner[1] >= outer[1]
        and inner[2] <= outer[2]
        and inner[3] <= outer[3]
    )


def drawing(name: str) -> bytes:
    """Return a picture as PNG."""
    picture = pil.new("RGB", (SIDE, SIDE), "white")
    draw = ImageDraw.Draw(picture)
    for number, thing in enumerate(scene(name)):
        shape = draw.ellipse if number % 2 else draw.rectangle
        shape(thing["bbox"], fill=NAMES[thing["class_name"]], outline="black")
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    return encoded.getvalue()
