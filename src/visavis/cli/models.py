"""`visavis models`: the models that have a short name."""

from __future__ import annotations

import sys
from typing import Any

from visavis.cli.common import JsonOption, print_json


def models(as_json: JsonOption = False) -> None:
    """List the models that can be loaded by a short name: licence, size and tasks.

    Every command's --model and visavis.load take these names, beside hub ids and paths. A model is
    downloaded when it is first used; "here" marks those that are on this machine.

    [bold]Examples[/bold]

      visavis models

      visavis demo --model siglip2-base
    """
    rows = [_row(name) for name in _names()]
    if as_json:
        print_json(rows)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for heading in ("name", "size", "tasks", "licence", "here", "hub", ""):
        justify: Any = "right" if heading == "size" else "left"
        table.add_column(heading, justify=justify, no_wrap=heading != "")
    for row in rows:
        size = f"{row['parameters'] / 1e9:.2g} B" if row["parameters"] >= 1e9 else ""
        size = size or f"{row['parameters'] / 1e6:.0f} M"
        tasks, here = " ".join(row["tasks"]), "yes" if row["here"] else ""
        cells = (row["name"], size, tasks, row["licence"], here, row["hub"], row["note"])
        table.add_row(*cells)
    # A pipe has no width: rich would assume 80 columns and cut names short.
    Console(width=None if sys.stdout.isatty() else 170).print(table)


def _names() -> list[str]:
    from visavis.checkpoints.known_models import known_models

    return list(known_models())


def _row(name: str) -> dict[str, Any]:
    from visavis.checkpoints import bundled, hub
    from visavis.checkpoints.known_models import known_models

    model = known_models()[name]
    wanted = hub.parse(model.hub)
    if wanted is None:
        here = all(path.is_file() for path in bundled.files_of("nano"))
    else:
        here = hub.cached(wanted) is not None
    return {
        "name": name,
        "hub": model.hub,
        "licence": model.licence,
        "parameters": model.millions * 10**6,
        "tasks": list(model.tasks),
        "here": here,
        "note": model.note,
    }
