"""`visavis rerank`: documents in the order of how likely they fit a query."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
    show_progress,
    visuals_of,
)
from visavis.cli.embed import named_visuals, read_items
from visavis.errors import InputError


@loads_a_model
def rerank(
    model: ModelArgument,
    query: Annotated[
        str, typer.Argument(metavar="QUERY", help="The text that is looked for.")
    ] = "",
    texts: Annotated[
        list[str],
        typer.Option("--text", "-t", metavar="TEXT", help="Text to be scored; repeatable."),
    ] = [],  # noqa: B006 - typer copies it
    images: ImagesOption = [],  # noqa: B006
    videos: VideosOption = [],  # noqa: B006
    documents: DocumentsOption = [],  # noqa: B006
    items: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='JSON lines such as {"image": "a.jpg", "text": "a cat"}; paths start at the file.',
        ),
    ] = None,
    query_images: Annotated[
        list[Path],
        typer.Option("--query-image", metavar="FILE", help="Image of the query; repeatable."),
    ] = [],  # noqa: B006
    instruction: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What counts as fitting the query.")
    ] = None,
    top: Annotated[
        int | None, typer.Option("--top-k", "-k", metavar="N", help="Print the best N only.")
    ] = None,
    as_json: JsonOption = False,
    *,
    loading: Loading,
) -> None:
    """Score texts, images, videos and document pages for a query with a reranker.

    Prints a line for each, the likeliest first: its score between 0 and 1, and its name.

    [bold]Examples[/bold]

      visavis rerank reranker/ "a dog" -i a.jpg -i b.jpg --profile qwen3-vl-reranker
    """
    if not (query or query_images):
        raise InputError("nothing to look for: give QUERY, --query-image or both")
    if top is not None and top < 1:
        raise InputError(f"--top-k is {top}, expected 1 or more")
    named: list[tuple[Any, Any]] = [(text, text) for text in texts]
    named += named_visuals(images, videos, documents, whole=False)
    named += read_items(items) if items else []
    if not named:
        raise InputError(
            "nothing to score: give --text, --image, --video, --document or --items (each but the "
            "last is repeatable)"
        )
    from visavis.inputs import Prompt, Text

    asked = Prompt.of([*visuals_of(query_images, [], []), *([Text(query)] if query else [])])
    loaded = loading.load(model)
    wanted = [item for _, item in named]
    scores = loaded.rerank(asked, wanted, instruction=instruction, progress=show_progress())
    order = (-scores).argsort(kind="stable")[:top].tolist()
    rows = [
        {"index": number, "score": round(float(scores[number]), 7), "item": named[number][0]}
        for number in order
    ]
    if as_json:
        print_json({"model": loaded.name, "results": rows})
        return
    for row in rows:
        typer.echo(f"{row['score']:.4f}  {row['item']}")
