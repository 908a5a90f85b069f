"""`visavis chat`: ask a model about pictures, videos and documents, or without any; talk with it
when no text is given."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visavis.cli.common import (
    DocumentsOption,
    ImagesOption,
    JsonOption,
    Loading,
    ModelArgument,
    VideosOption,
    loads_a_model,
    print_json,
    say,
    visuals_of,
)
from visavis.errors import InputError, VisavisError

if TYPE_CHECKING:
    from visavis.api import Model
    from visavis.generate.streaming import Reply
    from visavis.inputs import Message, Visual

HELP = (
    "Type a question. /image PATH adds a picture to it, /video PATH a video, /document PATH a PDF; "
    "/new starts over, Ctrl-D ends."
)


@loads_a_model
def chat(
    model: ModelArgument,
    text: Annotated[
        str,
        typer.Argument(metavar="TEXT", help="The question; without it, talk or read stdin."),
    ] = "",
    images: ImagesOption = [],  # noqa: B006 - typer copies it
    videos: VideosOption = [],  # noqa: B006
    documents: DocumentsOption = [],  # noqa: B006
    max_new_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = 256,
    temperature: Annotated[
        float, typer.Option(help="0: the likeliest answer; higher: more variety.")
    ] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Repeat the answer of an earlier seed.")] = None,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest that reach this.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Leave out what is less likely than this.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: repeat less.")] = 1.0,
    beams: Annotated[
        int, typer.Option(help="Search for the likeliest answer with so many beams.")
    ] = 1,
    length_penalty: Annotated[
        float, typer.Option(help="With --beams: above 0 prefers longer answers, below 0 shorter.")
    ] = 1.0,
    stop: Annotated[list[str], typer.Option(help="A text that ends the answer.")] = [],  # noqa: B006
    schema: Annotated[
        Path | None, typer.Option(help="A file with the JSON schema that the answer keeps to.")
    ] = None,
    regex: Annotated[
        str | None, typer.Option(help="A regular expression that the answer matches.")
    ] = None,
    as_json: JsonOption = False,
    *,
    loading: Loading,
) -> None:
    """Ask about pictures, videos and documents, or anything.

    What is shown stands before the text: pictures, then videos, then the pages of documents.

    [bold]Examples[/bold]

      visavis chat nano "What is in this picture?" --image cat.jpg

      visavis chat nano "Which one is older?" -i one.jpg -i two.jpg --json

      visavis chat Qwen/Qwen2-VL-2B-Instruct "What happens?" --video clip.mp4

      visavis chat llava.gguf --vision-tower mmproj.gguf            (no text: talk with it)

      visavis chat nano "How many cats?" -i cat.jpg --regex "[0-9]+"

      cat question.txt | visavis chat nano
    """
    talks = not text and sys.stdin.isatty()
    if not text and not talks:
        text = sys.stdin.read().strip()
    if talks and as_json:
        raise InputError("--json needs the TEXT argument or text on stdin: it prints one answer")

    loaded = loading.load(model)
    visuals = visuals_of(images, videos, documents)
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "beams": beams,
        "length_penalty": length_penalty,
        "stop": stop,
        "schema": None if schema is None else _read_schema(schema),
        "regex": regex,
    }
    if talks:
        _talk(loaded, visuals, settings)
        return
    reply = loaded.chat(text, visuals, stream=not as_json and beams == 1, **settings)
    if as_json:
        print_json(
            {
                "text": reply.text,
                "finish_reason": reply.finish_reason,
                "usage": vars(reply.usage),
                "timings": vars(reply.timings),
            }
        )
    else:
        _print(reply)


def _print(reply: Reply) -> None:
    typer.echo(reply.text, nl=False)
    for piece in reply:  # of a stream
        typer.echo(piece, nl=False)
        sys.stdout.flush()
    typer.echo()


def _read_schema(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read the schema {str(path)!r}: {error}; check the path."
        ) from None


def _talk(model: Model, visuals: list[Visual], settings: dict[str, Any]) -> None:
    """Answer line after line, each with everything said before."""
    from visavis.inputs import Document, Image, Message, Text, Video

    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 - gives input() line editing and history
    typer.echo(HELP, err=True)
    history: list[Message] = []
    kinds = {"/image": Image, "/video": Video, "/document": Document}
    waiting = list(visuals)
    while True:
        for visual in waiting:
            kind, name = type(visual).__name__.lower(), str(visual.source)
            typer.echo(f"({kind}: {name})", err=True)
        try:
            line = input("> ").strip()
        except EOFError:
            typer.echo()
            return
        command, _, rest = line.partition(" ")
        if command in kinds and rest.strip():
            waiting.append(kinds[command](Path(rest.strip()).expanduser()))
        elif line == "/new":
            history, waiting = [], []
        elif line.startswith("/"):
            typer.echo(HELP, err=True)
        elif line:
            try:
                stream = settings.get("beams", 1) == 1
                reply = model.chat(line, waiting, history=history, stream=stream, **settings)
                _print(reply)
            except VisavisError as error:
                say(f"error: {error}")
                waiting = []
                continue
            asked = Message("user", (*waiting, Text(line)))
            history += [asked, Message("assistant", (Text(reply.text),))]
            waiting = []
