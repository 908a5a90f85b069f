"""`visavis mcp`: an index as tools of an assistant, over the Model Context Protocol."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from visavis.cli.common import Loading, ModelOption, loads_a_model
from visavis.errors import InputError


@loads_a_model
def mcp(
    index: Annotated[
        Path, typer.Argument(metavar="FILE", help="Index file; created by add_folder.")
    ],
    folder: Annotated[
        list[Path],
        typer.Option("--folder", metavar="DIR", help="Folder that may be read; repeatable."),
    ] = [],  # noqa: B006  # typer copies it
    model: ModelOption = "nano",
    *,
    loading: Loading,
) -> None:
    """Serve an index to an assistant over stdin and stdout (Model Context Protocol).

    Tools: search, similar, describe_image, add_folder. An assistant starts this command itself;
    docs/serving.md has the lines for its settings.

    [bold]Examples[/bold]

      visavis mcp photos.idx

      visavis mcp photos.idx --folder ~/photos --model nano
    """
    if importlib.util.find_spec("mcp") is None:
        raise InputError(
            "this needs the package mcp, which is not installed; run `pip install 'visavis[mcp]'`"
        )
    from visavis.serve.mcp import Library, make_server

    make_server(Library(lambda: loading.load(model), index, folder)).run("stdio")
