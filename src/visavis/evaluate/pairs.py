"""Cosines of single pairs beside published ones: whether a checkpoint and its prompts are right."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from visavis.evaluate.items import VISUAL, Item, MissingFilesError, data_fingerprint
from visavis.evaluate.prompts import embed_items
from visavis.evaluate.results import TaskResult
from visavis.evaluate.suite import Task
from visavis.evaluate.tables import find_first
from visavis.inputs import Image

if TYPE_CHECKING:
    from visavis.api import Model


def read(task: Task, root: Path) -> tuple[Item, Item, list[Path]]:
    """Return the two items of a pair and the image file.

    Raises:
        MissingFilesError: the image is not there.
    """
    files = find_first(root, task.get("files"))
    if not files:
        raise MissingFilesError(f"{task.get('files')[0]} is missing below {root}")
    sides = []
    for side in ("query", "target"):
        written = task.get(side).replace("<image>", VISUAL)
        visuals = (Image(files[0]),) if VISUAL in written else ()
        sides.append(Item(written.replace(VISUAL, "").strip(), visuals, "", written))
    return sides[0], sides[1], files[:1]


def run_pair(model: Model, task: Task, root: Path) -> TaskResult:
    """Return the cosine of a pair, and how far it is from the published one of the model's size."""
    first, second, files = read(task, root)
    vectors = embed_items(model, [first, second]).astype(np.float64)
    result = TaskResult(task.metric, n=1, ids=[task.name])
    cosine = float(vectors[0] @ vectors[1])
    if not np.isfinite(cosine):
        result.problems.append({"record": task.name, "message": "its cosine is not finite"})
        return result
    result.scores = {"cosine": cosine}
    published: dict[Any, float] = task.get("published")
    if model.embedding_dim in published:
        result.scores["published"] = published[model.embedding_dim]
        result.scores["difference"] = cosine - published[model.embedding_dim]
    result.info = {"data": data_fingerprint(files)}
    return result
