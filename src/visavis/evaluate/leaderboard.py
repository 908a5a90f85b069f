"""The result file of MMEB's leaderboard, written and read.

    {"metadata": {"model_name": …, …}, "metrics": {"image": {task: {metric: value, …}}, …}}

Files in the wild hold strings such as "FILE_N/A" in the place of a task's metrics, and tasks that
are not part of the benchmark.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visavis.errors import InputError
from visavis.evaluate.results import TaskResult, read_json
from visavis.evaluate.suite import Suite

RENAMED = {"ViDoSeek-page": "ViDoSeek-page-fixed", "MMLongBench-page": "MMLongBench-page-fixed"}
METADATA = (
    "model_name",
    "model_backbone",
    "model_size",
    "embedding_dimension",
    "max_length_tokens",
    "model_release_date",
    "data_source",
    "url",
    "report_generated_date",
)


def leaderboard(
    suite: Suite, tasks: Mapping[str, TaskResult], model: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the document to submit; incomplete and missing tasks are "FILE_N/A"."""
    metadata: dict[str, Any] = dict.fromkeys(METADATA)
    metadata |= {
        "model_name": model["name"],
        "model_size": f"{model['parameters'] / 1e9:.2f}B parameters",
        "embedding_dimension": model["embedding_dim"],
        "max_length_tokens": model["context_length"],
        "data_source": "Self-Reported",
        "report_generated_date": datetime.datetime.now().isoformat(timespec="seconds"),
    }
    metrics: dict[str, dict[str, Any]] = {}
    for task in suite.tasks.values():
        result = tasks.get(task.name)
        name = task.name
        if result is not None and result.info.get("overlay", "none") != "none":
            name = RENAMED.get(name, name)
        metrics.setdefault(task.modality, {})[name] = (
            result.scores | {"num_pred": result.n, "num_data": result.n}
            if result is not None and result.complete
            else "FILE_N/A"
        )
    return {"metadata": metadata, "metrics": metrics}


def read_leaderboard(path: Path, suite: Suite) -> dict[str, float]:
    """Return the headline score of each of a suite's tasks that a leaderboard file holds.

    Tasks that are no part of the suite, and tasks with a string in the place of their metrics, are
    left out; a "-fixed" task goes before the one it replaces.

    Raises:
        InputError: it is no leaderboard file.
    """
    document = read_json(path)
    metrics = document.get("metrics") if isinstance(document, dict) else None
    if not isinstance(metrics, dict):
        raise InputError(f"{path} holds no metrics, expected a result file of MMEB's leaderboard")
    flat = {
        name: values
        for group in metrics.values()
        if isinstance(group, dict)
        for name, values in group.items()
    }
    found = {}
    for task in suite.tasks.values():
        for name in (RENAMED.get(task.name, task.name), task.name):
            values = flat.get(name)
            value = values.get(task.metric) if isinstance(values, dict) else None
            if isinstance(value, int | float) and not isinstance(value, bool):
                found[task.name] = float(value)
                break
    return found
