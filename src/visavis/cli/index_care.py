"""`visavis index prune`, `stats`, `export` and `repair`: no model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from visavis.cli.common import (
    JsonOption,
    human_bytes,
    print_columns,
    print_json,
    say,
    show_progress,
)
from visavis.errors import StoreError

if TYPE_CHECKING:
    from visavis.index.store import VectorStore

IndexArgument = Annotated[
    str, typer.Argument(metavar="INDEX", help="Index file, or postgresql:// address.")
]
_MOST_FOLDERS = 20  # lines of `stats`; --json has all


def prune(index_path: IndexArgument, as_json: JsonOption = False) -> None:
    """Remove items whose file, page or segment no longer exists.

    Prints the removed items.

    [bold]Examples[/bold]

      visavis index prune photos.idx
    """
    from visavis.index.overview import prune as forget

    gone = forget(_opened(index_path))
    if as_json:
        print_json({"removed": gone})
    else:
        typer.echo("\n".join([*gone, f"{len(gone)} removed"]))


def load(
    index_path: IndexArgument,
    shards: Annotated[
        str, typer.Argument(metavar="SHARDS", help="Folder or URL that `visavis embed` wrote.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Put the items of shards into an index, which is made if it is not there.

    Nothing is embedded. Safe to interrupt and to repeat: an item is in the index once.

    [bold]Examples[/bold]

      visavis index load photos.idx vectors/

      visavis index load postgresql://anna@db/photos s3://bucket/vectors
    """
    from visavis.index.open_store import open_store
    from visavis.index.shards import load_shards

    store = open_store(index_path)
    put, failed = load_shards(store, shards, progress=show_progress())
    if as_json:
        print_json({"index": store.name, "items": store.count(), "put": put, "failed": failed})
    else:
        typer.echo(
            f"{put} put, {failed} without a vector; {store.name} holds {store.count()} items"
        )


def stats(index_path: IndexArgument, as_json: JsonOption = False) -> None:
    """Show what an index holds: items by kind and folder, and files that were left out.

    Files are left out by suffix and reason, as counted when their folder was last added.

    [bold]Examples[/bold]

      visavis index stats photos.idx
    """
    from visavis.index.overview import stats as counted

    found = counted(_opened(index_path))
    if as_json:
        print_json(found)
        return
    kinds = ", ".join(f"{number} {kind}" for kind, number in found["kinds"].items())
    rows = [
        ["model", f"{found.get('model')} ({found.get('dim')} dimensions)"],
        ["items", f"{found['items']}" + f" ({kinds})" * bool(kinds)],
    ]
    if found["bytes"] is not None:
        rows.append(["size", human_bytes(found["bytes"])])
    folders = sorted(found["folders"].items(), key=lambda one: (-one[1], one[0]))
    rows += [[f"{number}", folder] for folder, number in folders[:_MOST_FOLDERS]]
    if len(folders) > _MOST_FOLDERS:
        rows.append(["…", f"{len(folders) - _MOST_FOLDERS} more folders (--json shows them)"])
    rows += [
        [f"{one['files']}", f"left out: {one['suffix'] or 'no suffix'} ({one['reason']})"]
        for one in found["left_out"]
    ]
    print_columns(rows)


def export(
    index_path: IndexArgument,
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="File that ends in .parquet or .jsonl.")
    ],
    conditions: Annotated[
        str | None,
        typer.Option("--filter", metavar="FILTER", help="Conditions, as in `search`."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the items of an index with their vectors as Parquet or JSON lines.

    Parquet needs pyarrow. The output is replaced in one step.

    [bold]Examples[/bold]

      visavis index export photos.idx photos.parquet
    """
    from visavis.index import Filter
    from visavis.index.overview import export as written

    number = written(_opened(index_path), output, Filter.of(conditions))
    if as_json:
        print_json({"items": number, "output": str(output)})
    else:
        typer.echo(f"{number} items written to {output}")


def repair(
    index_path: Annotated[Path, typer.Argument(metavar="INDEX", help="Index file.")],
    as_json: JsonOption = False,
) -> None:
    """Rebuild a damaged index from what can be read of it.

    The damaged file is kept under another name. Add your folders again afterwards: only what was
    lost is embedded.

    [bold]Examples[/bold]

      visavis index repair photos.idx
    """
    from visavis.index.repair import repair as rebuilt

    report = rebuilt(index_path.expanduser())
    if as_json:
        print_json(vars(report))
        return
    typer.echo(f"{report.items} items kept, {report.lost} lost; {report.kept} is the damaged file")
    say(f"add what was lost with: visavis index add {index_path} FOLDER")


def _opened(path: str) -> VectorStore:
    from visavis.index.open_store import open_store

    store = open_store(path)
    if not store.exists():
        raise StoreError(f"there is no index file {store.name}; check the spelling")
    return store
