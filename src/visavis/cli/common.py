"""Shared by all commands: error lines, exit codes, printing, options for loading a model."""

from __future__ import annotations

import inspect
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from typer.core import TyperGroup

from visavis.errors import NonFiniteError, VisavisError

if TYPE_CHECKING:
    from visavis.api import Model
    from visavis.inputs import Visual


EXIT_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE

# The panels of `visavis --help`, in this order.
PANELS = USE, SEARCH, TRAIN, EVALUATE, CONVERT, MACHINE = (
    "Use",
    "Search",
    "Train",
    "Evaluate",
    "Convert",
    "Machine",
)


class Group(TyperGroup):
    """Command group that prints errors as one line on stderr and sets the exit code."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the commands sorted by panel; typer would put groups last."""
        names = super().list_commands(ctx)
        panels = {name: getattr(one, "rich_help_panel", USE) for name, one in self.commands.items()}
        return sorted(names, key=lambda name: PANELS.index(panels[name]))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Accept --debug at any position, as people often append it to a command."""
        words = args[: args.index("--")] if "--" in args else args
        if "--debug" in words:
            args = ["--debug", *(word for word in words if word != "--debug"), *args[len(words) :]]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        if isinstance(sys.stdout, io.TextIOWrapper):  # file names need not be UTF-8
            sys.stdout.reconfigure(errors="backslashreplace")
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
    """Exit without a traceback when stdout is closed early (`visavis … | head`)."""
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
    """Print a message on stderr as one line."""
    typer.echo(f"visavis: {' '.join(message.split())}", err=True)


def print_json(value: Any) -> None:
    """Print one JSON document on stdout.

    Raises:
        NonFiniteError: a number is NaN or infinite, which JSON cannot hold; the message names it.
    """
    try:
        typer.echo(json.dumps(value, ensure_ascii=False, default=str, allow_nan=False))
    except ValueError as error:
        place, number = next(_non_finite(value), ("", None))
        if number is None:
            raise
        raise NonFiniteError(
            f"the result {place or 'itself'} is {number}, which JSON cannot hold. The weights are "
            "damaged, or overflow in this precision: try another precision or other weights."
        ) from error


def _non_finite(value: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """Yield the places and numbers of a JSON value that are NaN or infinite."""
    if isinstance(value, float) and not math.isfinite(value):
        yield place, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _non_finite(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _non_finite(inner, f"{place}[{number}]")


def print_columns(rows: Sequence[Sequence[str]]) -> None:
    """Print rows with aligned columns; the last column is not padded."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        typer.echo("  ".join(cells).rstrip())


def human_bytes(number: float) -> str:
    """Format a number of bytes in decimal units: 98362432 -> "98.4 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def show_progress() -> bool:
    """Return whether stderr is a terminal that can show a progress bar."""
    return sys.stderr.isatty()


PANEL = "Model loading"
MODEL_HELP = "Name of `visavis models` (nano), folder, .gguf file or Hugging Face Hub id."

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help=MODEL_HELP),
]
ModelOption = Annotated[str, typer.Option("--model", "-m", metavar="MODEL", help=MODEL_HELP)]
ImagesOption = Annotated[
    list[Path], typer.Option("--image", "-i", metavar="FILE", help="Image file; repeatable.")
]
VideosOption = Annotated[
    list[Path],
    typer.Option(
        "--video",
        metavar="FILE",
        help="Video file, animated image or folder of frames; repeatable.",
    ),
]
DocumentsOption = Annotated[
    list[Path], typer.Option("--document", metavar="FILE", help="PDF file; repeatable.")
]
ChatTemplateOption = Annotated[
    str,
    typer.Option(
        "--chat-template",
        metavar="NAME",
        help="Chat template to use if the checkpoint has none.",
        rich_help_panel=PANEL,
    ),
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="MODEL",
        help="Base language model for a LoRA adapter or a projector-only checkpoint.",
        rich_help_panel=PANEL,
    ),
]
VisionTowerOption = Annotated[
    str | None,
    typer.Option(
        "--vision-tower",
        metavar="MODEL",
        help="Vision tower of a checkpoint stored without one; for a .gguf file, its mmproj file.",
        rich_help_panel=PANEL,
    ),
]


@dataclass(frozen=True)
class Loading:
    """Arguments of `visavis.load`, given as command-line options."""

    precision: Annotated[
        str,
        typer.Option(
            "--precision",
            metavar="TYPE",
            help="Weight data type: auto, f32, bf16, f16, int8 or int4.",
            rich_help_panel=PANEL,
        ),
    ] = "auto"
    device: Annotated[
        str,
        typer.Option(
            "--device",
            metavar="DEVICE",
            help="Device to run on: auto, cpu or cuda.",
            rich_help_panel=PANEL,
        ),
    ] = "auto"
    chat_template: ChatTemplateOption = ""
    profile: Annotated[
        str,
        typer.Option(
            "--profile",
            metavar="NAME",
            help="Embedding profile if the checkpoint has none: llave, vlm2vec-v1, vlm2vec-v2, "
            "gme, ops-mm, b3, unime-v2, e5-v, qwen3-vl-embedding, qwen3-vl-reranker or plain.",
            rich_help_panel=PANEL,
        ),
    ] = ""
    base: BaseOption = None
    vision_tower: VisionTowerOption = None
    image_cache: Annotated[
        str | None,
        typer.Option(
            "--image-cache",
            metavar="DIR",
            help="Directory of the on-disk image-feature cache (auto: default cache location).",
            rich_help_panel=PANEL,
        ),
    ] = None

    max_pixels: Annotated[
        int | None,
        typer.Option(
            "--max-pixels",
            metavar="N",
            help="Largest image to read, in pixels (64 million); larger ones are read reduced.",
            rich_help_panel=PANEL,
        ),
    ] = None

    def load(self, model: str) -> Model:
        """Load a model with these options."""
        import visavis

        options = dict(vars(self))
        if (number := options.pop("max_pixels")) is not None:
            from visavis.processing.images import set_max_pixels

            set_max_pixels(number)
        return visavis.load(model, **options)


def loads_a_model(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of `Loading` to a command, which receives them as `loading`."""
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
    """Return the inputs of the options in prompt order: images, videos, documents."""
    from visavis.inputs import Document, Image, Video

    return [*map(Image, images), *map(Video, videos), *map(Document, documents)]
