"""How records are put into words: questions about a picture, and texts that it should be found by.

Knows wording and drawing order; no tokens and no files.
"""

from __future__ import annotations

import json
import random
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from visavis.errors import TrainError
from visavis.inputs import Image, Stored, Video
from visavis.utils import lookup, parse_json

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
    record: Record, draw: random.Random, *, questions_per_example: int, max_caption_words: int
) -> list[list[tuple[str, str]]]:
    """Return the conversations a record gives: its questions in random groups, its caption.

    A group never asks for what an earlier answer of it gives away more than needed: order is
    random, so each question also comes first, where only the picture can answer it.
    """
    questions = list(record.questions)
    draw.shuffle(questions)
    starts = range(0, len(questions), questions_per_example)
    groups = [questions[start : start + questions_per_example] for start in starts]
    if record.label:
        groups.append([(draw.choice(ASK_SHORT), record.label)])
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


def members(path: Path) -> Iterator[tuple[str, Stored]]:
    """Yield name and bytes-to-be of every file in a tar, in its order.

    Raises:
        TrainError: it cannot be read, or is compressed.
    """
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                if member.isreg():
                    read = partial(read_span, path, member.offset_data, member.size)
                    yield member.name, Stored(f"{path}: {member.name}", read)
    except (OSError, tarfile.TarError) as error:
        raise TrainError(
            f"cannot read {path}: {error}. Expected a tar that is not compressed, of key.jpg and "
            "key.json pairs; the copy is probably incomplete, copy it again."
        ) from error


def read_span(path: Path, start: int, size: int) -> bytes:
    """Return a piece of a file.

    Raises:
        TrainError: the file is gone, or shorter than it was.
    """
    try:
        with path.open("rb") as file:
            file.seek(start)
            content = file.read(size)
    except OSError as error:
        raise TrainError(f"cannot read {path}: {error}; was it moved while in use?") from error
    if len(content) != size:
        raise TrainError(
            f"{path} ends after {start + len(content)} bytes, expected at least {start + size}: it "
            "was changed or cut while in use; copy it again."
        )
    return content


IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp"})


@dataclass(frozen=True)
class Record:
    """A picture and its texts.

    Args:
        key: unique within its source; named in error messages.
        image: the file's bytes, or where they are; empty where there is no picture.
        caption: what the picture shows, the text to generate and to retrieve by; may be empty.
        also: other texts that describe it as well (a title, keywords): extra positives.
        questions: (question, answer) pairs, each answerable from the picture alone.
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


def read_shards(paths: Sequence[Path]) -> Iterator[tuple[str, dict[str, Any], Stored]]:
    """Yield (key, fields, picture) of every record, in the order of the shards.

    Raises:
        TrainError: a shard cannot be read, or a picture and its fields do not come in pairs.
    """
    for path in paths:
        waiting: dict[str, dict[str, Stored]] = {}
        for name, file in members(path):
            key, _, suffix = name.rpartition(".")
            if suffix != "json" and suffix not in IMAGE_SUFFIXES:
                continue
            kind = "json" if suffix == "json" else "image"
            parts = waiting.setdefault(key, {})
            parts[kind] = file
            if len(parts) == 2:
                try:
                    fields = parse_json(parts["json"].read())
                except ValueError as error:
                    raise TrainError(
                        f"cannot read {path}: {key}.json is not JSON ({error}); the copy is "
                        "probably incomplete, copy it again."
                    ) from error
                yield key, fields, parts["image"]
                del waiting[key]
        if waiting:
            raise TrainError(
                f"{path}: {len(waiting)} records lack their picture or their fields, the first is "
                f"{next(iter(waiting))!r}; the tar is incomplete, copy it again."
            )


NO_PICTURE = b"no picture of class"  # stands where features are made without one


def openstax(root: Path, split: str) -> Iterator[Record]:
    """Textbook figures; the alt text is the caption, the printed caption an extra positive."""
    for key, fields, image in read_shards(_shards(root / "openstax-figures", split)):
        also = tuple(text for text in (fields["caption"], fields["title"]) if text)
        yield Record(key, image, caption=fields["alt"], also=also)


def tuxpaint(root: Path, split: str) -> Iterator[Record]:
    """Cut-out stamps with one sentence."""
    for key, fields, image in read_shards(_shards(root / "tuxpaint-stamps", split)):
        yield Record(key, image, caption=fields["caption"])


def emoji(root: Path, split: str) -> Iterator[Record]:
    """Drawn pictograms with a name and keywords."""
    for key, fields, image in read_shards(_shards(root / "fluent-emoji", split)):
        also = (f"{fields['label']}: {', '.join(fields['tags'])}",) if fields["tags"] else ()
        yield Record(key, image, caption=fields["label"], also=also)


def openclipart(root: Path, split: str) -> Iterator[Record]:
    """Clip art with a title, keywords and sometimes a description."""
    for key, fields, image in read_shards(_shards(root / "openclipart", split)):
        also = (", ".join(fields["keywords"]), fields["description"])
        yield Record(key, image, caption=fields["title"], also=tuple(filter(None, also)))


def grocery(root: Path, split: str) -> Iterator[Record]:
    """Photos of groceries; the class name is the label."""
    for key, fields, image in read_shards(_shards(root / "grocery-store", split)):
        name = fields["class_name"].replace("-", " ")
        group = fields["coarse_class"].replace("-", " ")
        yield Record(
            key, image, caption=f"a photo of {name}", also=(name,), label=name, group=group
        )


def vqa_rad(root: Path, split: str) -> Iterator[Record]:
    """Radiology pictures with questions of clinicians."""
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
        yield Record(f"{split}/{number}", image, questions=tuple(pairs))


def imagenet_classes(root: Path, split: str) -> Iterator[Record]:
    """The names and definitions (WordNet) of the classes the tower was trained on; no pictures.

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
    "easy-vqa": (easy_vqa, "train"),
    "easy-vqa/test": (easy_vqa, "test"),
}
TRAINING_SOURCES = tuple(name for name in SOURCES if "/" not in name)


def load_source(name: str, root: Path) -> list[Record]:
    """Return every record of a source.

    Raises:
        UnknownNameError: no source has this name.
        TrainError: its files are absent or damaged.
    """
    read, split = lookup("data source", name, SOURCES)
    return list(read(root, split))


def is_made(visual: Image | Video) -> bool:
    """Return whether a picture's features are made without it."""
    return isinstance(visual.source, bytes) and visual.source.startswith(NO_PICTURE)


def _shards(folder: Path, split: str) -> list[Path]:
    found = sorted(folder.glob(f"{split}*-*.tar"))
    if not found:
        raise TrainError(
            f"no {split}*-*.tar in {folder}; expected the shards of this data set. Give the folder "
            "that holds the data sets with --data."
        )
    return found
