"""`visavis chat`: ask a model, with pictures or without; talk with it when no text is given."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from visavis.cli.console import (
    DeviceOption,
    ImagesOption,
    JsonOption,
    ModelArgument,
    PrecisionOption,
    print_json,
    say,
)
from visavis.errors import InputError, VisavisError

if TYPE_CHECKING:
    from visavis.api import Model
    from visavis.generate.answer import Reply
    from visavis.prompt import Message

HELP = "Type a question. /image PATH adds a picture to it, /new starts over, Ctrl-D ends."


def chat(
    model: ModelArgument,
    text: Annotated[
        str,
        typer.Argument(metavar="TEXT", help="The question; without it, talk or read stdin."),
    ] = "",
    images: ImagesOption = [],  # noqa: B006 - typer copies it
    max_new_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = 256,
    temperature: Annotated[
        float, typer.Option(help="0: the likeliest answer; higher: more variety.")
    ] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Repeat the answer of an earlier seed.")] = None,
    as_json: JsonOption = False,
    precision: PrecisionOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Ask about pictures, or anything.

    [bold]Examples[/bold]

      visavis chat nano "What is in this picture?" --image cat.jpg

      visavis chat nano "Which one is older?" -i one.jpg -i two.jpg --json

      visavis chat model.gguf            (no text: talk with it)

      cat question.txt | visavis chat nano
    """
    talks = not text and sys.stdin.isatty()
    if not text and not talks:
        text = sys.stdin.read().strip()
    if talks and as_json:
        raise InputError("--json needs the TEXT argument or text on stdin: it prints one answer")

    import visavis

    loaded = visavis.load(model, precision=precision, device=device)
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    if talks:
        _talk(loaded, images, settings)
        return
    reply = loaded.chat(text, images, stream=not as_json, **settings)  # type: ignore[arg-type]
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
        _print_stream(reply)


def _print_stream(reply: Reply) -> None:
    for piece in reply:
        typer.echo(piece, nl=False)
        sys.stdout.flush()
    typer.echo()


def _talk(model: Model, images: list[Path], settings: dict[str, int | float | None]) -> None:
    """Answer line after line, each with everything said before."""
    from visavis.prompt import Image, Message, Text

    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 - gives input() line editing and history
    typer.echo(HELP, err=True)
    history: list[Message] = []
    waiting = list(images)
    while True:
        for image in waiting:
            typer.echo(f"(picture: {image})", err=True)
        try:
            line = input("> ").strip()
        except EOFError:
            typer.echo()
            return
        if line.startswith("/image "):
            waiting.append(Path(line.removeprefix("/image ").strip()).expanduser())
        elif line == "/new":
            history, waiting = [], []
        elif line.startswith("/"):
            typer.echo(HELP, err=True)
        elif line:
            try:
                reply = model.chat(line, waiting, history=history, stream=True, **settings)  # type: ignore[arg-type]
                _print_stream(reply)
            except VisavisError as error:
                say(f"error: {error}")
                waiting = []
                continue
            asked = Message("user", (*map(Image, waiting), Text(line)))
            history += [asked, Message("assistant", (Text(reply.text),))]
            waiting = []
