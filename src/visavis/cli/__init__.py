"""The `visavis` program: one file per command, each a thin skin over the Python API.

Nothing imported here imports torch, so that `visavis --help` is quick; commands import what they
need when they run.
"""

from __future__ import annotations

import warnings
from typing import Annotated

import typer

from visavis import __version__
from visavis.cli.bench import bench, doctor, fetch
from visavis.cli.chat import chat
from visavis.cli.common import Group, quiet_broken_pipe, say
from visavis.cli.compose import compose
from visavis.cli.convert import convert
from visavis.cli.data import data, mine
from visavis.cli.demo import demo
from visavis.cli.embed import embed
from visavis.cli.index import index
from visavis.cli.inspect import inspect
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
app.command()(demo)
app.command()(chat)
app.command()(embed)
app.add_typer(index)
app.add_typer(data)
app.command()(mine)
app.command()(compose)
app.command()(train)
app.command()(convert)
app.command()(inspect)
app.command()(bench)
app.command()(fetch)
app.command()(doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"visavis {__version__}")
        raise typer.Exit()


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the whole trace of an error, not one line.")
    ] = False,
) -> None:
    """visavis: ask about pictures and find pictures, offline, on any computer.

    Start with [bold]visavis demo[/bold].
    """


def main() -> None:
    """Run the program: exit code 0 done, 2 an error the user can mend, 130 interrupted."""
    warnings.showwarning = lambda message, *_: say(f"warning: {message}")
    with quiet_broken_pipe():
        app(prog_name="visavis")
