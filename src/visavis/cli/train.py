"""`visavis train`: run a training recipe, or validate it with --dry-run (see `visavis.train`)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from visavis.cli.common import (
    EXIT_ERROR,
    JsonOption,
    human_bytes,
    print_columns,
    print_json,
    say,
    show_progress,
)

if TYPE_CHECKING:
    from visavis.train.dry_run import Plan, StagePlan
    from visavis.train.recipe import Recipe


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).")],
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME=VALUE", help="Overrides of recipe values."),
    ] = None,
    data: Annotated[
        Path, typer.Option("--data", metavar="DIR", help="Root folder of data sets.")
    ] = Path("data"),
    out: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Output directory; an interrupted run is resumed.",
        ),
    ] = Path("out"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Validate the recipe, estimate cost, and exit.")
    ] = False,
    flops: Annotated[
        float | None,
        typer.Option(
            metavar="FLOPS",
            help="Training throughput in FLOP/s for the time estimate of --dry-run.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a model from a recipe.

    Safe to interrupt; rerun the same command to resume.

    [bold]Examples[/bold]

      visavis train recipes/tiny-llava.yaml -o out/

      visavis train recipes/llava-1.5-pretrain.yaml --data DATA --dry-run

      visavis train recipes/nano.yaml --data DATA -o out/ stages.1.steps=100 seed=1

      torchrun --nproc-per-node 2 -m visavis train recipes/tiny-llave.yaml -o out/
    """
    from visavis.train.recipe import read_recipe

    chosen = read_recipe(recipe, changes or ())
    if dry_run:
        _plan(chosen, data, flops, as_json)
    else:
        _run(chosen, data, out, as_json)


def _plan(recipe: Recipe, data: Path, flops: float | None, as_json: bool) -> None:
    """Print the plan of a recipe, then all its problems."""
    from visavis.train.dry_run import plan

    made = plan(recipe, data, flops=flops)
    if as_json:
        print_json(made.to_dict())
    else:
        _show(made)
    for number, problem in enumerate(made.problems, 1):
        say(f"problem {number} of {len(made.problems)}: {problem}")
    if made.problems:
        raise typer.Exit(EXIT_ERROR)


def _run(recipe: Recipe, data: Path, out: Path, as_json: bool) -> None:
    """Train; only rank 0 prints."""
    from visavis.train.metrics import Progress
    from visavis.train.runner import run_recipe

    first = os.environ.get("RANK", "0") == "0"
    with Progress(first and show_progress()) as progress:
        folder = run_recipe(recipe, data, out, report=progress)
    if not first:
        return
    if as_json:
        print_json({"model": str(folder), "log": str(out / "log.jsonl")})
        return
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    typer.echo(f"{folder} ({human_bytes(size)}): trained model")


# ---- the plan, for people ------------------------------------------------------------------------


def _show(plan: Plan) -> None:
    typer.secho(plan.recipe, bold=True, nl=False)
    typer.echo(f"  ({plan.model})")
    for note in plan.notes:
        typer.echo(f"  {note}")
    for stage in plan.stages:
        _show_stage(stage)


def _show_stage(stage: StagePlan) -> None:
    typer.echo("")
    typer.secho(f"stage {stage.stage}", bold=True, nl=False)
    steps = "" if stage.kind != "steps" else f"{_count(stage.steps)} steps"
    tokens = "" if stage.tokens_per_step is None else f"of about {stage.tokens_per_step:,} tokens"
    typer.echo(f"  {' '.join(filter(None, (steps, tokens)))}")
    if stage.trains:
        columns = list(dict.fromkeys(key for row in stage.trains for key in row))
        rows = [[_cell(row.get(key, "")) for key in columns] for row in stage.trains]
        print_columns([["  part", *columns[1:]], *([f"  {row[0]}", *row[1:]] for row in rows)])
    if stage.sources:
        print_columns(
            [
                ["  source", "samples", "share", "tokens/sample", "epochs"],
                *(
                    [
                        f"  {row.source}",
                        _count(row.samples),
                        "?" if row.share is None else f"{row.share:.1%}",
                        "?" if row.tokens is None else f"{row.tokens:.0f}",
                        "?" if row.epochs is None else f"{row.epochs:.2f}",
                    ]
                    for row in stage.sources
                ),
            ]
        )
    if stage.memory:
        parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in stage.memory.items())
        total = human_bytes(sum(stage.memory.values()))
        typer.echo(f"  memory of each process: about {total} ({parts})")
    if stage.seconds is not None:
        typer.echo(f"  time: about {_duration(stage.seconds)}")


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _count(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"
