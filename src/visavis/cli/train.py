"""`visavis train`: run a recipe, or say what it would do. Training itself is in `visavis.train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from visavis.cli.console import (
    human_bytes,
    print_columns,
    print_json,
    show_progress,
)
from visavis.cli.options import JsonOption


def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as recipes/nano.yaml.")],
    data: Annotated[Path, typer.Option("--data", help="The folder of data sets.")] = Path("data"),
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Where the run lives; an unfinished one goes on.")
    ] = Path("out"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print what would be trained.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a model from a recipe; run the same command again to resume.

    [bold]Examples[/bold]

      visavis train recipes/nano.yaml --data DATA -o out/

      visavis train recipes/nano.yaml --data DATA --dry-run --json
    """
    from visavis.train.recipe import read_recipe

    plan = read_recipe(recipe)
    if dry_run:
        from visavis.train.plan import plan_table

        header, *rows = plan_table(plan, data)
        if as_json:
            print_json([dict(zip(header, row, strict=True)) for row in rows])
        else:
            print_columns([header, *rows])
        return
    from visavis.train.progress import Progress
    from visavis.train.run import run_recipe

    with Progress(show_progress()) as progress:
        folder = run_recipe(plan, data, out, report=progress)
    if as_json:
        print_json({"model": str(folder), "log": str(out / "log.jsonl")})
        return
    size = sum(file.stat().st_size for file in folder.iterdir())
    typer.echo(f"{folder} ({human_bytes(size)}): try `visavis chat {folder} TEXT --image PICTURE`")
