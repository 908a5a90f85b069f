"""`visavis evaluate`: run benchmark suites, check their files, and report and compare runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from visavis.cli.common import (
    JsonOption,
    Loading,
    loads_a_model,
    print_columns,
    print_json,
    say,
    show_progress,
)
from visavis.errors import InputError

RUN = "run"


class DefaultGroup(TyperGroup):
    """A group whose arguments go to its command `run` where they name no other one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `run` before arguments that begin with no command's name."""
        if not args or args[0] not in self.commands:
            args = [RUN, *args]
        return super().parse_args(ctx, args)


evaluate = typer.Typer(name="evaluate", cls=DefaultGroup, rich_markup_mode="rich")


@evaluate.callback()
def about() -> None:
    """Run benchmark suites on a model, and report and compare the runs."""


@evaluate.command(name=RUN)
@loads_a_model
def run(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A bundled name, a folder, a .gguf or hub id.")
    ] = "",
    suite: Annotated[
        str, typer.Option("--suite", "-s", help="The suite; `visavis evaluate suites` lists them.")
    ] = "",
    data: Annotated[
        Path | None,
        typer.Option("--data", help="The folder of the official files, in any layout."),
    ] = None,
    tasks: Annotated[
        str, typer.Option("--tasks", help="Only these tasks, separated by commas.")
    ] = "",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder for results, vectors and answers; a rerun resumes."
        ),
    ] = None,
    ties: Annotated[
        str,
        typer.Option(help="Equal scores: pessimistic, or official (the order of candidates)."),
    ] = "pessimistic",
    compat: Annotated[
        str, typer.Option(help="corrected rules, or official ones with their known errors.")
    ] = "corrected",
    frames: Annotated[
        int | None, typer.Option(min=1, help="Frames of each video, 8 where a suite says so.")
    ] = None,
    max_records: Annotated[
        int | None, typer.Option(min=1, help="Only the first records of each task, to try out.")
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="OpenAI-compatible address of a judge for MM-Vet; its key is read from "
            "VISAVIS_JUDGE_KEY.",
        ),
    ] = None,
    judge_model: Annotated[str, typer.Option(help="The judge's model.")] = "gpt-4",
    check: Annotated[
        bool, typer.Option("--check", help="Only check the files; no model is loaded.")
    ] = False,
    as_json: JsonOption = False,
    *,
    loading: Loading,
) -> None:
    """Run a benchmark suite on a model and print its scores.

    The exit status is 0 only where nothing is incomplete, else 1.

    [bold]Examples[/bold]

      visavis evaluate run nano --suite nano --data DATA --output runs/nano

      visavis evaluate nano --suite local --data photos.csv

      visavis evaluate --suite mmeb-v1 --data DATA --check
    """
    if not suite:
        raise InputError("--suite is missing; `visavis evaluate suites` lists the suites")
    if data is None:
        raise InputError("--data is missing, expected the folder of the official files")
    from visavis.evaluate.suite import load_suite

    if suite == "local":
        from visavis.evaluate.readers.local import discover

        loaded_suite = discover(data.expanduser())
    else:
        loaded_suite = load_suite(suite)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if check:
        _check(loaded_suite, data.expanduser(), names, as_json)
        return
    if not model:
        raise InputError("MODEL is missing, expected a name, a folder, a .gguf file or a hub id")
    from visavis.evaluate.run import Options
    from visavis.evaluate.run import evaluate as run_suite

    extra = {"judge": judge, "judge_model": judge_model}
    options = Options(output, ties, compat, frames, max_records, extra)
    loaded_suite.choose(names)
    loaded = loading.load(model)
    with _Bar(show_progress()) as bar:
        found = run_suite(
            loaded,
            loaded_suite,
            data,
            tasks=names,
            options=options,
            report=bar.task,
            expect=bar.expect,
            progress=bar.advance,
        )
    if not found:  # another process prints
        return
    if as_json:
        print_json(found)
    else:
        _print(found)
    if found["incomplete"]:
        raise typer.Exit(1)


@evaluate.command()
def suites(as_json: JsonOption = False) -> None:
    """List the suites and their tasks.

    Tasks in brackets are listed and not run; --json gives the reason for each.

    [bold]Examples[/bold]

      visavis evaluate suites

      visavis evaluate suites --json
    """
    from visavis.evaluate.suite import load_suite, suite_names

    found = [load_suite(name) for name in suite_names()]
    if as_json:
        print_json(
            {
                one.name: {"title": one.title, "tasks": {t: s.status for t, s in one.tasks.items()}}
                for one in found
            }
        )
        return
    rows = [("suite", "tasks", "title")]
    for one in found:
        run_here = sum(not task.status for task in one.tasks.values())
        listed = len(one.tasks) - run_here
        rows.append((one.name, f"{run_here}" + (f" (+{listed})" if listed else ""), one.title))
    print_columns(rows)


@evaluate.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of finished runs.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path(
        "report.html"
    ),
    images: Annotated[bool, typer.Option(help="Show images in the galleries of failures.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Write one HTML page of runs.

    It has tables beside published scores, bars with 95 % intervals, timings and galleries of
    failures; for two runs also the paired difference.

    [bold]Examples[/bold]

      visavis evaluate report runs/nano --output nano.html

      visavis evaluate report runs/before runs/after --no-images
    """
    from visavis.evaluate.report import write_report

    written = write_report(runs, output, images=images)
    if as_json:
        print_json({"output": str(written), "runs": [str(run) for run in runs]})
    else:
        typer.echo(str(written))


@evaluate.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="FIRST", help="The folder of a run.")],
    second: Annotated[Path, typer.Argument(metavar="SECOND", help="The folder of another run.")],
    as_json: JsonOption = False,
) -> None:
    """Compare two runs record by record.

    Prints the mean difference (second minus first) in points, its 95 % bootstrap interval, and the
    p value of a sign-flip permutation test.

    [bold]Examples[/bold]

      visavis evaluate compare runs/before runs/after

      visavis evaluate compare runs/before runs/after --json
    """
    from visavis.evaluate.report import compare_runs, read_run

    found = compare_runs(read_run(first), read_run(second))
    if as_json:
        print_json({name: vars(one) for name, one in found.items()})
        return
    rows = [("task", "difference", "95 % interval", "p", "better", "worse")]
    for name, one in found.items():
        interval = f"{100 * one.low:+.1f} to {100 * one.high:+.1f}"
        rows.append(
            (
                name,
                f"{100 * one.difference:+.1f}",
                interval,
                f"{one.p_value:.3f}",
                str(one.better),
                str(one.worse),
            )
        )
    print_columns(rows)


@evaluate.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    task: Annotated[str, typer.Argument(metavar="TASK", help="Whose answers, as MMBench.")],
    table: Annotated[Path, typer.Option(help="The dataset's .tsv in VLMEvalKit's LMUData folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .xlsx or .tsv to write.")],
    as_json: JsonOption = False,
) -> None:
    """Write a run's answers as a prediction file that VLMEvalKit scores.

    The file has the columns of the dataset's table without images, and a column `prediction`.

    [bold]Examples[/bold]

      visavis evaluate export runs/a MMBench --table MMBench_DEV_EN.tsv --output a_MMBench.xlsx

      visavis evaluate export runs/a POPE --table POPE.tsv --output a_POPE.tsv --json
    """
    from visavis.evaluate.vlmevalkit import export_answers

    number = export_answers(run, task, table, output)
    if as_json:
        print_json({"output": str(output), "answers": number})
    else:
        typer.echo(f"{output}: {number} answers")


def _check(suite: Any, root: Path, names: list[str], as_json: bool) -> None:
    from visavis.evaluate.check import check_suite, fetch_commands

    found = check_suite(suite, root, names)
    commands = fetch_commands(suite, root, found)
    if as_json:
        print_json({"tasks": [vars(one) for one in found], "commands": commands})
    else:
        rows = [("task", "status", "records", "first problem")]
        rows += [
            (one.task, one.status, str(one.records), (one.problems or [""])[0]) for one in found
        ]
        print_columns(rows)
        if commands:
            typer.echo("\nTo fetch what is missing:")
            for command in commands:
                typer.echo(f"  {command}")
    if any(one.status not in ("ready", "not run") for one in found):
        raise typer.Exit(1)


def _print(found: dict[str, Any]) -> None:
    model = found["model"]
    typer.echo(
        f"{found['suite']}, {model['name']}, profile {model['profile']}, "
        f"{', '.join(model['precision'])}, fingerprint {model['fingerprint'][:16]}\n"
    )
    rows = [("task", "metric", "score", "95 % interval", "n", "published")]
    for name, task in found["tasks"].items():
        metric = task["headline"]
        low, high = task.get("interval", (None, None))
        anchors = found["anchors"].get(name, {})
        best = max(anchors, key=anchors.__getitem__) if anchors else ""
        rows.append(
            (
                name,
                metric,
                _number(task.get(metric)),
                "–" if low is None else f"{_number(low)} to {_number(high)}",
                str(task["n"]),
                f"{_number(anchors[best])} {best}" if best else "",
            )
        )
    print_columns(rows)
    if any(value is not None for value in found["averages"].values()):
        typer.echo("")
        print_columns(
            [("average", "score")] + [(n, _number(v)) for n, v in found["averages"].items()]
        )
    for one in found["incomplete"]:
        say(f"incomplete: {one['task']}: {one['reason']}")


def _number(value: float | None) -> str:
    """Return a share in percent, another number as it is."""
    if value is None:
        return "–"
    return f"{100 * value:.1f}" if value <= 1 else f"{value:.1f}"


class _Bar:
    """Progress on stderr: tasks and items of the task, each with the time taken and left."""

    def __init__(self, show: bool) -> None:
        self.show = show

    def __enter__(self) -> _Bar:
        if self.show:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(file=sys.stderr),
            )
            self.all = self.bar.add_task("tasks", total=None)
            self.items = self.bar.add_task("items", total=None)
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.show:
            self.bar.stop()

    def task(self, name: str, number: int, total: int) -> None:
        """Show that a task begins."""
        if self.show:
            self.bar.update(self.all, total=total, completed=number - 1)
            self.bar.update(self.items, description=name, total=None, completed=0)

    def expect(self, number: int) -> None:
        """Show how many items a task has."""
        if self.show:
            self.bar.update(self.items, total=number, completed=0)

    def advance(self, number: int) -> None:
        """Show that more items are done."""
        if self.show:
            self.bar.advance(self.items, number)
