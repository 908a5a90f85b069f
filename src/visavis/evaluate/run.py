"""Running a suite: every task by its kind, one failing task without the others, one summary."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visavis.errors import InputError, OutOfMemoryError, VisavisError
from visavis.evaluate import retrieval, video_retrieval
from visavis.evaluate.items import Problem
from visavis.evaluate.leaderboard import leaderboard
from visavis.evaluate.pairs import run_pair
from visavis.evaluate.prompts import profile_name
from visavis.evaluate.questions import QUESTION_READERS, read_questions
from visavis.evaluate.readers import local
from visavis.evaluate.results import (
    TaskResult,
    describe_model,
    summary,
    write_json,
    write_task,
)
from visavis.evaluate.suite import Suite, Task, load_suite
from visavis.evaluate.vectors import ALONE, Workers
from visavis.evaluate.vqa.run import judge_of, run_vqa

if TYPE_CHECKING:
    from visavis.api import Model

COMPAT = ("corrected", "official")
TIES = ("pessimistic", "official")


@dataclass(frozen=True)
class Options:
    """How a suite is run.

    Args:
        output: folder for results, vectors and answers; None: nothing is kept.
        ties: "pessimistic" ranks a right candidate below others with its score, "official" by the
            order of the candidates.
        compat: "corrected" rules, or the "official" ones with their errors.
        frames: of each video; None: the suite's own number.
        max_records: use only the first records of each task, for trying out; the task is then
            incomplete.
    """

    output: Path | None = None
    ties: str = "pessimistic"
    compat: str = "corrected"
    frames: int | None = None
    max_records: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, known in (("ties", TIES), ("compat", COMPAT)):
            if getattr(self, name) not in known:
                raise InputError(
                    f"{name} is {getattr(self, name)!r}, expected {' or '.join(known)}"
                )


DEFAULTS = Options()


@dataclass
class Context:
    """The options, workers and callbacks available to the runner of a task."""

    root: Path
    options: Options
    workers: Workers
    progress: Callable[[int], None]
    expect: Callable[[int], None]

    @property
    def vectors(self) -> Path | None:
        """The folder of cached vectors."""
        return self.options.output / "vectors" if self.options.output else None


Runner = Callable[["Model", Task, Context], "TaskResult | None"]


def _retrieval(model: Model, task: Task, context: Context) -> TaskResult | None:
    options = context.options
    data = retrieval.read_task(task, context.root, compat=options.compat, frames=options.frames)
    retrieval.limit(data, options.max_records)
    context.expect(len(data.queries) + len(data.candidates))
    return retrieval.run_retrieval(
        model,
        data,
        task,
        ties=options.ties,
        folder=context.vectors,
        workers=context.workers,
        progress=context.progress,
    )


def _vqa(model: Model, task: Task, context: Context) -> TaskResult | None:
    options = context.options
    data = read_questions(task, context.root)
    if options.max_records is not None and len(data.questions) > options.max_records:
        left = len(data.questions) - options.max_records
        del data.questions[options.max_records :]
        reason = f"left out by max_records={options.max_records}"
        data.problems.append(Problem(f"{left} questions", reason))
    context.expect(len(data.questions))
    return run_vqa(
        model,
        data,
        task,
        compat=options.compat,
        judge=judge_of(options.extra),
        output=options.output,
        workers=context.workers,
        progress=context.progress,
    )


def _video(model: Model, task: Task, context: Context) -> TaskResult | None:
    data = video_retrieval.read(task, context.root, frames=context.options.frames)
    context.expect(len(data.captions) + len(data.videos))
    return video_retrieval.run_video_retrieval(
        model,
        data,
        task,
        compat=context.options.compat,
        folder=context.vectors,
        workers=context.workers,
        progress=context.progress,
    )


def _pair(model: Model, task: Task, context: Context) -> TaskResult | None:
    return run_pair(model, task, context.root) if not context.workers.rank else None


RUNNERS: dict[str, Runner] = {
    "video-retrieval": _video,
    "pair": _pair,
    **dict.fromkeys(retrieval.READERS, _retrieval),
    **dict.fromkeys(QUESTION_READERS, _vqa),
}


def evaluate(
    model: Model,
    suite: str | Suite,
    data: str | Path,
    *,
    tasks: Iterable[str] = (),
    options: Options = DEFAULTS,
    report: Callable[[str, int, int], None] = lambda name, number, total: None,
    expect: Callable[[int], None] = lambda items: None,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Run a suite and return its summary: scores, intervals, averages and what is incomplete.

    Started by a launcher (`accelerate launch -m visavis evaluate …`), the processes share the work,
    and those after the first return an empty summary.

    A task that fails is named in `incomplete` with the reason, and the others are run. With an
    output folder, each task's result is written as soon as it is there, and vectors and answers
    of an earlier run with the same model and data are used again.

    Args:
        data: the folder of the official files.
        tasks: names of the tasks to run; empty: all.
        report: is told each task's name, number and how many there are.
        expect: is told how many items or questions a task has, once it has been read.
        progress: is told how many more of them are done.

    Raises:
        UnknownNameError: no such suite or task.
        InputError: `data` is no folder, or an option is wrong.
    """
    root = Path(data).expanduser()
    suite = find_suite(suite, root) if isinstance(suite, str) else suite
    if not root.is_dir() and suite.name != "local":
        raise InputError(f"{root} is no folder, expected the one that holds the files of a suite")
    chosen = suite.choose(tasks)
    workers = _workers(options)
    results: dict[str, TaskResult] = {}
    started = time.perf_counter()
    for number, task in enumerate(chosen, 1):
        report(task.name, number, len(chosen))
        context = Context(root, options, workers, progress, expect)
        begun = time.perf_counter()
        try:
            result = RUNNERS[task.reader](model, task, context)
        except OutOfMemoryError:
            raise
        except VisavisError as error:
            result = TaskResult(task.metric, problems=[{"record": "", "message": str(error)}])
        if result is None:
            continue
        result.info["seconds in all"] = round(time.perf_counter() - begun, 2)
        results[task.name] = result
        if options.output:
            write_task(options.output, suite.name, task.name, result)
    if workers.rank:  # the first process has the results
        return {}
    found = summary(
        suite,
        results,
        model=describe_model(model, profile_name(model.profile)),
        settings={
            "ties": options.ties,
            "compat": options.compat,
            "frames": options.frames,
            "max_records": options.max_records,
            "seconds": round(time.perf_counter() - started, 1),
        },
        chosen=chosen,
    )
    if options.output:
        write_json(options.output / "results.json", found)
        if suite.name.startswith("mmeb-"):
            document = leaderboard(suite, results, found["model"])
            write_json(options.output / "leaderboard.json", document)
    return found


def find_suite(name: str, root: Path) -> Suite:
    """Return a suite by name; that of own data has the tasks that `root` holds.

    Raises:
        UnknownNameError: no such suite.
        InputError: `root` holds no data of a known shape.
    """
    return local.discover(root) if name == "local" else load_suite(name)


def _workers(options: Options) -> Workers:
    """Return this process's share, where a launcher started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return ALONE
    if options.output is None:
        raise InputError("a run of several processes needs --output, where they share vectors")
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise InputError(
            "several processes share a run through the package accelerate, which is not installed; "
            "`pip install 'visavis[evaluate]'`, or start one process"
        ) from error
    import torch

    state = PartialState(cpu=not torch.cuda.is_available())
    return Workers(state.process_index, state.num_processes, state.wait_for_everyone)
