"""Questions of a task, from benchmarks or from the user's own tables."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from visavis.evaluate.readers import local
from visavis.evaluate.suite import Task
from visavis.evaluate.vqa import readers
from visavis.evaluate.vqa.data import VqaData

QUESTION_READERS: dict[str, Callable[[Task, Path], VqaData]] = dict.fromkeys(
    readers.READERS, readers.read
) | {"local-questions": lambda task, root: readers.unique(local.questions(task, root))}


def read_questions(task: Task, root: Path) -> VqaData:
    """Return the questions of a task with what is right.

    Raises:
        MissingFilesError: its files are not there.
        InputError: they are damaged.
    """
    return QUESTION_READERS[task.reader](task, root)
