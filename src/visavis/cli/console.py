"""What the commands share: error lines, exit codes, printing. Knows no command."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from visavis.errors import VisavisError

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


class Group(TyperGroup):
    """Turns errors into one line on stderr and an exit code, for every command alike."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take --debug wherever it stands, because people add it at the end."""
        words = args[: args.index("--")] if "--" in args else args
        if "--debug" in words:
            args = ["--debug", *(word for word in words if word != "--debug"), *args[len(words) :]]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except VisavisError as error:
            if ctx.params.get("debug"):
                raise
            say(f"error: {error}")
            raise typer.Exit(EXIT_ERROR) from None
        except KeyboardInterrupt:
            if ctx.params.get("debug"):
                raise
            say("interrupted")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:
            raise typer.Exit(EXIT_BROKEN_PIPE) from None


@contextmanager
def quiet_broken_pipe() -> Iterator[None]:
    """End without a trace when whoever reads our output has stopped (`visavis … | head`)."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes stdout once more at its end: give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_BROKEN_PIPE)


def say(message: str) -> None:
    """Print one line on stderr, whatever the message looks like."""
    typer.echo(f"visavis: {' '.join(message.split())}", err=True)


def print_json(value: Any) -> None:
    """Print one JSON document on stdout."""
    typer.echo(json.dumps(value, ensure_ascii=False, default=str))


def print_columns(rows: Sequence[Sequence[str]]) -> None:
    """Print rows with their columns aligned; the last column is as long as it likes."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        typer.echo("  ".join(cells).rstrip())


def human_bytes(number: float) -> str:
    """Return 98362432 as "98.4 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def show_progress() -> bool:
    """Whether anybody sees a progress bar."""
    return sys.stderr.isatty()
