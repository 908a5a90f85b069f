"""Results of a run: one JSON file a task, averages that are only shown where they are whole."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from visavis.errors import InputError
from visavis.evaluate.metrics import interval
from visavis.evaluate.suite import Suite, Task
from visavis.utils import write_atomically

if TYPE_CHECKING:
    from visavis.api import Model

FORMAT = 1
PACKAGES = ("visavis", "torch", "numpy", "pyarrow", "pillow", "tokenizers")


@dataclass
class TaskResult:
    """The result of one task.

    Args:
        scores: metric → value, in the order of the table; shares, not percent.
        headline: the metric that averages use.
        values: of metrics that are means over records, each record's, for intervals and paired
            comparison.
        intervals: metric → 95 % interval, where it is not that of a mean of `values`.
        samples: one entry a record: what was asked, what came out, what was right.
        problems: records left out, each with the reason.
        official: scores by the original code's rules, where they differ.
        info: number of candidates, ties, frames, layout, times and so on.
    """

    headline: str
    scores: dict[str, float] = field(default_factory=dict)
    values: dict[str, np.ndarray] = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    problems: list[dict[str, str]] = field(default_factory=list)
    official: dict[str, float] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    n: int = 0

    @property
    def complete(self) -> bool:
        """Whether every record was scored."""
        return not self.problems and self.headline in self.scores

    def to_dict(self) -> dict[str, Any]:
        """Return the values that the summary and `--json` show."""
        shown: dict[str, Any] = dict(self.scores)
        shown |= {"n": self.n, "headline": self.headline}
        bounds = self.bounds()
        if self.headline in bounds:
            shown["interval"] = list(bounds[self.headline])
        if self.official:
            shown["official"] = self.official
        if self.problems:
            shown["problems"] = len(self.problems)
        return shown | {"info": self.info}

    def bounds(self) -> dict[str, tuple[float, float]]:
        """Return the 95 % interval of each metric that has one."""
        found = {name: interval(values) for name, values in self.values.items() if len(values) > 1}
        return found | self.intervals


def summary(
    suite: Suite,
    tasks: Mapping[str, TaskResult],
    *,
    model: Mapping[str, Any],
    settings: Mapping[str, Any],
    chosen: list[Task],
) -> dict[str, Any]:
    """Return the document that `--json` prints.

    An average is None where one of its tasks was not run or is incomplete; `incomplete` says which
    and why.
    """
    incomplete = []
    for task in chosen:
        result = tasks.get(task.name)
        if result is None:
            incomplete.append({"task": task.name, "reason": "was not run"})
        elif not result.complete:
            first = result.problems[0] if result.problems else {"message": "gives no score"}
            where = f"{first['record']}: " if first.get("record") else ""
            incomplete.append(
                {
                    "task": task.name,
                    "reason": f"{len(result.problems)} records left out, the first is "
                    f"{where}{first['message']}",
                }
            )
    return {
        "format": FORMAT,
        "suite": suite.name,
        "model": dict(model),
        "settings": dict(settings),
        "tasks": {name: result.to_dict() for name, result in tasks.items()},
        "averages": averages(suite, tasks),
        "anchors": {task.name: dict(task.anchors) for task in chosen if task.anchors},
        "incomplete": incomplete,
        "versions": versions(),
    }


def averages(suite: Suite, tasks: Mapping[str, TaskResult]) -> dict[str, float | None]:
    """Return each average of a suite, None where it would not be whole."""
    found: dict[str, float | None] = {}
    for name in suite.averages:
        covered = [tasks.get(task.name) for task in suite.selected(name)]
        values = [r.scores[r.headline] for r in covered if r is not None and r.complete]
        found[name] = float(np.mean(values)) if len(values) == len(covered) and values else None
    return found


def describe_model(model: Model, profile: str) -> dict[str, Any]:
    """Return the description of a model that is stored in every result."""
    types = sorted({str(weight.dtype).removeprefix("torch.") for weight in model.vlm.parameters()})
    return {
        "name": model.name,
        "fingerprint": model.fingerprint,
        "profile": profile,
        "pooling": model.profile.pooling,
        "parameters": model.num_parameters,
        "embedding_dim": model.embedding_dim,
        "context_length": model.context_length,
        "precision": types,
        "device": str(model.device),
    }


def versions() -> dict[str, str]:
    """Return the versions of what computed a result."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document in one step.

    Raises:
        InputError: it cannot be written.
    """
    try:
        with write_atomically(path) as temporary:
            temporary.write_text(
                json.dumps(value, ensure_ascii=False, indent=1, default=_plain), encoding="utf-8"
            )
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}; give another --output") from error


def write_task(folder: Path, suite: str, name: str, result: TaskResult) -> None:
    """Write one task's result with every record's outcome to `<folder>/tasks/<name>.json`."""
    document = {
        "format": FORMAT,
        "suite": suite,
        "task": name,
        "headline": result.headline,
        "scores": result.scores,
        "intervals": {k: list(v) for k, v in result.bounds().items()},
        "official": result.official,
        "n": result.n,
        "info": result.info,
        "problems": result.problems,
        "ids": result.ids,
        "values": {k: [round(float(x), 6) for x in v] for k, v in result.values.items()},
        "samples": result.samples,
    }
    write_json(folder / "tasks" / f"{name}.json", document)


def read_json(path: Path) -> Any:
    """Return a JSON document of a run.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot read {path}: {error}; expected the folder of a finished `visavis evaluate "
            "--output`"
        ) from error


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is no JSON")
