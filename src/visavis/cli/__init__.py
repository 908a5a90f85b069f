"""The `visavis` command line: one file per command, each a thin layer over the Python API.

Nothing imported here imports torch, so `visavis --help` is fast; commands import their dependencies
when they run.
"""

from __future__ import annotations

import warnings
from typing import Annotated

import typer

from visavis import __version__
from visavis.cli.bench import bench, doctor, fetch
from visavis.cli.chat import chat
from visavis.cli.common import (
    CONVERT,
    EVALUATE,
    MACHINE,
    SEARCH,
    TRAIN,
    USE,
    Group,
    quiet_broken_pipe,
    say,
)
from visavis.cli.compose import compose
from visavis.cli.convert import convert
from visavis.cli.data import data
from visavis.cli.demo import demo
from visavis.cli.embed import embed
from visavis.cli.evaluate import evaluate
from visavis.cli.index import index
from visavis.cli.inspect import inspect
from visavis.cli.mcp import mcp
from visavis.cli.mine import mine
from visavis.cli.models import models
from visavis.cli.rerank import rerank
from visavis.cli.serve import serve
from visavis.cli.train import train

app = typer.Typer(
    name="visavis",
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command(rich_help_panel=USE)(demo)
app.command(rich_help_panel=USE)(chat)
app.command(rich_help_panel=USE)(embed)
app.command(rich_help_panel=USE)(rerank)
app.command(rich_help_panel=USE)(serve)
app.command(rich_help_panel=USE)(models)
app.add_typer(index, rich_help_panel=SEARCH)
app.command(rich_help_panel=SEARCH)(mcp)
app.command(rich_help_panel=TRAIN)(train)
app.command(rich_help_panel=TRAIN)(compose)
app.add_typer(data, rich_help_panel=TRAIN)
app.command(rich_help_panel=TRAIN)(mine)
app.add_typer(evaluate, rich_help_panel=EVALUATE)
app.command(rich_help_panel=CONVERT)(convert)
app.command(rich_help_panel=CONVERT)(inspect)
app.command(rich_help_panel=MACHINE)(fetch)
app.command(rich_help_panel=MACHINE)(bench)
app.command(rich_help_panel=MACHINE)(doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"visavis {__version__}")
        raise typer.Exit()


@app.callback()
def about(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Show the version and exit.",
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the full traceback of an error.")
    ] = False,
) -> None:
    """Vision-language models: chat about images, embed and search them, train and convert.

    Start with [bold]visavis demo[/bold].
    """


def main() -> None:
    """Run the command line. Exit codes: 0 success, 2 user error, 130 interrupted."""
    warnings.showwarning = lambda message, *_: say(f"warning: {message}")
    with quiet_broken_pipe():
        app(prog_name="visavis")
