"""`visavis chat`: generate an answer to one prompt, or hold a conversation in the terminal."""

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

GENERATION = "Generation"
HELP = (
    "Type a message. /image PATH attaches an image, /video PATH a video, /document PATH a PDF; "
    "/new starts a new conversation, Ctrl-D exits."
)


@loads_a_model
def chat(
    model: ModelArgument,
    text: Annotated[
        str,
        typer.Argument(
            metavar="TEXT",
            help="Prompt. Default: read stdin, or start a conversation in a terminal.",
        ),
    ] = "",
    images: ImagesOption = [],  # noqa: B006 - typer copies it
    videos: VideosOption = [],  # noqa: B006
    documents: DocumentsOption = [],  # noqa: B006
    max_new_tokens: Annotated[
        int,
        typer.Option(
            "--max-new-tokens",
            "-n",
            metavar="N",
            help="Maximum number of tokens to generate (at least 1).",
            rich_help_panel=GENERATION,
        ),
    ] = 256,
    temperature: Annotated[
        float,
        typer.Option(
            metavar="FLOAT",
            help="Sampling temperature (>= 0); 0 is greedy decoding.",
            rich_help_panel=GENERATION,
        ),
    ] = 0.0,
    top_k: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Top-k sampling: keep the k most probable tokens (>= 0; 0 disables).",
            rich_help_panel=GENERATION,
        ),
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(
            metavar="FLOAT",
            help="Nucleus sampling: keep the smallest set of tokens with cumulative "
            "probability >= p (0 < p <= 1).",
            rich_help_panel=GENERATION,
        ),
    ] = 1.0,
    min_p: Annotated[
        float,
        typer.Option(
            metavar="FLOAT",
            help="Min-p sampling: drop tokens below this fraction of the highest probability "
            "(0 to 1; 0 disables).",
            rich_help_panel=GENERATION,
        ),
    ] = 0.0,
    repetition_penalty: Annotated[
        float,
        typer.Option(
            metavar="FLOAT",
            help="Penalty on tokens of the prompt and the answer (> 0; 1 disables).",
            rich_help_panel=GENERATION,
        ),
    ] = 1.0,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="Random seed for sampling.", rich_help_panel=GENERATION),
    ] = None,
    beams: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Number of beams for beam search (>= 1; 1 disables).",
            rich_help_panel=GENERATION,
        ),
    ] = 1,
    length_penalty: Annotated[
        float,
        typer.Option(
            metavar="FLOAT",
            help="Exponent of the length in beam scores: > 0 favours longer answers.",
            rich_help_panel=GENERATION,
        ),
    ] = 1.0,
    stop: Annotated[
        list[str],
        typer.Option(metavar="TEXT", help="Stop sequence; repeatable.", rich_help_panel=GENERATION),
    ] = [],  # noqa: B006
    schema: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Constrain the answer to the JSON schema in this file.",
            rich_help_panel=GENERATION,
        ),
    ] = None,
    regex: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX",
            help="Constrain the answer to a regular expression.",
            rich_help_panel=GENERATION,
        ),
    ] = None,
    as_json: JsonOption = False,
    *,
    loading: Loading,
) -> None:
    """Chat with a model about images, videos and documents, or about text alone.

    In the prompt, images come first, then videos, document pages and the text.

    [bold]Examples[/bold]

      visavis chat nano "What is in this image?" --image cat.jpg

      visavis chat nano "Which one is older?" -i one.jpg -i two.jpg --json

      visavis chat Qwen/Qwen2-VL-2B-Instruct "What happens?" --video clip.mp4

      visavis chat llava.gguf --vision-tower mmproj.gguf

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
    """Hold a conversation: read messages from the terminal and print each answer."""
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
