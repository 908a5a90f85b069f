"""`visavis demo`: index, search and chat on sample images of installed packages."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from visavis.cli.common import (
    JsonOption,
    Loading,
    ModelOption,
    loads_a_model,
    print_json,
    say,
    show_progress,
)

if TYPE_CHECKING:
    from visavis.demo.run import DemoResult


@loads_a_model
def demo(
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Folder for the index and the contact sheet."
        ),
    ] = Path("visavis-demo"),
    serve: Annotated[
        bool, typer.Option(help="Serve the web page afterwards, until Ctrl-C; never with --json.")
    ] = True,
    port: Annotated[
        int,
        typer.Option(
            min=0, max=65535, metavar="PORT", help="Port of the web page; a free one if taken."
        ),
    ] = 8484,
    model: ModelOption = "nano",
    as_json: JsonOption = False,
    *,
    loading: Loading,
) -> None:
    """Search sample images by text and by image, ask about one, then serve a web page.

    Uses photographs of scikit-image and scikit-learn; install them with `visavis[demo]`.

    [bold]Examples[/bold]

      visavis demo

      visavis demo --no-serve --output demo/

      visavis demo --model siglip2-base

      visavis demo --json > demo.json
    """
    serve = serve and not as_json
    if serve:
        from visavis.serve import require_web_packages

        require_web_packages()  # now, not after minutes of work

    from visavis.demo.made import DOCUMENT_QUERY
    from visavis.demo.run import TEXT_QUERIES, run_demo

    loaded = loading.load(model)
    result = run_demo(loaded, output, progress=show_progress())
    if as_json:
        _print_json(result)
        return
    _print_result(result)
    if serve:
        from visavis.serve import serve_page

        with suppress(KeyboardInterrupt):  # Ctrl-C is how this page ends
            serve_page(
                loaded,
                result.index,
                port=port,
                examples=(*TEXT_QUERIES, DOCUMENT_QUERY),
                ready=lambda address: say(f"the page is at {address} (Ctrl-C ends it)"),
            )


def _print_result(result: DemoResult) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from visavis.demo.run import QUESTION, title

    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.add_column("query")
    for heading in ("best", "second", "third"):
        table.add_column(heading, no_wrap=True)
        table.add_column("", justify="right", no_wrap=True)
    for search in result.searches:
        cells = []
        for hit in search.hits[:3]:
            cells += [title(hit.source), f"{hit.score:z.2f}"]
        table.add_row(search.label, *cells)
    # A pipe has no width: rich would assume 80 columns and cut names short.
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if result.reply is not None:
        typer.echo(f"{title(result.asked_about)}: {QUESTION}\n  {result.reply.text.strip()}\n")
    pace = f"{len(result.index)} items indexed in {result.index_seconds:.1f} s"
    typer.echo(f"{pace}; contact sheet: {result.sheet_path}")


def _print_json(result: DemoResult) -> None:
    from visavis.demo.run import QUESTION

    print_json(
        {
            "items": len(result.index),
            "index": str(result.index.path),
            "index_seconds": round(result.index_seconds, 3),
            "contact_sheet": str(result.sheet_path),
            "searches": [
                {
                    "query": str(search.query),
                    "hits": [{"score": round(h.score, 4), "source": h.source} for h in search.hits],
                }
                for search in result.searches
            ],
            "question": QUESTION,
            "image": str(result.asked_about),
            "answer": None if result.reply is None else result.reply.text,
        }
    )
