"""One HTML page of one or several runs: tables beside published scores, bars with intervals,
galleries of failures, and the paired difference of two runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from visavis.errors import InputError, VisavisError
from visavis.evaluate.items import SHOWN_FAILURES, thumbnail
from visavis.evaluate.metrics import Comparison, compare
from visavis.evaluate.results import read_json
from visavis.utils import write_atomically


@dataclass
class Run:
    """A finished run: its folder, its summary and its tasks' files."""

    folder: Path
    summary: dict[str, Any]
    tasks: dict[str, dict[str, Any]]

    @property
    def label(self) -> str:
        """Return a short name: the model and the folder."""
        return f"{self.summary['model']['name']} ({self.folder.name})"


def read_run(folder: Path) -> Run:
    """Read the folder that `visavis evaluate --output` wrote.

    Raises:
        InputError: it holds no finished run.
    """
    found = read_json(folder / "results.json")
    if not isinstance(found, dict) or "tasks" not in found or "suite" not in found:
        raise InputError(f"{folder}/results.json is no result of visavis evaluate")
    tasks = {name: read_json(folder / "tasks" / f"{name}.json") for name in found["tasks"]}
    return Run(folder, found, tasks)


def compare_runs(first: Run, second: Run) -> dict[str, Comparison]:
    """Return for each task that both runs have the paired comparison of its headline metric.

    Only records that both have are compared.

    Raises:
        InputError: the runs have no task in common.
    """
    found = {}
    for name, own in first.tasks.items():
        other = second.tasks.get(name)
        metric = own["headline"]
        if other is None or metric not in own["values"] or metric not in other["values"]:
            continue
        mine = dict(zip(own["ids"], own["values"][metric], strict=True))
        theirs = dict(zip(other["ids"], other["values"][metric], strict=True))
        shared = [key for key in mine if key in theirs]
        if shared:
            found[name] = compare(
                np.array([mine[key] for key in shared]), np.array([theirs[key] for key in shared])
            )
    if not found:
        raise InputError(
            f"{first.folder} and {second.folder} have no task with the same records; compare runs "
            "of the same suite and data"
        )
    return found


def write_report(folders: Sequence[Path], output: Path, *, images: bool = True) -> Path:
    """Write one HTML page that stands alone, images included as small copies.

    Args:
        folders: of runs; of two, the page shows their difference.
        images: whether galleries hold images; without them the page can be shared where the
            images may not.

    Raises:
        InputError: a folder holds no finished run, or the page cannot be written.
    """
    import jinja2

    runs = [read_run(folder) for folder in folders]
    differences = compare_runs(*runs) if len(runs) == 2 else {}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"percent": _percent, "number": _number}
    source = resources.files(__package__).joinpath("report.html.j2").read_text("utf-8")
    names = list(dict.fromkeys(name for run in runs for name in run.tasks))
    page = environment.from_string(source).render(
        runs=runs,
        names=names,
        differences=differences,
        difference=_mean_difference(differences),
        anchors=_anchors(runs),
        rows={name: [_row(run, name) for run in runs] for name in names},
        galleries=[
            {"run": run.label, "tasks": {name: _failures(run, name, images) for name in run.tasks}}
            for run in runs
        ],
    )
    try:
        with write_atomically(output) as temporary:
            temporary.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {output}: {error}") from error
    return output


def _anchors(runs: Sequence[Run]) -> list[str]:
    """Return the models with published scores, the one with the most tasks first."""
    counts: dict[str, int] = {}
    for run in runs:
        for scores in run.summary.get("anchors", {}).values():
            for model in scores:
                counts[model] = counts.get(model, 0) + 1
    return sorted(counts, key=lambda model: -counts[model])[:4]


def _row(run: Run, name: str) -> dict[str, Any] | None:
    shown = run.summary["tasks"].get(name)
    if shown is None:
        return None
    metric = shown["headline"]
    return {
        "metric": metric,
        "value": shown.get(metric),
        "interval": shown.get("interval"),
        "n": shown["n"],
        "problems": shown.get("problems", 0),
        "official": shown.get("official", {}).get(metric),
        "ties": (shown["info"].get("ties") or {}).get("queries", 0),
        "seconds": shown["info"].get("seconds in all", "–"),
        "stages": ", ".join(f"{k} {v} s" for k, v in shown["info"].get("seconds", {}).items()),
    }


def _mean_difference(differences: dict[str, Comparison]) -> float | None:
    return statistics.mean(d.difference for d in differences.values()) if differences else None


def _failures(run: Run, name: str, images: bool) -> list[dict[str, Any]]:
    """Return the first records of a task that went wrong, ready to show."""
    task = run.tasks[name]
    values = task["values"].get(task["headline"])
    wrong = [s for s, v in zip(task["samples"], values or [], strict=False) if v < 1]
    return [_gallery(sample, images) for sample in wrong[:SHOWN_FAILURES]]


def _gallery(sample: dict[str, Any], images: bool) -> dict[str, Any]:
    def shown(entry: dict[str, Any]) -> dict[str, Any]:
        return {
            "text": str(entry.get("text", ""))[:300],
            "id": str(entry.get("id", ""))[-60:],
            "score": entry.get("score"),
            "images": _copies(entry) if images else [],
        }

    top = [shown(entry) for entry in sample.get("top", [])]
    truth = [shown(entry) for entry in sample.get("truth", [])]
    right = {entry.get("id") for entry in sample.get("truth", [])}
    for entry, original in zip(top, sample.get("top", []), strict=True):
        entry["right"] = original.get("id") in right
    return {
        "id": sample.get("id", ""),
        "query": shown(sample["query"]),
        "rank": sample["ranks"][0] if sample.get("ranks") else None,
        "answer": sample.get("answer"),
        "expected": sample.get("expected"),
        "truth": truth,
        "top": top,
    }


def _copies(entry: dict[str, Any]) -> list[str]:
    """Return small copies of an entry's images; files that are no longer there have none."""
    found = list(entry.get("thumbnails", []))
    for name in entry.get("images", [])[:2] if not found else ():
        try:
            found.append(thumbnail(Path(name)))
        except VisavisError:
            continue
    return found


def _percent(value: float | None) -> str:
    """Return a share in percent, and points (MME's sums) as they are."""
    if value is None:
        return "–"
    return f"{100 * value:.1f}" if value <= 1 else f"{value:.1f}"


def _number(value: float) -> str:
    return f"{value:g}"
