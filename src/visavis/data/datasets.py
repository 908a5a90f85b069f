"""How records are put into words: questions about an image, and texts that it should be found by.

Knows wording and drawing order; no tokens and no files.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from visavis.data.kinds import kinds_of, with_article, with_presence
from visavis.data.tar_shards import read_shards
from visavis.errors import TrainError
from visavis.inputs import Image, Stored, Video
from visavis.utils import lookup

ASK_SHORT = (
    "What is in this picture?",
    "What is this?",
    "What does the image show?",
    "What do you see?",
    "Name what is in the picture.",
    "Give this image a short title.",
)
ASK_LONG = (
    "Describe this picture.",
    "Describe the image.",
    "What does this picture show? Describe it.",
    "Write a description of this image.",
    "Describe what you see in the picture.",
)
LONG_WORDS = 9  # captions of more words answer ASK_LONG
_SENTENCE_END = re.compile(r"(?<=[.!?;])\s+(?=[A-Z0-9(“\"])")


def sentences(text: str) -> list[str]:
    """Return the sentences of a text."""
    return [piece.strip() for piece in _SENTENCE_END.split(text) if piece.strip()]


def shorten(text: str, max_words: int) -> str:
    """Return the first sentences that fit, at least one, itself cut at a word if need be."""
    kept: list[str] = []
    for sentence in sentences(text):
        if kept and len(" ".join([*kept, sentence]).split()) > max_words:
            break
        kept.append(sentence)
    words = " ".join(kept).split()
    return " ".join(words[:max_words])


def chat_pairs(
    record: Record,
    draw: random.Random,
    *,
    questions_per_example: int,
    max_caption_words: int,
    general: float = 0.0,
) -> list[list[tuple[str, str]]]:
    """Return the conversations a record gives: its questions in random groups, its caption.

    A group never asks for what an earlier answer of it gives away more than needed: order is
    random, so each question also comes first, where only the image can answer it. `general` is the
    share of names that are replaced by their kind.
    """
    questions = list(record.questions)
    draw.shuffle(questions)
    starts = range(0, len(questions), questions_per_example)
    groups = [questions[start : start + questions_per_example] for start in starts]
    if record.label:
        name, kinds = record.label, kinds_of(record)
        if kinds and draw.random() < general:
            name = kinds[0]
        groups.append([(draw.choice(ASK_SHORT), f"A photo of {with_article(name)}.")])
    elif record.caption:
        answer = shorten(record.caption, max_caption_words)
        asked = ASK_LONG if len(answer.split()) > LONG_WORDS else ASK_SHORT
        groups.append([(draw.choice(asked), answer)])
    return groups


def text_to_match(record: Record, draw: random.Random) -> str:
    """Return one text of a record: mostly its caption or a part of it, sometimes another."""
    chance = draw.random()
    if record.also and (chance < 0.2 or not record.caption):
        return draw.choice(record.also)
    parts = sentences(record.caption)
    if chance < 0.6 or len(parts) <= 1:
        return record.caption
    start = draw.randrange(len(parts))
    return " ".join(parts[start : start + draw.randint(1, 2)])


@dataclass(frozen=True)
class Record:
    """An image and its texts.

    Args:
        key: unique within its source; named in error messages.
        image: the file's bytes, or where they are; empty where there is no image.
        caption: what the image shows, the text to generate and to retrieve by; may be empty.
        also: other texts that describe it as well (a title, keywords): extra positives.
        questions: (question, answer) pairs, each answerable from the image alone.
        label: class name, for zero-shot evaluation; `group` is its coarser class.
        captions: every reference caption, where there are several.
    """

    key: str
    image: bytes | Stored
    caption: str = ""
    also: tuple[str, ...] = ()
    questions: tuple[tuple[str, str], ...] = ()
    label: str = ""
    group: str = ""
    captions: tuple[str, ...] = ()


NO_PICTURE = b"no picture of class"  # stands where features are made without one


def openstax(root: Path, split: str) -> Iterator[Record]:
    """Textbook figures; the alt text is the caption, the printed caption an extra positive."""
    for key, fields, image in read_shards(_shards(root / "openstax-figures", split)):
        also = tuple(text for text in (fields["caption"], fields["title"]) if text)
        yield Record(key, image, caption=fields["alt"], also=also)


def tuxpaint(root: Path, split: str) -> Iterator[Record]:
    """Cut-out stamps with one sentence."""
    for key, fields, image in part_of(root, "tuxpaint-stamps", split, tenth=True):
        yield Record(key, image, caption=fields["caption"])


def emoji(root: Path, split: str) -> Iterator[Record]:
    """Drawn pictograms with a name and keywords."""
    for key, fields, image in read_shards(_shards(root / "fluent-emoji", "train")):
        family = fields["label"].split(":")[0]  # skin tones stay together
        if (_digest(family) % 10 == 0) != (split == "val"):
            continue
        also = (f"{fields['label']}: {', '.join(fields['tags'])}",) if fields["tags"] else ()
        yield Record(key, image, caption=fields["label"], also=also)


def openclipart(root: Path, split: str) -> Iterator[Record]:
    """Clip art with a title, keywords and sometimes a description."""
    for key, fields, image in part_of(root, "openclipart", split, tenth=True):
        also = (", ".join(fields["keywords"]), fields["description"])
        yield Record(key, image, caption=fields["title"], also=tuple(filter(None, also)))


def grocery(root: Path, split: str) -> Iterator[Record]:
    """Photos of groceries; the class name is the label."""
    shards = _shards(root / "grocery-store", "test" if split == "test" else "train")
    for key, fields, image in read_shards(shards):
        if split != "test" and (_digest_of(image) % 10 == 0) != (split == "val"):
            continue
        name = fields["class_name"].replace("-", " ")
        group = fields["coarse_class"].replace("-", " ")
        yield Record(
            key, image, caption=f"a photo of {name}", also=(name,), label=name, group=group
        )


def vqa_rad(root: Path, split: str) -> Iterator[Record]:
    """Radiology images with questions of clinicians."""
    for key, fields, image in read_shards(_shards(root / "vqa-rad", split)):
        questions = tuple(
            (qa["question"].strip(), str(qa["answer"]).strip()) for qa in fields["qa"]
        )
        yield Record(key, image, questions=questions)


def nlvr(root: Path, split: str) -> Iterator[Record]:
    """Drawn scenes with a statement that is true or false."""
    for key, fields, image in read_shards(_shards(root / "nlvr", split)):
        question = f"True or false: {fields['statement'].strip()}"
        yield Record(key, image, questions=((question, "true" if fields["label"] else "false"),))


def openstax_photos(root: Path, split: str) -> Iterator[Record]:
    """Photos of more textbooks; the alt text is the caption."""
    for key, fields, image in part_of(root, "openstax-figures-2", split, tenth=True):
        yield Record(key, image, caption=fields["alt"])


def coco_open(root: Path, split: str) -> Iterator[Record]:
    """Everyday photos with five captions; all of them are for validation."""
    for key, fields, image in read_shards(_shards(root / "coco-open", "train")):
        captions = tuple(fields["captions"])
        if captions:
            yield Record(key, image, caption=captions[0], captions=captions)


def caltech(root: Path, split: str) -> Iterator[Record]:
    """Object photos with class names; a quarter of the classes is held out whole."""
    for key, fields, image in read_shards(_shards(root / "caltech101", "train")):
        name = fields["class_name"]
        new = _digest(f"class {name}") % 4 == 0
        part = "val-new" if new else "val" if _digest_of(image) % 10 == 0 else "train"
        if part == split:
            yield _named(key, image, CALTECH_NAMES.get(name, name))


def pets(root: Path, split: str) -> Iterator[Record]:
    """Cats and dogs of 37 breeds."""
    for key, fields, image in part_of(root, "oxford-pets", split):
        species = fields["species"]
        yield _named(key, image, f"{fields['class_name']} {species}", group=species)


def named_photos(root: Path, split: str, *, folder: str) -> Iterator[Record]:
    """Photos with a class name."""
    for key, fields, image in part_of(root, folder, split):
        yield _named(key, image, fields["class_name"])


def recipes_food(root: Path, split: str) -> Iterator[Record]:
    """Dishes with the titles of their recipes."""
    for key, fields, image in part_of(root, "recipes-food", split):
        name = fields["class_name"]
        also = (f"a photo of {with_article(name)}",)
        yield Record(key, image, caption=fields["title"], also=also, label=name)


def phrased(root: Path, split: str, *, folder: str) -> Iterator[Record]:
    """Photos with a short phrase."""
    for key, fields, image in part_of(root, folder, split, tenth=folder == "trashnet"):
        text = fields["phrase"]
        yield Record(key, image, caption=f"a photo of {text}", also=(text,))


def parks(root: Path, split: str) -> Iterator[Record]:
    """Landscapes of national parks; the caption names the place."""
    for key, fields, image in part_of(root, "us-national-parks", split):
        yield Record(key, image, caption=fields["caption"])


def sports_cars(root: Path, split: str) -> Iterator[Record]:
    """Sports cars with their colour."""
    for key, fields, image in part_of(root, "lire-sports-cars", split, tenth=True):
        text = f"a photo of a {fields['colour']} sports car"
        yield Record(key, image, caption=text, also=("a sports car",))


CALTECH_NAMES = {"faces": "face", "car side": "car"}
Part = tuple[str, dict[str, Any], Stored]


def part_of(root: Path, folder: str, split: str, *, tenth: bool = False) -> Iterator[Part]:
    """Yield the records of a set without a split of its own that belong to a part.

    The sha256 of the image's file decides: every fifth (or tenth) is for validation.
    """
    for key, fields, image in read_shards(_shards(root / folder, "train")):
        held_out = _digest_of(image) % (10 if tenth else 5) == 0
        if held_out == (split == "val"):
            yield key, fields, image


def _digest(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def _digest_of(image: Stored) -> int:
    return _digest(hashlib.sha256(image.read()).hexdigest())


def _named(key: str, image: Stored, name: str, *, group: str = "") -> Record:
    caption = f"a photo of {with_article(name)}"
    also = (name, f"a photo of a {group}") if group else (name,)
    return Record(key, image, caption=caption, also=also, label=name, group=group)


def coco_mini(root: Path, split: str) -> Iterator[Record]:
    """COCO photos with five captions each; evaluation only."""
    for key, fields, image in read_shards(_shards(root / "coco-mini", split)):
        captions = tuple(fields["captions"])
        yield Record(key, image, caption=captions[0], captions=captions)


def easy_vqa(root: Path, split: str) -> Iterator[Record]:
    """Questions about one drawn shape, from the package `easy-vqa`; `root` is not used."""
    try:
        import easy_vqa as package
    except ImportError as error:
        raise TrainError(
            "the source 'easy-vqa' needs the package easy-vqa; install it with "
            "`pip install 'visavis[train]'`."
        ) from error
    folder = Path(package.__file__).parent / "data" / split
    questions: dict[int, list[tuple[str, str]]] = {}
    for question, answer, number in json.loads((folder / "questions.json").read_text()):
        questions.setdefault(number, []).append((question, answer))
    for number, pairs in sorted(questions.items()):
        path = folder / "images" / f"{number}.png"
        image = Stored(str(path), path.read_bytes)
        yield Record(f"{split}/{number}", image, caption=drawn_shape(pairs), questions=tuple(pairs))


SHAPES = frozenset({"rectangle", "circle", "triangle"})
COLOURS = frozenset({"teal", "black", "green", "blue", "gray", "yellow", "red", "brown"})


def drawn_shape(pairs: Sequence[tuple[str, str]]) -> str:
    """Return "a blue circle" if questions and answers about a drawn shape tell both, else ""."""
    known: set[str] = set()
    for question, answer in pairs:
        words = set(question.rstrip("?").split())
        if answer not in ("yes", "no"):
            known |= {answer, *words}
        elif (answer == "yes") != bool(words & {"not", "no"}):
            known |= words
    shape, colour = known & SHAPES, known & COLOURS
    return f"a {colour.pop()} {shape.pop()}" if len(shape) == len(colour) == 1 else ""


def imagenet_classes(root: Path, split: str) -> Iterator[Record]:
    """The names and definitions (WordNet) of the classes the tower was trained on; no images.

    Training makes features for them from the tower's own classifier.
    """
    lines = (Path(__file__).parent / "imagenet_classes.tsv").read_text(encoding="utf-8")
    for number, line in enumerate(lines.rstrip("\n").split("\n")):
        names, definition = line.split("\t")
        name = names.split(",")[0].strip()
        article = "an" if name[0].lower() in "aeiou" else "a"
        yield Record(
            f"class-{number}",
            b"%s %d" % (NO_PICTURE, number),  # what its made features are filed under
            caption=f"a photo of {article} {name}",
            also=(f"{names}: {definition}",),
            label=name,
        )


SOURCES: dict[str, tuple[Callable[[Path, str], Iterator[Record]], str]] = {
    "openstax-figures": (openstax, "train"),
    "openstax-figures/val": (openstax, "val"),
    "tuxpaint-stamps": (tuxpaint, "train"),
    "fluent-emoji": (emoji, "train"),
    "openclipart": (openclipart, "train"),
    "grocery-store": (grocery, "train"),
    "grocery-store/test": (grocery, "test"),
    "vqa-rad": (vqa_rad, "train"),
    "nlvr": (nlvr, "train"),
    "imagenet-classes": (imagenet_classes, "train"),
    "coco-mini/val": (coco_mini, "val"),
    "coco-open/val": (coco_open, "val"),
    "openstax-figures-2": (openstax_photos, "train"),
    "openstax-figures-2/val": (openstax_photos, "val"),
    "caltech101": (caltech, "train"),
    "caltech101/val": (caltech, "val"),
    "caltech101/val-new": (caltech, "val-new"),
    "oxford-pets": (pets, "train"),
    "oxford-pets/val": (pets, "val"),
    "recipes-food": (recipes_food, "train"),
    "recipes-food/val": (recipes_food, "val"),
    "us-national-parks": (parks, "train"),
    "us-national-parks/val": (parks, "val"),
    "lire-sports-cars": (sports_cars, "train"),
    "lire-sports-cars/val": (sports_cars, "val"),
    "tuxpaint-stamps/val": (tuxpaint, "val"),
    "fluent-emoji/val": (emoji, "val"),
    "openclipart/val": (openclipart, "val"),
    "grocery-store/val": (grocery, "val"),
    "easy-vqa": (easy_vqa, "train"),
    "easy-vqa/test": (easy_vqa, "test"),
}
for _folder in ("commons-animals", "gcompris-pictures", "misc-open-photos", "tf-flowers"):
    SOURCES[_folder] = (partial(named_photos, folder=_folder), "train")
    SOURCES[f"{_folder}/val"] = (partial(named_photos, folder=_folder), "val")
for _folder in ("scratch-backgrounds", "trashnet"):
    SOURCES[_folder] = (partial(phrased, folder=_folder), "train")
    SOURCES[f"{_folder}/val"] = (partial(phrased, folder=_folder), "val")
TRAINING_SOURCES = tuple(name for name in SOURCES if "/" not in name)


def load_source(name: str, root: Path) -> list[Record]:
    """Return every record of a source.

    Raises:
        UnknownNameError: no source has this name.
        TrainError: its files are absent or damaged.
    """
    read, split = lookup("data source", name, SOURCES)
    return with_presence(list(read(root, split)))


def is_made(visual: Image | Video) -> bool:
    """Return whether an image's features are made without it."""
    return isinstance(visual.source, bytes) and visual.source.startswith(NO_PICTURE)


def _shards(folder: Path, split: str) -> list[Path]:
    found = sorted(folder.glob(f"{split}*-*.tar"))
    if not found:
        raise TrainError(
            f"no {split}*-*.tar in {folder}; expected the shards of this data set. Give the folder "
            "that holds the data sets with --data."
        )
    return found
