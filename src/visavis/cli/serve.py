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
        typer.Argument(metavar="MODEL", help="Model to serve, MODEL or NAME=MODEL; repeatable."),
    ] = None,
    more: Annotated[
        list[str], typer.Option("--model", "-m", metavar="MODEL", help="The same as an option.")
    ] = [],  # noqa: B006  # typer copies it
    index: Annotated[
        list[str],
        typer.Option("--index", metavar="FILE", help="Index, FILE or NAME=FILE; repeatable."),
    ] = [],  # noqa: B006
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="YAML settings; options override it."),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(metavar="HOST", help="Address (127.0.0.1); others need an API key."),
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, metavar="PORT", help="Port (8484).")
    ] = None,
    allow_url: Annotated[
        list[str],
        typer.Option("--allow-url", metavar="HOST", help="Host to fetch images from; repeatable."),
    ] = [],  # noqa: B006
    allow_host: Annotated[
        list[str],
        typer.Option("--allow-host", metavar="HOST", help="Name of this server; repeatable."),
    ] = [],  # noqa: B006
    allow_origin: Annotated[
        list[str],
        typer.Option("--allow-origin", metavar="URL", help="Web site for CORS; repeatable."),
    ] = [],  # noqa: B006
    allow_folder: Annotated[
        list[Path],
        typer.Option(
            "--allow-folder", metavar="DIR", help="Folder the page may index; repeatable."
        ),
    ] = [],  # noqa: B006
    log_format: Annotated[
        str | None,
        typer.Option("--log-format", metavar="text|json", help="Format of the log on stderr."),
    ] = None,
    *,
    loading: Loading,
) -> None:
    """Serve models behind the APIs of OpenAI, Ollama, Cohere, Jina, Voyage and vLLM.

    Models are loaded on first use. The environment variable VISAVIS_API_KEY sets an API key.

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
        "allow_folders": allow_folder,
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
