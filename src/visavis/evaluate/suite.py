"""The registry of suites: one YAML file a suite in `suites/`, one entry a task.

    suite: mmeb-v1
    defaults: {reader: mmeb-image, metric: "hit@1"}
    averages: {IND: {domain: IND}}
    tasks:
      VOC2007: {group: classification, query: Identify the object shown in the image, …}

An entry says where files lie, which fields they have, the instructions, the metric, the domain and
the published scores. `include` takes over another suite's tasks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

import yaml

from visavis.errors import InputError
from visavis.utils import lookup

OWN = ("local",)  # suites that read the user's own data and have no entries


@dataclass(frozen=True)
class Task:
    """One task of a suite.

    Args:
        name: its key in tables and result files.
        reader: which reader turns its files into records.
        metric: its headline metric.
        group, modality, domain: what averages select by.
        anchors: published scores of the headline metric by model, as shares.
        source: where the official files come from.
        status: why it is not run; empty: it is.
        options: everything else, for its reader.
    """

    name: str
    reader: str
    metric: str
    group: str = ""
    modality: str = ""
    domain: str = ""
    anchors: Mapping[str, float] = field(default_factory=dict)
    source: str = ""
    status: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    def get(self, name: str, default: Any = None) -> Any:
        """Return one of the reader's options."""
        return self.options.get(name, default)


@dataclass(frozen=True)
class Suite:
    """A set of tasks that are reported together.

    Args:
        averages: for each average which tasks it covers, by their group, modality or domain; an
            empty selection is all tasks. Each is the unweighted mean of its tasks.
        fetch: commands that bring the official files.
    """

    name: str
    title: str
    tasks: Mapping[str, Task]
    averages: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    fetch: tuple[str, ...] = ()

    def choose(self, names: Iterable[str]) -> list[Task]:
        """Return the named tasks, or all that are run where none is named.

        Raises:
            UnknownNameError: no such task.
            InputError: a named task is listed and not run; the message says why.
        """
        chosen = [lookup(f"task of {self.name}", name, self.tasks) for name in names]
        for task in chosen:
            if task.status:
                raise InputError(f"{task.name} of {self.name} is not run: {task.status}")
        return chosen or [task for task in self.tasks.values() if not task.status]

    def selected(self, average: str) -> list[Task]:
        """Return the tasks that an average covers, those not run included."""
        wanted = self.averages[average]
        return [
            task
            for task in self.tasks.values()
            if all(getattr(task, key) == value for key, value in wanted.items())
        ]


def suite_names() -> list[str]:
    """Return the names of all suites."""
    files = resources.files(__package__).joinpath("suites").iterdir()
    return sorted([*(f.name[:-5] for f in files if f.name.endswith(".yaml")), *OWN])


def load_suite(name: str) -> Suite:
    """Return a suite by name.

    Raises:
        UnknownNameError: no such suite; the message lists the nearest names.
    """
    lookup("suite", name, dict.fromkeys(suite_names()))
    return _read(name)


@cache
def _read(name: str) -> Suite:
    if name in OWN:
        return Suite(name, "The user's own data: folders, CSV, JSON lines and parquet", {})
    text = resources.files(__package__).joinpath("suites", f"{name}.yaml").read_text("utf-8")
    found = yaml.safe_load(text)
    tasks: dict[str, Task] = {}
    for included in found.get("include", []):
        tasks |= _read(included).tasks
    defaults = found.get("defaults", {})
    for key, entry in found["tasks"].items():
        tasks[key] = _task(key, defaults | (entry or {}))
    return Suite(
        name,
        found["title"],
        tasks,
        found.get("averages", {}),
        tuple(found.get("fetch", [])),
    )


def _task(name: str, entry: dict[str, Any]) -> Task:
    own = {key: entry.pop(key) for key in list(entry) if key in Task.__dataclass_fields__}
    anchors = {model: value / 100 for model, value in own.pop("anchors", {}).items()}
    return Task(name=name, anchors=anchors, options=entry, **own)
