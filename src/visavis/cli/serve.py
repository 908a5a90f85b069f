"""`visavis serve`: chat, embeddings, reranking and search behind the APIs that clients speak."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from visavis.cli.common import Loading, loads_a_model, say
from visavis.errors import InputError


def _named(values: list[str], what: str) -> dict[str, str]:
    """Return {"a": "x"} for ["a=x"]; what has no name of its own is named after itself."""
    named: dict[str, str] = {}
    for value in values:
        name, equals, target = value.partition("=")
        if not equals:
            name, target = Path(value).stem if Path(value).suffix else Path(value).name, value
        if not name or not target:
            raise InputError(f"{what} is {value!r}, expected NAME=PATH or PATH")
        if name in named:
            raise InputError(f"two {what}s are called {name}; name one of them, NAME=PATH")
        named[name] = target
    return named


@loads_a_model
def serve(
    model: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help="Models to serve, as MODEL or NAME=MODEL."),
    ] = None,
    more: Annotated[
        list[str], typer.Option("--model", "-m", help="Another way to name models: NAME=MODEL.")
    ] = [],  # noqa: B006  # typer copies it
    index: Annotated[
        list[str], typer.Option("--index", help="Index to search, as FILE or NAME=FILE.")
    ] = [],  # noqa: B006
    config: Annotated[
        Path | None, typer.Option("--config", help="YAML file of settings; options go before it.")
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on (127.0.0.1); others need an API key.")
    ] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port (8484).")] = None,
    allow_url: Annotated[
        list[str], typer.Option("--allow-url", help="Host that images may be fetched from.")
    ] = [],  # noqa: B006
    allow_host: Annotated[
        list[str], typer.Option("--allow-host", help="Name of this server in Host headers.")
    ] = [],  # noqa: B006
    allow_origin: Annotated[
        list[str], typer.Option("--allow-origin", help="Web site whose scripts may call (CORS).")
    ] = [],  # noqa: B006
    log_format: Annotated[
        str | None, typer.Option("--log-format", help="Log lines on stderr: text or json.")
    ] = None,
    *,
    loading: Loading,
) -> None:
    """Serve models behind the APIs of OpenAI, Ollama, Cohere, Jina, Voyage and vLLM.

    Models are loaded when they are first used. The environment variable VISAVIS_API_KEY sets a key
    that clients must send; docs/serving.md lists all settings and a block for each client.

    [bold]Examples[/bold]

      visavis serve nano

      visavis serve nano --index photos.idx --port 8000

      visavis serve --model small=nano --model big=./model.gguf --precision int8
    """
    from visavis.serve import require_web_packages, run_server

    require_web_packages()
    from visavis.serve.config import hash_key, make_config, read_config

    settings: dict[str, Any] = read_config(config) if config else {}
    given: dict[str, Any] = {
        "models": _named([*(model or []), *more], "model"),
        "indexes": _named(index, "index"),
        "load": {name: value for name, value in vars(loading).items() if value not in ("", None)},
        "host": host,
        "port": port,
        "allow_urls": allow_url,
        "allow_hosts": allow_host,
        "allow_origins": allow_origin,
        "log_format": log_format,
    }
    defaults = {name: value for name, value in vars(Loading()).items() if value}
    if given["load"] == defaults and "load" in settings:
        del given["load"]
    settings |= {name: value for name, value in given.items() if value not in (None, [], {})}
    if key := os.environ.get("VISAVIS_API_KEY"):
        settings["api_keys"] = [*settings.get("api_keys", []), hash_key(key)]
    if not settings.get("models"):
        raise InputError("no model to serve; name one, as in `visavis serve nano`")
    with suppress(KeyboardInterrupt):  # Ctrl-C is how a server ends
        run_server(
            make_config(settings), ready=lambda address: say(f"serving on {address} (API: /docs)")
        )
