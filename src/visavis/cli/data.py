"""`visavis data`: validate training data (see `visavis.data.check`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visavis.cli.common import (
    JsonOption,
    print_columns,
    print_json,
    say,
    show_progress,
)

if TYPE_CHECKING:
    from visavis.data.check import CheckedSource, Findings


EXIT_FAULTY = 1
MAX_LISTED = 5  # of each kind of problem of a source; --json lists all
BAR = 40
data = typer.Typer(name="data", no_args_is_help=True, help="Validate training data.")

DataOption = Annotated[
    Path, typer.Option("--data", metavar="DIR", help="Root folder of data sets.")
]
SOURCE = "RECIPE|FILE"


@data.callback()
def about() -> None:
    """Validate training data."""


@data.command()
def check(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar=SOURCE,
            help="Recipe (.yaml), data file, data folder or data set name.",
        ),
    ],
    root: DataOption = Path("data"),
    test: Annotated[
        list[str],
        typer.Option("--test", metavar=SOURCE, help="Held-out recipe or data; repeatable."),
    ] = [],  # noqa: B006 - typer copies it
    images: Annotated[
        Path | None,
        typer.Option("--images", metavar="DIR", help="Base folder of image paths in a data file."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Validate training data: records, images, sequence lengths, duplicates, leaks.

    For a recipe, tokens are counted with its model, and sources that no stage reads are held out.
    Exit code 0 if all data is valid, 1 if not, 2 on an error.

    [bold]Examples[/bold]

      visavis data check recipes/tiny-llava.yaml --data DATA

      visavis data check train.jsonl --images images/ --test heldout.jsonl --json
    """
    from visavis.data import check as checking
    from visavis.utils import track

    entries = [entry for name in sources for entry in _entries(name, root, images, False)]
    entries += [entry for name in test for entry in _entries(name, root, images, True)]

    def tracked(numbers: range, name: str) -> Iterator[int]:
        return track(numbers, name, weights=[1] * len(numbers), show=show_progress())

    found = checking.check(entries, track=tracked)
    if as_json:
        print_json([_facts(one) for one in found])
    else:
        for one in found:
            _show(one)
        _show_total(found)
    if any(one.problems for one in found):
        raise typer.Exit(EXIT_FAULTY)


def _entries(name: str, root: Path, images: Path | None, test: bool) -> Iterator[CheckedSource]:
    """Yield the sources that one command-line argument names."""
    from visavis.data.check import CheckedSource, guess_format
    from visavis.data.sources import SourceConfig

    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        yield from _recipe_entries(path, root, test)
        return
    kind = guess_format(path)
    folder = "" if images is None else str(images.absolute())
    where = name if kind == "records" else str(path.absolute())
    spec = SourceConfig(format=kind, path=where, images=folder)
    yield CheckedSource(name, spec, root, test)


def _recipe_entries(path: Path, root: Path, test: bool) -> Iterator[CheckedSource]:
    from visavis.data.check import CheckedSource
    from visavis.errors import VisavisError
    from visavis.train.recipe import StepsStage, read_recipe, sources_of
    from visavis.train.runner import open_model

    recipe = read_recipe(path)
    encoder = None
    try:
        model = open_model(recipe.model, precision="auto", device="cpu", seed=recipe.seed)
        encoder = model.encoder
    except VisavisError as error:
        say(f"tokens are estimated, because the recipe's model cannot be loaded: {error}")
    trained = {name for stage in recipe.stages for name in sources_of(stage)}
    limits: dict[str, int] = {}
    for stage in recipe.stages:
        if not isinstance(stage, StepsStage):
            continue
        for part in (stage.generative, stage.contrastive):
            if part is not None and part.max_tokens is not None:
                for source in part.sources:
                    limits[source] = min(part.max_tokens, limits.get(source, part.max_tokens))
    for name, spec in recipe.data.items():
        held_out = test or name not in trained
        yield CheckedSource(name, spec, root, held_out, encoder, limits.get(name))


# ---- output --------------------------------------------------------------------------------------


def _facts(one: Findings) -> dict[str, Any]:
    return {
        "source": one.entry.name,
        "format": one.entry.spec.format,
        "test": one.entry.test,
        "samples": one.samples,
        "images": one.pictures,
        "videos": one.videos,
        "negatives": one.negatives,
        "tokens": {
            "estimated": one.entry.encoder is None,
            "sequences": len(one.lengths),
            "median": one.quantile(0.5),
            "p95": one.quantile(0.95),
            "max": one.quantile(1.0),
            "histogram": [{"below": edge, "sequences": count} for edge, count in one.histogram()],
        },
        "problems": [
            {"kind": problem.kind, "id": problem.id, "text": problem.text}
            for problem in one.problems
        ],
        "duplicates": [{"id": id, "of": first} for id, first in one.copies],
        "repeated_ids": one.repeated_ids,
        "leaked_images": [{"id": id, "in": first} for id, first in one.seen_pictures],
        "unused_negatives": one.unused,
    }


def _show(one: Findings) -> None:
    from visavis.data.check import ERRORS

    role = "held out" if one.entry.test else "trained on"
    typer.secho(f"{one.entry.name} ({one.entry.spec.format}, {role})", bold=True)
    counts = {
        "samples": one.samples,
        "images": one.pictures,
        "videos": one.videos,
        "negatives": one.negatives,
    }
    typer.echo("  " + ", ".join(f"{count:,} {name}" for name, count in counts.items() if count))
    if one.lengths:
        how = "estimated from texts, without images" if one.entry.encoder is None else "exact"
        typer.echo(
            f"  tokens ({how}): median {one.quantile(0.5):,}, 95 % up to {one.quantile(0.95):,}, "
            f"longest {one.quantile(1.0):,}"
        )
        _show_bars(one.histogram())
    kinds = Counter(problem.kind for problem in one.problems)
    for kind, count in kinds.items():
        typer.secho(f"  {count:,} × {ERRORS[kind]}", fg="red")
        told = [problem for problem in one.problems if problem.kind == kind][:MAX_LISTED]
        for problem in told:
            typer.echo(f"    {problem.id}: {' '.join(problem.text.split())}")
        _show_rest(count)
    for title, pairs in (
        ("samples duplicate an earlier one", one.copies),
        ("samples contain an image of the training data", one.seen_pictures),
    ):
        if pairs:
            typer.secho(f"  {len(pairs):,} {title}", fg="yellow")
            for id, first in pairs[:MAX_LISTED]:
                typer.echo(f"    {id}: {first}")
            _show_rest(len(pairs))
    if one.repeated_ids:
        listed = ", ".join(one.repeated_ids[:MAX_LISTED])
        typer.secho(f"  {len(one.repeated_ids):,} repeated ids: {listed}", fg="yellow")
    if one.unused:
        typer.secho(f"  {one.unused:,} mined negatives have no record here", fg="yellow")


def _show_bars(histogram: list[tuple[int, int]]) -> None:
    most = max(count for _, count in histogram)
    rows = [
        (f"  < {edge:,}", "█" * max(1, round(BAR * count / most)) + f" {count:,}")
        for edge, count in histogram
    ]
    print_columns(rows)


def _show_rest(count: int) -> None:
    if count > MAX_LISTED:
        typer.echo(f"    … and {count - MAX_LISTED:,} more (--json lists all)")


def _show_total(found: list[Findings]) -> None:
    problems = sum(len(one.problems) for one in found)
    samples = sum(one.samples for one in found if not one.entry.test)
    if problems:
        typer.secho(f"{problems:,} problems; fix them before training", fg="red", bold=True)
    else:
        typer.secho(f"{samples:,} valid training samples", fg="green", bold=True)
