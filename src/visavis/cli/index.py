"""`visavis index`: add pictures to an index file and find them again by words or by picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visavis.cli.console import (
    DeviceOption,
    ImagesOption,
    JsonOption,
    ModelOption,
    PrecisionOption,
    print_columns,
    print_json,
    say,
    show_progress,
)
from visavis.errors import InputError

if TYPE_CHECKING:
    from visavis.index import Index

index = typer.Typer(
    name="index", help="Make and search an index of pictures.", no_args_is_help=True
)
IndexArgument = Annotated[Path, typer.Argument(metavar="INDEX", help="The index file.")]


@index.command()
def add(
    index_path: IndexArgument,
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="Pictures, or folders of pictures.")
    ],
    model: ModelOption = "nano",
    as_json: JsonOption = False,
    precision: PrecisionOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Add pictures; known ones cost nothing, changed ones are read again.

    Interrupt it whenever you like: the same command goes on where it stopped.

    [bold]Examples[/bold]

      visavis index add photos.idx ~/Pictures

      visavis index add photos.idx cat.jpg dog.jpg --json
    """
    opened = _open(index_path, model, precision, device)
    report = opened.add(paths, progress=show_progress())
    for _, reason in report.failed:
        say(f"left out: {reason}")
    if as_json:
        print_json(
            {
                "index": str(opened.path),
                "items": len(opened),
                "added": report.added,
                "changed": report.changed,
                "unchanged": report.unchanged,
                "failed": [{"source": s, "reason": r} for s, r in report.failed],
            }
        )
        return
    counts = [
        f"{number} {what}"
        for number, what in (
            (report.added, "added"),
            (report.changed, "changed"),
            (report.unchanged, "unchanged"),
            (len(report.failed), "left out"),
        )
        if number
    ]
    typer.echo(f"{', '.join(counts)}; {opened.path} holds {len(opened)} items")


@index.command()
def search(
    index_path: IndexArgument,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What to look for.")] = "",
    images: ImagesOption = [],  # noqa: B006 - typer copies it
    k: Annotated[int, typer.Option("-k", help="How many hits.")] = 10,
    source: Annotated[
        str | None, typer.Option("--filter", help='Only paths like this, for example "*/2024/*".')
    ] = None,
    model: ModelOption = "nano",
    as_json: JsonOption = False,
    precision: PrecisionOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Find pictures by words, by a picture, or by both.

    [bold]Examples[/bold]

      visavis index search photos.idx "two cats on a sofa" -k 5

      visavis index search photos.idx --image cat.jpg --filter "*/2024/*"

      visavis index search photos.idx "the same at night" --image bridge.jpg --json
    """
    if not text.strip() and not images:
        raise InputError("nothing to look for: give TEXT, --image PATH or both")
    query: dict[str, Any] = {"image": images or None, "text": text or None}
    hits = _open(index_path, model, precision, device).search(query, k=k, filter=source)
    if as_json:
        print_json([{"score": round(h.score, 6), "source": h.source} for h in hits])
    elif hits:
        print_columns([[f"{hit.score:z.3f}", hit.source] for hit in hits])
    else:
        say("no hits: the index holds nothing" + (f" like {source}" if source else ""))


@index.command()
def prune(
    index_path: IndexArgument,
    model: ModelOption = "nano",
    as_json: JsonOption = False,
) -> None:
    """Forget pictures whose files no longer exist.

    [bold]Example[/bold]

      visavis index prune photos.idx
    """
    gone = _open(index_path, model, "auto", "auto").prune()
    if as_json:
        print_json({"removed": gone})
    else:
        typer.echo("\n".join([*gone, f"{len(gone)} removed"]))


def _open(path: Path, model: str, precision: str, device: str) -> Index:
    import visavis

    return visavis.Index(path, visavis.load(model, precision=precision, device=device))
