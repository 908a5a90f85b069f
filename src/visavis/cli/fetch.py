"""`visavis fetch`: bring a bundled model's weights into the cache, so that all works offline."""

from __future__ import annotations

from typing import Annotated

import typer

from visavis.cli.console import human_bytes, print_columns, print_json
from visavis.cli.options import JsonOption


def fetch(
    name: Annotated[str, typer.Argument(help="A bundled model.")] = "nano",
    verify: Annotated[bool, typer.Option(help="Check every file's hash, even untouched ones.")] = (
        False
    ),
    as_json: JsonOption = False,
) -> None:
    """Fetch the weights of a bundled model into the cache (VISAVIS_CACHE names another folder).

    [bold]Examples[/bold]

      visavis fetch nano

      visavis fetch nano --verify --json
    """
    from visavis.checkpoints import bundled

    paths = bundled.fetch(name, verify=verify)
    if as_json:
        print_json({part: str(path) for part, path in paths.items()})
        return
    print_columns(
        [
            [part.replace("_", " "), human_bytes(path.stat().st_size), str(path)]
            for part, path in paths.items()
        ]
    )
