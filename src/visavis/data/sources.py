"""The data sets by name: which files, and which field is caption, question or label.

A source is a function from a data folder to records. Adding one is a function and a line in
`SOURCES`. Training recipes may name only sources whose name does not end in an evaluation split.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from visavis.data.records import Record, read_shards
from visavis.errors import TrainError
from visavis.prompt import Image, Stored, Video
from visavis.registry import lookup

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

    Training makes features for them from the tower's own classifier (`train/classes.py`).
    """
    lines = (Path(__file__).parent / "imagenet_classes.tsv").read_text(encoding="utf-8")
    for number, line in enumerate(lines.splitlines()):
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
