"""The options that commands share: a model and how it is loaded, and what is shown to it.

    @loads_a_model                                      an option for each argument of visavis.load
    def chat(model: ModelArgument, *, loading: Loading) -> None:
        loaded = loading.load(model)

Knows no command.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from visavis.api import Model
    from visavis.prompt import Visual

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
TurnsOption = Annotated[
    str,
    typer.Option(
        "--turns",
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
    turns: TurnsOption = ""
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
    from visavis.prompt import Document, Image, Video

    return [*map(Image, images), *map(Video, videos), *map(Document, documents)]
