"""Synthetic images of shapes with known relations: a scene-graph data source without files.

    {format: scene-graph, path: drawn/train}

Every ordered pair of an image's objects has one predicate, which follows from their boxes. The
split and the image's number determine everything else.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

from PIL import Image as pil
from PIL import ImageDraw
from pydantic import Field

from visavis.data.examples import ContrastiveExample, Conversation, Sample
from visavis.data.media_paths import Options, Place
from visavis.data.readers import Row
from visavis.errors import TrainError
from visavis.inputs import Image, Message, Prompt, Stored, Text

PREFIX = "drawn/"
DRAWINGS_VERSION = 1  # of the drawings
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


class Drawing:
    """A row for each ordered pair of things of each image of a split.

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
    """Return the things of an image: class_name, and bbox in pixels. The egg lies inside the tin,
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
    """Return the spatial predicate of one box relative to another."""
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
    """Return an image as PNG."""
    picture = pil.new("RGB", (SIDE, SIDE), "white")
    draw = ImageDraw.Draw(picture)
    for number, thing in enumerate(scene(name)):
        shape = draw.ellipse if number % 2 else draw.rectangle
        shape(thing["bbox"], fill=NAMES[thing["class_name"]], outline="black")
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    return encoded.getvalue()


COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (36, 82, 214),
    "yellow": (240, 200, 30),
    "purple": (140, 50, 170),
    "black": (25, 25, 25),
}
KINDS = ("circle", "square", "triangle", "cross", "ring")
SIZES = {"train": 4000, "test": 160}  # samples; pairs of shapes: 696 and 174
HELD_OUT = 5  # one of so many pairs is the test split's
VERSION = 1  # of drawing and wording

Shape: TypeAlias = tuple[str, str]  # colour and kind
Scene: TypeAlias = tuple[Shape, Shape]  # left and right


class ShapeOptions(Options):
    """Options of `shapes`.

    Args:
        as: `caption`: a conversation that describes the image; `chat`: one of questions about
            it; `find`: its caption, which finds the image; `name`: the image, which finds its
            caption; `answer`: image and question, which find the answer.
        negatives: of `find` and `name`: hard negatives of each sample, images or captions that
            differ in one word or in the order.
        size: width and height of images.
    """

    kind: Literal["caption", "chat", "find", "name", "answer"] = Field("chat", alias="as")
    negatives: int = Field(0, ge=0, le=3)
    size: tuple[int, int] = (64, 64)


class Scenes:
    """A row for each sample of a split.

    Raises:
        TrainError: there is no such split.
    """

    def __init__(self, split: str, root: Path, options: ShapeOptions) -> None:
        if split not in SIZES:
            raise TrainError(f"the path is {split!r}, expected one of {', '.join(SIZES)}")
        self.split = split
        self.scenes = pairs(split)

    def __len__(self) -> int:
        return SIZES[self.split]

    def __getitem__(self, number: int) -> Row:
        scene = self.scenes[number % len(self.scenes)]
        return {"id": self.where(number), "split": self.split, "scene": scene}

    def where(self, number: int) -> str:
        return f"{self.split}-{number}"


def pairs(split: str) -> list[Scene]:
    """Return a split's pairs of shapes, in an order that mixes them."""
    shapes = [(colour, kind) for colour in COLOURS for kind in KINDS]
    scenes = [(left, right) for left in shapes for right in shapes if left != right]
    random.Random("shapes").shuffle(scenes)
    test = split == "test"
    return [scene for number, scene in enumerate(scenes) if (number % HELD_OUT == 0) == test]


def shape_sample(row: Row, place: Place, options: ShapeOptions) -> Sample:
    """Return the sample of a row."""
    scene, id, kind = row["scene"], row["id"], options.kind
    draw = random.Random(f"{VERSION}/{id}")
    picture = picture_of(scene, id, options.size)
    if kind == "caption":
        return Conversation(id, _talk(picture, [("Describe the picture.", caption(scene))]))
    if kind == "chat":
        asked = draw.sample(list(questions(scene)), 2)
        return Conversation(id, _talk(picture, asked))
    if kind == "answer":
        question, answer = draw.choice(list(questions(scene)))
        return ContrastiveExample(id, Prompt.of([picture, Text(question)]), Prompt.of(answer))
    wrong = list(near(scene, draw))[: options.negatives]
    if kind == "name":
        texts = tuple(Prompt.of(caption(one)) for one in wrong)
        return ContrastiveExample(id, Prompt.of(picture), Prompt.of(caption(scene)), texts)
    pictures = tuple(
        Prompt.of(picture_of(one, f"{id}-{number}", options.size))
        for number, one in enumerate(wrong)
    )
    # Another picture of the same scene is no negative, whatever its shades.
    return ContrastiveExample(
        id, Prompt.of(caption(scene)), Prompt.of(picture), pictures, caption(scene)
    )


def caption(scene: Scene) -> str:
    """Return a scene in words."""
    left, right = (f"a {colour} {kind}" for colour, kind in scene)
    return f"{left} left of {right}"


def questions(scene: Scene) -> Iterator[tuple[str, str]]:
    """Yield questions about a scene and their answers."""
    for side, (colour, kind) in zip(("left", "right"), scene, strict=True):
        yield f"What is on the {side}?", f"a {colour} {kind}"
        yield f"Which colour is on the {side}?", colour
        yield f"Which shape is on the {side}?", kind


def near(scene: Scene, draw: random.Random) -> Iterator[Scene]:
    """Yield scenes that are almost this one: turned round, of another colour, another shape."""
    (colour, kind), right = scene
    yield right, (colour, kind)
    yield (draw.choice([one for one in COLOURS if one != colour]), kind), right
    yield (colour, draw.choice([one for one in KINDS if one != kind])), right


def picture_of(scene: Scene, id: str, size: tuple[int, int] = (64, 64)) -> Image:
    """Return a scene's image, drawn when it is read; `id` settles shades and places."""
    return Image(Stored(f"shapes/{id}-{size[0]}x{size[1]}", partial(drawn, scene, id, size)))


def drawn(scene: Scene, id: str, size: tuple[int, int]) -> bytes:
    """Return a scene as a PNG file."""
    draw = random.Random(f"{VERSION}/{id}/drawing")
    ground = draw.randint(190, 245)
    image = pil.new("RGB", size, (ground, ground, ground - draw.randint(0, 25)))
    pen = ImageDraw.Draw(image)
    width, height = size
    for place, (colour, kind) in enumerate(scene):
        radius = min(width / 2, height) * draw.uniform(0.26, 0.4)
        x = width * (0.25 + 0.5 * place) + draw.uniform(-0.1, 0.1) * radius
        y = height * draw.uniform(0.35, 0.65)
        shade = tuple(max(0, min(255, value + draw.randint(-22, 22))) for value in COLOURS[colour])
        _draw(pen, kind, x, y, radius, shade)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _draw(
    pen: ImageDraw.ImageDraw, kind: str, x: float, y: float, r: float, fill: tuple[int, ...]
) -> None:
    box = (x - r, y - r, x + r, y + r)
    if kind == "circle":
        pen.ellipse(box, fill=fill)
    elif kind == "square":
        pen.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill=fill)
    elif kind == "triangle":
        pen.polygon([(x, y - r), (x - r, y + 0.8 * r), (x + r, y + 0.8 * r)], fill=fill)
    elif kind == "cross":
        pen.rectangle((x - r, y - r / 4, x + r, y + r / 4), fill=fill)
        pen.rectangle((x - r / 4, y - r, x + r / 4, y + r), fill=fill)
    else:
        pen.ellipse(box, outline=fill, width=max(1, round(r / 3)))


def _talk(picture: Image, asked: list[tuple[str, str]]) -> Prompt:
    messages = []
    for number, (question, answer) in enumerate(asked):
        parts = (picture, Text(question)) if number == 0 else (Text(question),)
        messages += [Message("user", parts), Message("assistant", (Text(answer),))]
    return Prompt(tuple(messages))
