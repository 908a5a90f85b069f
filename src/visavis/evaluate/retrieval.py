"""Running a retrieval task: read, embed both sides, rank, report."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visavis.errors import InputError
from visavis.evaluate.items import (
    SHOWN_FAILURES,
    Item,
    Problem,
    RetrievalData,
    data_fingerprint,
    thumbnails,
)
from visavis.evaluate.readers import beir, local, mmeb_image, mmeb_video, records, text
from visavis.evaluate.results import TaskResult
from visavis.evaluate.scoring import Scored, score
from visavis.evaluate.suite import Task
from visavis.evaluate.vectors import ALONE, Workers, embed_all

if TYPE_CHECKING:
    from visavis.api import Model

READERS: dict[str, Callable[..., RetrievalData]] = {
    "mmeb-image": mmeb_image.read,
    "mmeb-video": mmeb_video.read,
    "beir": beir.read,
    "records": records.read,
    "text": text.read,
    "local-beir": local.read_retrieval,
} | dict.fromkeys(local.READERS, local.read_retrieval)


def read_task(task: Task, root: Path, *, compat: str, frames: int | None = None) -> RetrievalData:
    """Return the records of a retrieval task.

    Raises:
        InputError: its files are missing or damaged.
    """
    settings: dict[str, Any] = {"compat": compat}
    if task.reader == "mmeb-video" and frames is not None:
        settings["frames"] = frames
    return READERS[task.reader](task, root, **settings)


def run_retrieval(
    model: Model,
    data: RetrievalData,
    task: Task,
    *,
    ties: str = "pessimistic",
    folder: Path | None = None,
    workers: Workers = ALONE,
    progress: Callable[[int], None] = lambda done: None,
) -> TaskResult | None:
    """Return a task's result; None in processes other than the first.

    Args:
        ties: "pessimistic", or "official": equal scores rank in the order of the candidates.
        folder: keeps vectors from one run to the next.
        progress: is told how many more items are embedded.
    """
    folders = (
        (folder / f"{task.name}-queries", folder / f"{task.name}-candidates")
        if folder
        else (
            None,
            None,
        )
    )
    queries = embed_all(model, data.queries, folder=folders[0], workers=workers, progress=progress)
    candidates = embed_all(
        model, data.candidates, folder=folders[1], workers=workers, progress=progress
    )
    if workers.rank:
        return None
    started = time.perf_counter()
    if not data.queries:
        raise InputError("no query can be used; the problems of its records say why")
    order = "order" if ties == "official" else "pessimistic"
    found = score(data, queries, candidates, ties=order)  # type: ignore[arg-type]
    result = TaskResult(task.metric)
    _fill(result, data, found)
    if found.tied_queries:
        other = "pessimistic" if order == "order" else "order"
        again = score(data, queries, candidates, ties=other).metrics  # type: ignore[arg-type]
        name = "ties broken by order" if other == "order" else "ties pessimistic"
        result.info["ties"] = {
            "queries": found.tied_queries,
            f"{task.metric}, {name}": float(again[task.metric].mean()),
        }
    result.info |= {
        "candidates": len(data.candidates),
        "per query": "own" if data.pools is not None else "all",
        "data": data_fingerprint(data.sources),
        **data.notes,
        "seconds": {
            "embed queries": round(queries.seconds, 2),
            "embed candidates": round(candidates.seconds, 2),
            "score": round(time.perf_counter() - started, 2),
        },
        "embedded": queries.computed + candidates.computed,
    }
    return result


def _fill(result: TaskResult, data: RetrievalData, found: Scored) -> None:
    result.values = found.metrics
    result.scores = {name: float(values.mean()) for name, values in found.metrics.items()}
    result.n = len(found.numbers)
    result.ids = [data.query_ids[number] for number in found.numbers]
    result.problems = [vars(problem) for problem in data.problems]
    result.problems += [
        {"record": f"query {data.query_ids[number]}", "message": reason}
        for number, reason in found.problems.items()
    ]
    failures = 0
    for number, ranks, (names, scores) in zip(found.numbers, found.ranks, found.top, strict=True):
        relevant = data.relevant[number]
        failures += ranks.ranks[0] > 1
        small = bool(ranks.ranks[0] > 1 and failures <= SHOWN_FAILURES)
        result.samples.append(
            {
                "id": data.query_ids[number],
                "query": _described(data.queries[number], small),
                "ranks": [int(rank) for rank in ranks.ranks[:10]],
                "tied": ranks.tied,
                "truth": [
                    _shown(data, int(candidate), small)
                    for candidate in relevant.candidates[:SHOWN_TRUTH]
                ],
                "top": [
                    _shown(data, int(name), small) | {"score": round(float(value), 5)}
                    for name, value in zip(names, scores, strict=True)
                ],
            }
        )


SHOWN_TRUTH = 3


def _shown(data: RetrievalData, number: int, small: bool) -> dict[str, Any]:
    name = data.candidate_ids[number] if data.candidate_ids else str(number)
    return {"id": name, **_described(data.candidates[number], small)}


def _described(item: Item, small: bool) -> dict[str, Any]:
    """Return the description of an item.

    With `small`, it includes thumbnails of images that are not stored in a file of their own.
    """
    found = item.describe()
    copies = thumbnails(item.visuals) if small else []
    return found | ({"thumbnails": copies} if copies else {})


def limit(data: RetrievalData, number: int | None) -> None:
    """Keep the first queries, and say that the others are missing."""
    if number is None or number >= len(data.queries):
        return
    left = len(data.queries) - number
    del data.queries[number:], data.query_ids[number:], data.relevant[number:]
    if data.pools is not None:
        del data.pools[number:]
    data.problems.append(Problem(f"{left} queries", f"left out by max_records={number}"))
