"""What the commands share: error lines, exit codes, printing. Knows no command."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from typer.core import TyperGroup

from visavis.errors import VisavisError

if TYPE_CHECKING:
    from visavis.api import Model
    from visavis.inputs import Visual


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


PANEL = "How the model is loaded"

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A bundled name (nano), a folder, a .gguf file or a hub id."
    ),
]
ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="A bundled name, a folder, a .gguf file or a hub id.")
]
ImagesOption = Annotated[
    list[Path], typer.Option("--image", "-i", help="A picture; may be given several times.")
]
VideosOption = Annotated[
    list[Path], typer.Option("--video", help="A video, an animation or a folder of its frames.")
]
DocumentsOption = Annotated[list[Path], typer.Option("--document", help="A PDF.")]
ChatTemplateOption = Annotated[
    str,
    typer.Option(
        "--chat-template",
        help="The chat format, by name, of a model that brings none.",
        rich_help_panel=PANEL,
    ),
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        "--base", help="The model below, of an adapter or a first stage.", rich_help_panel=PANEL
    ),
]
VisionTowerOption = Annotated[
    str | None,
    typer.Option(
        "--vision-tower",
        help="The vision tower that a checkpoint names and lacks; of a .gguf file its mmproj file.",
        rich_help_panel=PANEL,
    ),
]


@dataclass(frozen=True)
class Loading:
    """How a model is loaded; see `visavis.load`."""

    precision: Annotated[
        str,
        typer.Option(
            "--precision",
            help="What weights are kept in: auto, f32, bf16, f16, int8 or int4.",
            rich_help_panel=PANEL,
        ),
    ] = "auto"
    device: Annotated[
        str, typer.Option("--device", help="auto, cpu or cuda.", rich_help_panel=PANEL)
    ] = "auto"
    chat_template: ChatTemplateOption = ""
    profile: Annotated[
        str,
        typer.Option(
            "--profile",
            help="How to embed, by name, where files do not say: llave, vlm2vec-v1 or vlm2vec-v2.",
            rich_help_panel=PANEL,
        ),
    ] = ""
    base: BaseOption = None
    vision_tower: VisionTowerOption = None
    image_cache: Annotated[
        str | None,
        typer.Option(
            "--image-cache",
            help="A folder, or auto, that keeps what pictures become for the next time.",
            rich_help_panel=PANEL,
        ),
    ] = None

    def load(self, model: str) -> Model:
        """Load a model so."""
        import visavis

        return visavis.load(model, **vars(self))


def loads_a_model(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each field of `Loading`; it takes them as `loading`."""
    types = get_type_hints(Loading, include_extras=True)
    options = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=types[field.name],
        )
        for field in fields(Loading)
    ]

    @wraps(command)
    def run(**given: Any) -> None:
        loading = Loading(**{name: given.pop(name) for name in types})
        command(**given, loading=loading)

    own = inspect.signature(command, eval_str=True)
    kept = [one for one in own.parameters.values() if one.name != "loading"]
    run.__signature__ = own.replace(parameters=[*kept, *options])  # type: ignore[attr-defined]
    return run


def visuals_of(images: list[Path], videos: list[Path], documents: list[Path]) -> list[Visual]:
    """Return what options name: pictures first, then videos, then documents."""
    from visavis.inputs import Document, Image, Video

    return [*map(Image, images), *map(Video, videos), *map(Document, documents)]
