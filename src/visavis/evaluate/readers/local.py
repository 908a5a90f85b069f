"""The user's own data, in four shapes that are told by their columns.

    pairs           query_text, query_image, target_text, target_image (some of them; also
                    query_instruction, target_instruction), or image and caption: both directions
    retrieval       a folder with queries, corpus and qrels (BEIR)
    questions       image, question, answer (or answers); with options: multiple choice
    classification  image, label; or a folder with a folder of images for each class

Tables are CSV, TSV, JSON lines, JSON or parquet; image paths start at the table's folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from visavis.errors import InputError
from visavis.evaluate.items import CandidateSet, Item, MissingFilesError, Problem, RetrievalData
from visavis.evaluate.metrics import Relevant
from visavis.evaluate.readers import beir
from visavis.evaluate.suite import Suite, Task
from visavis.evaluate.tables import SUFFIXES, iterate_rows
from visavis.evaluate.vqa.data import Question, VqaData
from visavis.inputs import VIDEO_SUFFIXES, Image, Stored, Video
from visavis.processing.media import find_images

WORD = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SHAPES = (
    "query_text/query_image with target_text/target_image; image with caption; image, question and "
    "answer; image with label; a folder with queries, corpus and qrels; or a folder of images for "
    "each class"
)
Row = dict[str, Any]


def discover(path: Path) -> Suite:
    """Return a suite of the tasks that a file or folder holds.

    Raises:
        InputError: it holds none; the message lists the shapes.
    """
    tasks: dict[str, Task] = {}
    if path.is_file():
        tasks |= _table(path, path.stem)
    elif all(beir.part_files(path, part) for part in beir.PARTS):
        options = {"folders": ["."], "image_folders": [".", "images"]}
        tasks[path.name] = Task(path.name, "local-beir", "ndcg_linear@10", options=options)
    elif path.is_dir():
        for file in sorted(path.iterdir()):
            if file.suffix in SUFFIXES:
                tasks |= _table(file, file.stem)
        if not tasks and any(folder.is_dir() for folder in path.iterdir()):
            tasks[path.name] = Task(path.name, "local-folders", "hit@1", options={"at": str(path)})
    if not tasks:
        raise InputError(f"{path} holds no data of a known shape: {SHAPES}")
    return Suite("local", f"Own data in {path.name}", tasks)


def _table(path: Path, name: str) -> dict[str, Task]:
    """Return the tasks of a table, by the columns of its first row."""
    row = next(iterate_rows([path]), None)
    if row is None:
        raise InputError(f"{path} holds no rows")
    columns, options = set(row), {"at": str(path)}
    if "question" in columns and columns & {"answer", "answers"}:
        scorer = "choice" if columns & {"options", "choices"} else "short"
        return {
            name: Task(name, "local-questions", "accuracy", options=options | {"scorer": scorer})
        }
    if columns & {"query_text", "query_image"} and columns & {"target_text", "target_image"}:
        return {name: Task(name, "local-pairs", "hit@1", options=options)}
    if "image" in columns and "label" in columns:
        return {name: Task(name, "local-labels", "hit@1", options=options)}
    if "image" in columns and columns & {"caption", "captions"}:
        return {
            f"{name} {form}": Task(
                f"{name} {form}", "local-captions", "hit@1", options=options | {"form": form}
            )
            for form in ("text-to-image", "image-to-text")
        }
    raise InputError(f"{path.name} has the columns {', '.join(sorted(columns))}, expected {SHAPES}")


def read_retrieval(task: Task, root: Path, *, compat: str = "corrected") -> RetrievalData:
    """Return the queries and candidates of one of the user's tables or folders.

    Raises:
        InputError: it cannot be read.
    """
    if task.reader == "local-beir":
        return beir.read(task, root)
    return READERS[task.reader](task)


def _pairs(task: Task) -> RetrievalData:
    def make(row: Row, base: Path) -> list[tuple[Item, Item]]:
        return [(_item(row, "query", base), _item(row, "target", base))]

    return _matched(task, make)


def _captions(task: Task) -> RetrievalData:
    def make(row: Row, base: Path) -> list[tuple[Item, Item]]:
        image = Item("", (_visual(row.get("image"), base),))
        texts = _list(row.get("captions") or row.get("caption"))
        if not texts:
            raise InputError("it has no caption")
        if task.get("form") == "text-to-image":
            return [(Item(text), image) for text in texts]
        return [(image, Item(text)) for text in texts]

    return _matched(task, make)


def _matched(task: Task, make: Callable[[Row, Path], list[tuple[Item, Item]]]) -> RetrievalData:
    """Return pairs of query and target as a task: a query's targets are all it is paired with."""
    path = Path(task.get("at"))
    data, targets = RetrievalData(sources=[path]), CandidateSet()
    wanted: dict[Item, dict[int, float]] = {}
    ids: dict[Item, str] = {}
    for number, row in enumerate(iterate_rows([path])):
        name = str(row.get("id") or number + 1)
        try:
            for query, target in make(row, path.parent):
                place = targets.add(target, str(row.get("id") or len(targets.items) + 1))
                wanted.setdefault(query, {})[place] = 1.0
                ids.setdefault(query, name)
        except InputError as error:
            data.problems.append(Problem(f"{path.name}, record {name}", str(error)))
    data.queries, data.query_ids = list(wanted), list(ids.values())
    data.relevant = [Relevant.of(grades) for grades in wanted.values()]
    data.candidates, data.candidate_ids = targets.items, targets.ids
    return data


def _labels(task: Task) -> RetrievalData:
    path = Path(task.get("at"))
    pairs, problems = [], []
    for number, row in enumerate(iterate_rows([path])):
        name = str(row.get("id") or number + 1)
        try:
            label = str(row.get("label") or "").strip()
            if not label:
                raise InputError("it has no label")
            pairs.append((name, Item("", (_visual(row.get("image"), path.parent),)), label))
        except InputError as error:
            problems.append(Problem(f"{path.name}, record {name}", str(error)))
    return _classified(pairs, problems, [path])


def _folders(task: Task) -> RetrievalData:
    root = Path(task.get("at"))
    pairs = [
        (str(path.relative_to(root)), Item("", (Image(path),)), path.relative_to(root).parts[0])
        for path in find_images(root)
        if path.parent != root
    ]
    if not pairs:
        raise MissingFilesError(f"no images in the folders of {root}, expected a folder a class")
    return _classified(pairs, [], [])


def _classified(
    pairs: list[tuple[str, Item, str]], problems: list[Problem], sources: list[Path]
) -> RetrievalData:
    names = sorted({label for _, _, label in pairs})
    places = {name: number for number, name in enumerate(names)}
    return RetrievalData(
        queries=[item for _, item, _ in pairs],
        query_ids=[name for name, _, _ in pairs],
        candidates=[Item(name.replace("_", " ")) for name in names],
        candidate_ids=names,
        relevant=[Relevant.of({places[label]: 1.0}) for _, _, label in pairs],
        problems=problems,
        sources=sources,
    )


def questions(task: Task, root: Path) -> VqaData:
    """Return the questions of one of the user's tables, with LLaVA's suffixes."""
    path = Path(task.get("at"))
    data = VqaData(sources=[path])
    for number, row in enumerate(iterate_rows([path])):
        name = str(row.get("id") or number + 1)
        try:
            images = (_image(row["image"], path.parent),) if row.get("image") else ()
            data.questions.append(_question(name, row, images))
        except InputError as error:
            data.problems.append(Problem(f"{path.name}, record {name}", str(error)))
    return data


def _question(name: str, row: Row, images: tuple[Image, ...]) -> Question:
    asked = str(row.get("question") or "").strip()
    truths = _list(row.get("answers") or row.get("answer"))
    options = _list(row.get("options") or row.get("choices"))
    if not asked or not truths:
        raise InputError(f"it has no {'answer' if asked else 'question'}")
    if not options:
        return Question(name, f"{asked}\n{WORD}", images, {"answers": truths})
    letters = LETTERS[: len(options)]
    right = truths[0]
    if right not in options and not (len(right) == 1 and right in letters):
        raise InputError(f"its answer {right!r} is none of its options {options}")
    letter = letters[options.index(right)] if right in options else right
    lines = [f"{mark}. {option}" for mark, option in zip(letters, options, strict=True)]
    text = "\n".join([asked, *lines, LETTER])
    return Question(name, text, images, {"answer": letter, "letters": letters, "options": options})


def _item(row: Row, side: str, base: Path) -> Item:
    text = str(row.get(f"{side}_text") or "")
    image = row.get(f"{side}_image")
    if not text and not image:
        raise InputError(f"it has neither {side}_text nor {side}_image")
    visuals = (_visual(image, base),) if image else ()
    return Item(text, visuals, str(row.get(f"{side}_instruction") or ""))


def _visual(value: Any, base: Path) -> Image | Video:
    if isinstance(value, str) and Path(value).suffix.lower() in VIDEO_SUFFIXES:
        return Video(_there(value, base))
    return _image(value, base)


def _image(value: Any, base: Path) -> Image:
    if isinstance(value, Stored | bytes):
        return Image(value)
    if not isinstance(value, str) or not value:
        raise InputError(f"its image is {value!r}, expected a path")
    return Image(_there(value, base))


def _there(name: str, base: Path) -> Path:
    path = base / Path(name).expanduser()
    if not path.is_file():
        raise InputError(f"{name} is missing, looked for {path}")
    return path


def _list(value: Any) -> list[str]:
    """Return a list of texts: one as it is, one in JSON, or several apart by "|"."""
    if value is None or value == "":
        return []
    if isinstance(value, str):
        if value.startswith("["):
            try:
                return [str(one) for one in json.loads(value)]
            except ValueError:
                return [value]
        return [part.strip() for part in value.split("|")]
    return [str(one) for one in value] if isinstance(value, list | tuple) else [str(value)]


READERS: dict[str, Callable[[Task], RetrievalData]] = {
    "local-pairs": _pairs,
    "local-captions": _captions,
    "local-labels": _labels,
    "local-folders": _folders,
}
