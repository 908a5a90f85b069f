"""The check for the files of a suite before a model is loaded: `visavis evaluate --check`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visavis.errors import InputError, VisavisError
from visavis.evaluate import pairs, retrieval, video_retrieval
from visavis.evaluate.items import Item, MissingFilesError
from visavis.evaluate.questions import QUESTION_READERS, read_questions
from visavis.evaluate.suite import Suite, Task
from visavis.inputs import Image, Video
from visavis.processing.images import image_size

CHECKED_IMAGES = 500  # of a task, evenly spread over all; each is opened


@dataclass
class Checked:
    """The state of one task's files.

    Args:
        status: "ready"; "incomplete": some records cannot be used; "missing": its annotations are
            not there; "damaged": they cannot be read; "not run": listed only.
        records: how many can be used.
        problems: the first reasons.
        notes: what was found, as the layout and overlays.
    """

    task: str
    status: str
    records: int = 0
    problems: list[str] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)


Reader = Callable[[Task, Path], tuple[int, list[str], list[Image], dict[str, Any]]]


def check_suite(suite: Suite, root: Path, tasks: Iterable[str] = ()) -> list[Checked]:
    """Return the state of each task's files.

    Raises:
        InputError: `root` is no folder.
    """
    if not root.is_dir() and suite.name != "local":
        raise InputError(f"{root} is no folder, expected the one that holds the files of a suite")
    wanted = list(tasks)
    chosen = suite.choose(wanted)
    found = [_check(task, root) for task in chosen]
    if not wanted:
        left = [task for task in suite.tasks.values() if task.status]
        found += [Checked(task.name, "not run", problems=[task.status]) for task in left]
    return found


def fetch_commands(suite: Suite, root: Path, checked: Iterable[Checked]) -> list[str]:
    """Return shell commands that fetch what is missing."""
    missing = {one.task for one in checked if one.status in ("missing", "incomplete", "damaged")}
    if not missing:
        return []
    commands = []
    for line in suite.fetch:
        if "{source}" not in line:
            commands.append(line.format(data=root))
            continue
        for name in sorted(missing):
            task = suite.tasks[name]
            folder = task.get("folders", task.get("files", [name]))[0]
            if task.reader == "beir":
                folder = f"visdoc-tasks/data/{folder}"
            if task.source and task.reader != "mmeb-image":
                commands.append(line.format(data=root, source=task.source, folder=folder))
    return list(dict.fromkeys(commands))


def _check(task: Task, root: Path) -> Checked:
    try:
        records, problems, images, notes = READERS[task.reader](task, root)
    except MissingFilesError as error:
        return Checked(task.name, "missing", problems=[str(error)])
    except VisavisError as error:
        return Checked(task.name, "damaged", problems=[str(error)])
    step = max(1, len(images) // CHECKED_IMAGES)
    opened = images[::step]
    for image in opened:
        try:
            image_size(image)
        except VisavisError as error:
            problems.append(str(error))
    notes = notes | {"images": len(images), "images opened": len(opened)}
    return Checked(task.name, "incomplete" if problems else "ready", records, problems, notes)


def images_of(items: Iterable[Item]) -> list[Image]:
    """Return the distinct images of items, frames of videos included."""
    found: dict[Image, None] = {}
    for item in items:
        for visual in item.visuals:
            if isinstance(visual, Image):
                found[visual] = None
            elif isinstance(visual, Video) and isinstance(visual.source, tuple):
                found |= dict.fromkeys(visual.source)
    return list(found)


def _retrieval(task: Task, root: Path) -> tuple[int, list[str], list[Image], dict[str, Any]]:
    data = retrieval.read_task(task, root, compat="corrected")
    problems = [f"{problem.record}: {problem.message}" for problem in data.problems]
    return (
        len(data.queries),
        problems,
        images_of([*data.queries, *data.candidates]),
        data.notes | {"candidates": len(data.candidates)},
    )


def _vqa(task: Task, root: Path) -> tuple[int, list[str], list[Image], dict[str, Any]]:
    data = read_questions(task, root)
    problems = [f"{problem.record}: {problem.message}" for problem in data.problems]
    images = list(dict.fromkeys(image for q in data.questions for image in q.images))
    return len(data.questions), problems, images, data.notes


def _video(task: Task, root: Path) -> tuple[int, list[str], list[Image], dict[str, Any]]:
    data = video_retrieval.read(task, root)
    problems = [f"{problem.record}: {problem.message}" for problem in data.problems]
    return len(data.captions), problems, images_of(data.videos), {"videos": len(data.videos)}


def _pair(task: Task, root: Path) -> tuple[int, list[str], list[Image], dict[str, Any]]:
    first, second, _ = pairs.read(task, root)
    return 1, [], images_of([first, second]), {}


READERS: dict[str, Reader] = {
    "video-retrieval": _video,
    "pair": _pair,
    **dict.fromkeys(retrieval.READERS, _retrieval),
    **dict.fromkeys(QUESTION_READERS, _vqa),
}
