"""`visavis index`: build and search an index of images, videos and document pages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from visavis.cli.index_care import export, load, prune, repair, stats
from visavis.errors import InputError

if TYPE_CHECKING:
    from visavis.index import AddReport, Hit, Index

index = typer.Typer(
    name="index",
    help="Build and search an index of images, videos and document pages.",
    no_args_is_help=True,
)
IndexArgument = Annotated[
    str, typer.Argument(metavar="INDEX", help="Index file, or postgresql:// address.")
]
OcrOption = Annotated[
    bool, typer.Option("--ocr", help="Recognise text in images and scanned pages.")
]
SegmentsOption = Annotated[
    bool, typer.Option("--segments", help="Cut videos into segments that are found by themselves.")
]
FILTER_HELP = (
    "Conditions such as 'kind:page folder:/papers after:2024-01 before:2025 tag=beach', or one "
    "glob on paths such as '*/2024/*'."
)


@index.command()
@loads_a_model
def add(
    index_path: IndexArgument,
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH", help="Images, videos, PDFs, or folders of them."),
    ],
    model: ModelOption = "nano",
    ocr: OcrOption = False,
    segments: SegmentsOption = False,
    metadata: Annotated[
        list[str],
        typer.Option("--set", metavar="KEY=VALUE", help="Metadata of all files; repeatable."),
    ] = [],  # noqa: B006 - typer copies it
    as_json: JsonOption = False,
    *,
    loading: Loading,
) -> None:
    """Add images, videos and PDF pages to an index.

    Unchanged files are skipped and changed files are embedded again. Safe to interrupt; rerun the
    same command to resume.

    [bold]Examples[/bold]

      visavis index add photos.idx ~/photos

      visavis index add papers.idx ~/papers --ocr --set project=thesis

      visavis index add photos.idx cat.jpg dog.jpg --json
    """
    values = _metadata(metadata)
    opened = _open(index_path, model, loading)
    report = opened.add(
        paths, progress=show_progress(), ocr=ocr, segments=segments, metadata=values or None
    )
    for _, reason in report.failed:
        say(f"skipped: {reason}")
    for (suffix, reason), count in sorted(report.left_out.items()):
        say(f"left out: {count} of suffix {suffix or 'none'} ({reason})")
    if as_json:
        print_json(_described(opened, report))
        return
    counts = [
        f"{number} {what}"
        for number, what in (
            (report.added, "added"),
            (report.changed, "changed"),
            (report.unchanged, "unchanged"),
            (report.removed, "removed"),
            (len(report.failed), "skipped"),
        )
        if number
    ]
    typer.echo(f"{', '.join(counts)}; {opened.store.name} holds {len(opened)} items")


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
    offset: Annotated[
        int, typer.Option("--offset", min=0, metavar="N", help="Results to leave out.")
    ] = 0,
    conditions: Annotated[
        str | None, typer.Option("--filter", metavar="FILTER", help=FILTER_HELP)
    ] = None,
    mode: Annotated[
        str,
        typer.Option(
            "--mode",
            metavar="MODE",
            help="hybrid: vectors and words; vector: vectors only; text: words only.",
        ),
    ] = "hybrid",
    negative: Annotated[
        str | None,
        typer.Option("--not", metavar="TEXT", help="Words that results should not be like."),
    ] = None,
    rerank: Annotated[
        str | None,
        typer.Option(
            "--rerank",
            metavar="MODEL",
            help="Model with a vector per token (ColQwen2) that ranks the first 100 again.",
        ),
    ] = None,
    sheet: Annotated[
        Path | None,
        typer.Option("--sheet", metavar="FILE", help="Write a contact sheet of the results."),
    ] = None,
    model: ModelOption = "nano",
    as_json: JsonOption = False,
    *,
    loading: Loading,
) -> None:
    """Search an index by text, by image, video or document, or by both.

    Results are sorted by cosine similarity, and by words of the query found in file names, captions
    and text inside of files, the best first.

    [bold]Examples[/bold]

      visavis index search photos.idx "two cats on a sofa" -k 5

      visavis index search photos.idx --image cat.jpg --filter "*/2024/*"

      visavis index search papers.idx "attention" --filter "kind:page after:2023" --mode text

      visavis index search photos.idx "the same at night" --image bridge.jpg --sheet found.png
    """
    from visavis.inputs import Message, Prompt, Text

    visuals = visuals_of(images, videos, documents)
    if not text.strip() and not visuals:
        raise InputError("nothing to search for: give TEXT, --image FILE or both")
    query = Prompt((Message("user", (*visuals, *([Text(text)] if text else []))),))
    opened = _open(index_path, model, loading)
    hits = opened.search(
        query,
        k,
        conditions,
        mode=mode,
        negative=negative,
        offset=offset,
        rerank=None if rerank is None else loading.load(rerank),
    )
    if sheet is not None:
        _write_sheet(sheet, opened, text or "the given image", hits)
        say(f"contact sheet: {sheet}")
    if as_json:
        print_json([_described_hit(hit) for hit in hits])
    elif hits:
        if not visuals and hits[0].is_weak(least := opened.model.profile.min_score):
            say(
                f"nothing like that: the best score is {hits[0].vector_score:.3f}, and hits below "
                f"{least:.3f} rarely show what was asked for"
            )
        has_words = any(hit.words or hit.late_score is not None for hit in hits)
        print_columns([[f"{hit.score:z.3f}", hit.source, *([hit.why] * has_words)] for hit in hits])
    else:
        say("no results: the index has no items" + (f" that match {conditions}" * bool(conditions)))


@index.command()
@loads_a_model
def watch(
    index_path: IndexArgument,
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER", help="Folders to follow.")],
    model: ModelOption = "nano",
    ocr: OcrOption = False,
    segments: SegmentsOption = False,
    rescan: Annotated[
        float,
        typer.Option(
            "--rescan", min=1, metavar="SECONDS", help="Scan everything again after this long."
        ),
    ] = 3600,
    as_json: JsonOption = False,
    *,
    loading: Loading,
) -> None:
    """Keep an index up to date with folders, until it is stopped.

    Files that are added, changed, moved or deleted are so in the index. A folder that cannot be
    reached, such as a network drive, is waited for; its items stay.

    [bold]Examples[/bold]

      visavis index watch photos.idx ~/photos
    """
    from visavis.index.watch import watch as rounds

    opened = _open(index_path, model, loading)
    options: dict[str, Any] = {"ocr": ocr, "segments": segments}
    say(f"following {', '.join(map(str, folders))} (Ctrl-C ends it)")
    for report in rounds(opened, folders, rescan_s=rescan, **options):
        for _, reason in report.failed:
            say(f"skipped: {reason}")
        if as_json:
            print_json({**vars(report), "items": len(opened)})
        elif not report.is_empty:
            typer.echo(
                f"{report.added} added, {report.changed} changed, {report.removed} removed; "
                f"{opened.store.name} holds {len(opened)} items"
            )


@index.command()
@loads_a_model
def migrate(
    index_path: Annotated[Path, typer.Argument(metavar="INDEX", help="Index file.")],
    model: ModelOption,
    drop: Annotated[
        bool, typer.Option("--drop", help="Remove items that cannot be embedded again.")
    ] = False,
    as_json: JsonOption = False,
    *,
    loading: Loading,
) -> None:
    """Move an index to another model: embed every item again.

    Searches with the old model continue until all is done. Safe to interrupt; rerun the same
    command to resume.

    [bold]Examples[/bold]

      visavis index migrate photos.idx --model ./other-model
    """
    from visavis.index.migrate import migrate as move
    from visavis.index.sqlite_store import SqliteStore

    store = SqliteStore(index_path.expanduser())
    report = move(store, loading.load(model), drop=drop, progress=show_progress())
    for _, reason in report.failed:
        say(f"cannot be embedded again: {reason}")
    if as_json:
        print_json(vars(report))
    elif report.is_done:
        typer.echo(f"{index_path} holds {report.items} items of {model} now")
    if not report.is_done:
        raise InputError(
            f"{len(report.failed)} items cannot be embedded again, so the index is still that of "
            "the old model; bring their files back, or give --drop to remove these items"
        )


index.command()(prune)
index.command()(stats)
index.command()(export)
index.command()(repair)
index.command()(load)


def _open(path: str, model: str, loading: Loading) -> Index:
    import visavis

    return visavis.Index(path, loading.load(model))


def _metadata(pairs: list[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise InputError(f"--set is {pair!r}, expected KEY=VALUE such as project=thesis")
    return dict(pair.split("=", 1) for pair in pairs)


def _described(opened: Index, report: AddReport) -> dict[str, Any]:
    return {
        "index": opened.store.name,
        "items": len(opened),
        "added": report.added,
        "changed": report.changed,
        "unchanged": report.unchanged,
        "removed": report.removed,
        "failed": [{"source": s, "reason": r} for s, r in report.failed],
        "left_out": [
            {"suffix": suffix, "reason": reason, "files": count}
            for (suffix, reason), count in sorted(report.left_out.items())
        ],
    }


def _described_hit(hit: Hit) -> dict[str, Any]:
    item = hit.item
    return {
        "score": round(hit.score, 6),
        "vector_score": None if hit.vector_score is None else round(hit.vector_score, 6),
        "late_score": None if hit.late_score is None else round(hit.late_score, 6),
        "words": list(hit.words),
        "why": hit.why,
        "source": hit.source,
        "kind": item.kind,
        "page": item.page,
        "begin_s": item.begin_s,
        "end_s": item.end_s,
        "date": item.date,
        "place": item.place,
        "text": item.text,
        "metadata": dict(item.metadata),
    }


def _write_sheet(path: Path, opened: Index, label: str, hits: list[Hit]) -> None:
    """Write the hits that have an image, in rows of five."""
    from PIL.Image import Image as PILImage

    from visavis.demo.sheet import SheetRow, draw_sheet
    from visavis.errors import VisavisError
    from visavis.index.items import title
    from visavis.utils import write_atomically

    shown: list[tuple[str, float, PILImage]] = []
    for hit in hits:
        try:
            found = hit.preview(512)
        except VisavisError as error:
            say(f"not on the sheet: {error}")
            continue
        if not isinstance(found, str):
            shown.append((title(hit.item), hit.score, found))
    rows = [
        SheetRow(label if not first else "", shown[first : first + 5])
        for first in range(0, len(shown), 5)
    ]
    subtitle = f"{len(opened)} items · model {opened.model.name} · best first"
    drawn = draw_sheet(label, subtitle, rows)
    with write_atomically(path) as temporary:
        drawn.save(temporary, "PNG" if path.suffix.lower() != ".jpg" else "JPEG")
