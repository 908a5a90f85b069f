"""Retrieval of pages in BEIR form: queries, corpus and qrels, as ViDoRe and VisRAG publish it.

    <folder>/{queries,corpus,qrels}/*.parquet, below the data folder or in visdoc-tasks[/data]

Page images lie in folders of their own, or in the corpus files; a page that is missing in the
folder is taken from the corpus.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from pathlib import Path
from typing import Any

from visavis.errors import InputError
from visavis.evaluate.items import VISUAL, Item, MissingFilesError, Problem, RetrievalData
from visavis.evaluate.metrics import Relevant
from visavis.evaluate.suite import Task
from visavis.evaluate.tables import SUFFIXES, iterate_rows
from visavis.inputs import Image, Stored

HOMES = ("", "visdoc-tasks", "visdoc-tasks/data", "visdoc_tasks/data", "data")
IMAGE_HOMES = ("visdoc-tasks", "visdoc-tasks/images", "visdoc_tasks/images", "images", "")
PARTS = ("queries", "corpus", "qrels")


def annotation_files(task: Task, root: Path) -> list[Path]:
    """Return a task's files of queries, corpus and qrels, or nothing."""
    found = find(task, root)
    return [file for part in PARTS for file in found[1][part]] if found else []


def find(task: Task, root: Path) -> tuple[str, dict[str, list[Path]]] | None:
    """Return the folder and the files of the first of a task's folders that is complete."""
    for folder in task.get("folders", [task.name]):
        for home in HOMES:
            files = {part: part_files(root / home / folder, part) for part in PARTS}
            if all(files.values()):
                return folder, files
    return None


def part_files(folder: Path, part: str) -> list[Path]:
    """Return the files of one part: of a subfolder, or named after it."""
    places = [folder / part, folder / "data" / part]
    for place in places:
        if place.is_dir() and (files := sorted(f for f in place.iterdir() if f.suffix in SUFFIXES)):
            return files
    if folder.is_dir():
        return sorted(
            f for f in folder.iterdir() if f.suffix in SUFFIXES and f.name.startswith(part)
        )
    return []


def read(task: Task, root: Path, *, compat: str = "corrected") -> RetrievalData:
    """Return the queries and pages of a task.

    Raises:
        MissingFilesError: parts of it are missing.
        InputError: they are damaged.
    """
    found = find(task, root)
    if found is None:
        raise MissingFilesError(
            f"{task.name} lacks queries, corpus or qrels below {root}; see --check"
        )
    folder, files = found
    data = RetrievalData(sources=[file for part in PARTS for file in files[part]])
    data.notes = {"folder": folder}
    if task.get("overlay"):
        data.notes["overlay"] = task.get("overlay") if folder == task.get("overlay") else "none"
    homes = [
        root / home / name
        for name in task.get("image_folders", [task.name])
        for home in IMAGE_HOMES
        if (root / home / name).is_dir()
    ]
    numbers: dict[str, int] = {}
    broken: dict[str, str] = {}
    target = task.get("target", "")
    for row in iterate_rows(files["corpus"]):
        name = str(_value(row, "corpus-id", "corpus_id", "_id"))
        if name in numbers or name in broken:
            data.problems.append(Problem(f"corpus {name}", "this id stands twice in the corpus"))
            continue
        image, in_corpus = _page(name, row.get("image"), homes, task)
        text = " ".join(str(row[part]) for part in ("title", "text") if row.get(part))
        if image is None and not text:
            broken[name] = "its image is neither in the corpus file nor in a folder of images"
            data.problems.append(Problem(f"corpus {name}", broken[name]))
            continue
        data.notes["pages from the corpus"] = data.notes.get("pages from the corpus", 0) + in_corpus
        numbers[name] = len(data.candidates)
        visuals = (image,) if image else ()
        written = f"{VISUAL} {target}" if visuals else text
        data.candidates.append(Item(text if not visuals else "", visuals, target, written))
        data.candidate_ids.append(name)
    grades: dict[str, dict[str, float]] = defaultdict(dict)
    for row in iterate_rows(files["qrels"]):
        query = str(_value(row, "query-id", "query_id"))
        page, score = str(_value(row, "corpus-id", "corpus_id")), float(_value(row, "score"))
        if score > 0:
            grades[query][page] = max(score, grades[query].get(page, 0.0))
    _queries(task, data, files["queries"], grades, numbers, broken)
    return data


def _queries(
    task: Task,
    data: RetrievalData,
    files: list[Path],
    grades: dict[str, dict[str, float]],
    numbers: dict[str, int],
    broken: dict[str, str],
) -> None:
    instruction = task.get("query", "")
    known: set[str] = set()
    for row in iterate_rows(files):
        name = str(_value(row, "query-id", "query_id", "_id"))
        text = str(row.get("query") or row.get("text") or "")
        if name in known:
            data.problems.append(Problem(f"query {name}", "this id stands twice in the queries"))
            continue
        known.add(name)
        wanted = grades.get(name, {})
        lost = [page for page in wanted if page not in numbers]
        if not wanted or lost:
            reason = "qrels name no page for it"
            if lost:
                state = "unreadable" if lost[0] in broken else "not in the corpus"
                reason = f"its page {lost[0]} is {state}"
            data.problems.append(Problem(f"query {name}", reason))
            continue
        visuals = (Image(row["image"]),) if isinstance(row.get("image"), Stored) else ()
        if not text and not visuals:
            data.problems.append(Problem(f"query {name}", "has neither text nor image"))
            continue
        written = "" if visuals else f"{instruction} {text}".strip()
        data.queries.append(Item(text, visuals, instruction, written))
        data.query_ids.append(name)
        data.relevant.append(Relevant.of({numbers[page]: g for page, g in wanted.items()}))
    for name in sorted(set(grades) - known):
        data.problems.append(Problem(f"qrels of {name}", "there is no query with this id"))


def _page(name: str, stored: Any, homes: list[Path], task: Task) -> tuple[Image | None, bool]:
    """Return a page's image, and whether it comes from the corpus file."""
    file_name = f"{name}.png"
    if task.get("image_names") == "visrag":  # long names are cut and get a hash
        stem, dot, suffix = name.rpartition(".")
        stem, suffix = (stem, dot + suffix) if dot else (name, "")
        file_name = f"{stem[:50]}_{hashlib.md5(name.encode()).hexdigest()[:8]}{suffix}"
    for home in homes:
        if (home / file_name).is_file():
            return Image(home / file_name), False
    if isinstance(stored, Stored):
        return Image(stored), True
    if isinstance(stored, bytes) and stored:
        return Image(stored), True
    return None, False


def _value(row: dict[str, Any], *names: str) -> Any:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise InputError(f"a row has the columns {', '.join(row)}, expected {' or '.join(names)}")
