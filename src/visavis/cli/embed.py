"""`visavis embed`: embeddings of texts, images, videos and pages, as JSON lines or a .npy file."""

from __future__ import annotations

import re
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
from visavis.cli.corpus import CorpusOptions, embed_corpus
from visavis.errors import InputError
from visavis.utils import parse_json

_ADDRESS = re.compile(r"(?i)data:|[a-z][a-z0-9+.-]+://")


@loads_a_model
def embed(
    model: ModelArgument,
    texts: Annotated[
        list[str], typer.Option("--text", "-t", metavar="TEXT", help="Text; repeatable.")
    ] = [],  # noqa: B006 - typer copies it
    images: ImagesOption = [],  # noqa: B006 - typer copies it
    videos: VideosOption = [],  # noqa: B006
    documents: DocumentsOption = [],  # noqa: B006
    whole: Annotated[
        bool, typer.Option("--whole", help="One embedding per document instead of one per page.")
    ] = False,
    items: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='JSON lines such as {"image": "a.jpg", "text": "a cat"}; paths start at the file.',
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write float32 [N, D] to this .npy file; the shards of --corpus to this folder.",
        ),
    ] = None,
    instruction: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Instruction put before every item.")
    ] = None,
    dim: Annotated[
        int | None,
        typer.Option(metavar="N", help="Truncate embeddings to N dimensions (Matryoshka)."),
    ] = None,
    corpus: Annotated[
        list[str],
        typer.Option(
            "--corpus",
            metavar="PATH",
            help="Embed a folder, .parquet, .tar or URL (s3://…) into Parquet shards in the folder "
            "--output; rerun to resume. Repeatable.",
        ),
    ] = [],  # noqa: B006
    engine: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="What embeds a corpus: local (this process) or ray (a Ray cluster).",
        ),
    ] = "local",
    workers: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Processes of a Ray cluster that embed (all)."),
    ] = None,
    shard_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="Files or rows of a shard.")
    ] = 10_000,
    ocr: Annotated[
        bool, typer.Option("--ocr", help="Recognise text in images of a corpus, for searching.")
    ] = False,
    as_json: JsonOption = False,
    *,
    loading: Loading,
) -> None:
    """Compute unit-length embeddings of texts, images, videos and document pages.

    Output order: texts, images, videos, documents, --items. Without --output, one JSON line each.

    [bold]Examples[/bold]

      visavis embed nano --text "a cat" --image cat.jpg

      visavis embed nano --items captions.jsonl --output vectors.npy

      visavis embed adapter/ --base Qwen/Qwen2-VL-2B-Instruct --profile vlm2vec-v2 -t "a cat"

      visavis embed nano --corpus s3://bucket/photos --output s3://bucket/vectors --engine ray
    """
    if corpus:
        _check_alone(texts, images, videos, documents, items, dim)
        options = CorpusOptions(engine, workers, shard_size, instruction or "", ocr)
        embed_corpus(model, corpus, output, options, loading, as_json=as_json)
        return
    if not (texts or images or videos or documents or items):
        raise InputError(
            "nothing to embed: give --text, --image, --video, --document or --items (each but "
            "the last is repeatable), or a whole --corpus"
        )
    if output is not None and not output.endswith(".npy"):
        raise InputError(f"--output is {output!r}, expected a name that ends in .npy")

    import numpy as np

    from visavis.utils import write_atomically

    named = [(text, text) for text in texts] + named_visuals(images, videos, documents, whole)
    named += read_items(items) if items else []
    shown, wanted = [name for name, _ in named], [item for _, item in named]
    if not wanted:
        raise InputError(f"nothing to embed: --items {items} holds no lines")
    loaded = loading.load(model)
    vectors = loaded.embed(wanted, instruction=instruction, dim=dim, progress=show_progress())
    if output is not None:
        try:
            with write_atomically(Path(output)) as temporary, temporary.open("wb") as file:
                np.save(file, vectors)
        except OSError as error:
            raise InputError(f"cannot write {output}: {error}") from error
        summary = {"output": output, "shape": list(vectors.shape), "model": loaded.name}
        if as_json:
            print_json(summary)
        else:
            typer.echo(f"{output}: {len(vectors)} embeddings of {vectors.shape[1]} dimensions")
        return
    rows = [[round(float(x), 7) for x in vector] for vector in vectors]
    if as_json:
        print_json({"model": loaded.name, "items": shown, "vectors": rows})
        return
    for item, row in zip(shown, rows, strict=True):
        print_json({"item": item, "vector": row})


def _check_alone(*others: object) -> None:
    """Refuse single items beside a corpus."""
    if any(others):
        raise InputError(
            "--corpus stands beside --text, --image, --video, --document, --items or --dim; embed "
            "single items in a command of their own, and cut the vectors of a corpus when it is "
            "searched"
        )


def named_visuals(
    images: list[Path], videos: list[Path], documents: list[Path], whole: bool
) -> list[tuple[Any, Any]]:
    """Return images, videos and document pages, each with its name."""
    from visavis.inputs import Document
    from visavis.processing.pdf import pages

    found: list[tuple[Any, Any]] = []
    for visual in visuals_of(images, videos, documents):
        name = str(visual.source)
        if isinstance(visual, Document) and not whole:
            numbered = enumerate(pages(visual), 1)
            found += [(f"{name}#page={number}", page) for number, page in numbered]
        else:
            found.append((name, visual))
    return found


def read_items(path: Path) -> list[tuple[Any, Any]]:
    """Return the item of each line of a JSON lines file as it stands there, and with its paths
    from the file's folder; errors name the line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # U+2028 is part of a text
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read --items {path}: {error}; expected JSON lines") from error
    items = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = parse_json(line)
        except ValueError as error:
            raise InputError(f"{path} line {number} is not JSON: {error}") from error
        if not isinstance(item, (str, dict)):
            raise InputError(
                f"{path} line {number} holds a {type(item).__name__}, expected a text in quotes "
                'or {"image": …, "text": …}'
            )
        found = item if isinstance(item, str) else {k: _from(path, k, v) for k, v in item.items()}
        items.append((item, found))
    return items


def _from(path: Path, key: str, value: Any) -> Any:
    """Return the value of an item's key; paths start at the folder of the file."""
    if isinstance(value, list):
        return [_from(path, key, one) for one in value]
    is_path = key in ("image", "video", "document") and isinstance(value, str) and value.strip()
    if not is_path or value.startswith("~") or _ADDRESS.match(value):
        return value
    return str(path.parent / value)
