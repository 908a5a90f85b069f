"""Retrieval and zero-shot classification on the data sets that nano is tested on.

`<data>/<set>/<split>-*.tar` hold images with captions or class names; see `visavis.data.datasets`.
"""

from __future__ import annotations

from pathlib import Path

from visavis.data.datasets import Record, load_source
from visavis.errors import TrainError
from visavis.evaluate.items import CandidateSet, Item, MissingFilesError, Problem, RetrievalData
from visavis.evaluate.metrics import Relevant
from visavis.evaluate.suite import Task
from visavis.inputs import Image


def load(task: Task, root: Path) -> tuple[list[Record], list[Path]]:
    """Return a task's records and the files they come from.

    Raises:
        MissingFilesError: its files are not there or cannot be read.
    """
    name = task.get("records")
    try:
        records = load_source(name, root)
    except TrainError as error:
        raise MissingFilesError(str(error)) from error
    folder, split = name.split("/")
    return records, sorted((root / folder).glob(f"{split}*-*.tar"))


def read(task: Task, root: Path, *, compat: str = "corrected") -> RetrievalData:
    """Return the queries and candidates of a task by its option `form`.

    text_to_image, image_to_text: every caption and its image; names: images and the names of
    classes, written as `phrase`; groups: the same with the coarser classes.

    Raises:
        MissingFilesError: its files are not there or cannot be read.
    """
    records, sources = load(task, root)
    data = RetrievalData(sources=sources)
    images = [Item("", (Image(record.image),)) for record in records]
    if task.get("form") in ("names", "groups"):
        labels = [r.label if task.get("form") == "names" else r.group for r in records]
        phrase = task.get("phrase", "{name}")
        names = sorted(set(labels))
        data.candidates = [Item(phrase.format(name=name)) for name in names]
        data.candidate_ids, data.queries = names, images
        data.query_ids = [record.key for record in records]
        data.relevant = [Relevant.of({names.index(label): 1.0}) for label in labels]
        return data
    texts = CandidateSet()
    owners: list[dict[int, float]] = []  # of each text the images it belongs to
    for number, record in enumerate(records):
        for text in record.captions or (record.caption,):
            if not text.strip():
                data.problems.append(Problem(record.key, "has no caption"))
                continue
            place = texts.add(Item(text), text)
            if place == len(owners):
                owners.append({})
            owners[place][number] = 1.0
    if task.get("form") == "text_to_image":
        data.queries, data.query_ids = texts.items, [str(i) for i in range(len(texts.items))]
        data.candidates, data.candidate_ids = images, [record.key for record in records]
        data.relevant = [Relevant.of(owner) for owner in owners]
        return data
    data.candidates, data.candidate_ids = texts.items, texts.ids
    for number, record in enumerate(records):
        own = {place: 1.0 for place, owner in enumerate(owners) if number in owner}
        if own:
            data.queries.append(images[number])
            data.query_ids.append(record.key)
            data.relevant.append(Relevant.of(own))
    return data
