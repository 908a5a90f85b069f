"""`visavis bench`: how fast a model is here, beside what the machine would allow."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from visavis.cli.console import human_bytes, print_columns, print_json, say, show_progress
from visavis.cli.options import JsonOption, Loading, ModelArgument, loads_a_model
from visavis.errors import InputError


@loads_a_model
def bench(
    model: ModelArgument = "nano",
    runs: Annotated[int, typer.Option(help="How often each rate is measured.")] = 3,
    picture: Annotated[
        Path | None, typer.Option("--picture", help="Draw the shares reached into this .svg file.")
    ] = None,
    as_json: JsonOption = False,
    *,
    loading: Loading,
) -> None:
    """Measure a model on this machine: loading, reading, saying, embedding, and the floor of each.

    The floor is what the machine's memory and arithmetic, measured first, would allow at best;
    the share says how much of it is reached. Close other programs before you trust a number.

    [bold]Examples[/bold]

      visavis bench

      visavis bench model.gguf --precision bf16 --picture bench.svg --json
    """
    if picture is not None and picture.suffix != ".svg":
        raise InputError(f"--picture is {str(picture)!r}, expected a name that ends in .svg")

    from visavis.bench.measure import Report, measure
    from visavis.bench.picture import draw
    from visavis.files import write_atomically

    started = time.perf_counter()
    loaded = loading.load(model)
    report = None
    for said in measure(loaded, time.perf_counter() - started, runs=runs):
        if isinstance(said, Report):
            report = said
        elif show_progress():
            say(f"measuring {said}")
    assert report is not None
    if picture is not None:
        with write_atomically(picture) as temporary:
            temporary.write_text(draw(report), encoding="utf-8")
    if as_json:
        print_json(report.to_dict())
        return
    machine = report.machine
    typer.echo(
        f"{report.model}: {report.parameters / 1e6:.0f} M parameters, "
        f"{human_bytes(report.weight_bytes)} read for each token said, "
        f"{human_bytes(report.resident_bytes)} resident"
    )
    typer.echo(
        f"{machine.device}, {machine.threads} threads: reads {machine.bandwidth / 1e9:.1f} GB/s, "
        f"multiplies {machine.flops / 1e9:.0f} GFLOP/s ({machine.dtype})\n"
    )
    rows = [("what", "median", "lowest – highest", "the machine allows", "reached")]
    for row in report.rows:
        floor = "" if row.floor is None else f"{row.floor:.3g} {row.unit}"
        share = "" if row.share is None else f"{row.share:.0%}"
        spread = f"{row.lowest:.3g} – {row.highest:.3g}"
        rows.append((row.name, f"{row.value:.3g} {row.unit}", spread, floor, share))
    print_columns(rows)
