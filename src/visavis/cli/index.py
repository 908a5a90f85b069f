"""`visavis index`: build and search an index of images, videos and document pages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from visavis.cli.common import (
    DocumentsOption,
    ImagesOption,
    JsonOption,
    Loading,
    ModelOption,
    VideosOption,
    loads_a_model,
    print_columns,
    print_json,
    say,
    show_progress,
    visuals_of,
)
from visavis.errors import InputError

if TYPE_CHECKING:
    from visavis.index import Index

index = typer.Typer(
    name="index",
    help="Build and search an index of images, videos and document pages.",
    no_args_is_help=True,
)
IndexArgument = Annotated[Path, typer.Argument(metavar="INDEX", help="Index file.")]


@index.command()
@loads_a_model
def add(
    index_path: IndexArgument,
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH", help="Images, videos, PDFs, or folders of them."),
    ],
    model: ModelOption = "nano",
    as_json: JsonOption = False,
    *,
    loading: Loading,
) -> None:
    """Add images, videos and PDF pages to an index.

    Unchanged files are skipped and changed files are embedded again. Safe to interrupt; rerun the
    same command to resume.

    [bold]Examples[/bold]

      visavis index add photos.idx ~/photos

      visavis index add photos.idx cat.jpg dog.jpg --json
    """
    opened = _open(index_path, model, loading)
    report = opened.add(paths, progress=show_progress())
    for _, reason in report.failed:
        say(f"skipped: {reason}")
    for (suffix, reason), count in sorted(report.left_out.items()):
        say(f"left out: {count} of suffix {suffix or 'none'} ({reason})")
    if as_json:
        print_json(
            {
                "index": str(opened.path),
                "items": len(opened),
                "added": report.added,
                "changed": report.changed,
                "unchanged": report.unchanged,
                "failed": [{"source": s, "reason": r} for s, r in report.failed],
                "left_out": [
                    {"suffix": suffix, "reason": reason, "files": count}
                    for (suffix, reason), count in sorted(report.left_out.items())
                ],
            }
        )
        return
    counts = [
        f"{number} {what}"
        for number, what in (
            (report.added, "added"),
            (report.changed, "changed"),
            (report.unchanged, "unchanged"),
            (len(report.failed), "skipped"),
        )
        if number
    ]
    typer.echo(f"{', '.join(counts)}; {opened.path} holds {len(opened)} items")


@index.command()
@loads_a_model
def search(
    index_path: IndexArgument,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="Query text.")] = "",
    images: ImagesOption = [],  # noqa: B006 - typer copies it
    videos: VideosOption = [],  # noqa: B006
    documents: DocumentsOption = [],  # noqa: B006
    k: Annotated[
        int, typer.Option("--top-k", "-k", min=1, metavar="N", help="Number of results.")
    ] = 10,
    source: Annotated[
        str | None,
        typer.Option("--filter", metavar="GLOB", help='Only paths that match, such as "*/2024/*".'),
    ] = None,
    model: ModelOption = "nano",
    as_json: JsonOption = False,
    *,
    loading: Loading,
) -> None:
    """Search an index by text, by image, video or document, or by both.

    Results are sorted by cosine similarity, the highest first.

    [bold]Examples[/bold]

      visavis index search photos.idx "two cats on a sofa" -k 5

      visavis index search photos.idx --image cat.jpg --filter "*/2024/*"

      visavis index search photos.idx "the same at night" --image bridge.jpg --json
    """
    from visavis.inputs import Message, Prompt, Text

    visuals = visuals_of(images, videos, documents)
    if not text.strip() and not visuals:
        raise InputError("nothing to search for: give TEXT, --image FILE or both")
    query = Prompt((Message("user", (*visuals, *([Text(text)] if text else []))),))
    opened = _open(index_path, model, loading)
    hits = opened.search(query, k=k, filter=source)
    if as_json:
        print_json([{"score": round(h.score, 6), "source": h.source} for h in hits])
    elif hits:
        if not visuals and hits[0].score < (least := opened.model.profile.min_score):
            say(
                f"nothing like that: the best score is {hits[0].score:.3f}, and hits below "
                f"{least:.3f} rarely show what was asked for"
            )
        print_columns([[f"{hit.score:z.3f}", hit.source] for hit in hits])
    else:
        say("no results: the index has no items" + (f" that match {source}" if source else ""))


@index.command()
@loads_a_model
def prune(
    index_path: IndexArgument,
    model: ModelOption = "nano",
    as_json: JsonOption = False,
    *,
    loading: Loading,
) -> None:
    """Remove items whose file or page no longer exists.

    Prints the removed items.

    [bold]Examples[/bold]

      visavis index prune photos.idx
    """
    gone = _open(index_path, model, loading).prune()
    if as_json:
        print_json({"removed": gone})
    else:
        typer.echo("\n".join([*gone, f"{len(gone)} removed"]))


def _open(path: Path, model: str, loading: Loading) -> Index:
    import visavis

    return visavis.Index(path, loading.load(model))
