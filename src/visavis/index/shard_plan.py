"""The plan of embedding a corpus: which of its parts go into which shard, and their items.

    folders, Parquet, tars, URLs ── make_plan ──► [PlannedShard(parts), …] ── read_items ──► items

A shard is done or not done: a run that is repeated makes the missing ones. Files of images, videos
and PDFs are taken together, Parquet files by ranges of rows, a tar (as WebDataset writes them) is a
shard of its own. Paths are read as they are, URLs (`s3://…`) through fsspec.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visavis.data.readers import Table
from visavis.data.tar_shards import members
from visavis.errors import InputError, StoreError, VisavisError
from visavis.index.names import page_source
from visavis.inputs import (
    DOCUMENT_SUFFIXES,
    VIDEO_SUFFIXES,
    Document,
    Image,
    Prompt,
    Stored,
    Text,
    Video,
    Visual,
)
from visavis.processing.media import SUFFIXES, UNREAD_SUFFIXES
from visavis.processing.pdf import pages
from visavis.utils import track, write_atomically

_MEDIA = SUFFIXES | VIDEO_SUFFIXES | DOCUMENT_SUFFIXES
PLAN_NAME = "_plan.json"  # Parquet readers skip it
_COLUMNS = ("image", "video", "text")
MAX_CAPTION = 1 << 20  # bytes of a text beside an image in a tar


@dataclass(frozen=True)
class Part:
    """A file or URL, or rows of a Parquet file, `start <= row < stop`."""

    path: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class PlannedShard:
    """The parts of one shard."""

    number: int
    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        """The file name of the shard."""
        return f"part-{self.number:06d}.parquet"


@dataclass
class Plan:
    """All shards of a corpus; `left_out`: (suffix, reason) → number of files."""

    shards: list[PlannedShard] = field(default_factory=list)
    left_out: Counter[tuple[str, str]] = field(default_factory=Counter)


@dataclass(frozen=True)
class CorpusItem:
    """One item to embed. `text`: a caption, which is searched but not embedded; `error`: why it
    cannot be read."""

    source: str
    prompt: Prompt | None = None
    path: str = ""  # of a local file
    page: int | None = None
    text: str = ""
    error: str = ""


def make_plan(corpus: Sequence[str], shard_size: int, *, progress: bool = False) -> Plan:
    """Divide a corpus into shards of at most `shard_size` files or rows; the same corpus gives the
    same plan.

    Args:
        corpus: files, folders, and URLs of both.

    Raises:
        InputError: a path does not exist, or there is nothing to embed.
    """
    plan = Plan()
    files: list[Part] = []

    def add(parts: Sequence[Part]) -> None:
        plan.shards.append(PlannedShard(len(plan.shards), tuple(parts)))

    found = [path for place in corpus for path in _listed(place, plan)]
    for path in track(found, "listing", weights=[1] * len(found), show=progress):
        suffix = _suffix(path)
        if suffix == ".tar":
            add([Part(path)])
        elif suffix == ".parquet":
            total = _num_rows(path)
            for start in range(0, total, shard_size):
                add([Part(path, start, min(start + shard_size, total))])
        else:
            files.append(Part(path))
    for start in range(0, len(files), shard_size):
        add(files[start : start + shard_size])
    if not plan.shards:
        raise InputError(
            f"nothing to embed in {', '.join(corpus)}: expected images, videos, PDFs, .parquet or "
            f".tar files; {plan.left_out.total()} other files are there"
        )
    return plan


def kept_plan(
    output: str, corpus: Sequence[str], shard_size: int, *, progress: bool = False
) -> Plan:
    """Return the plan of a run into `output`: the one that is kept there, or a new one, which is
    kept from now on. So files that come later do not change which items are in which shard.

    Raises:
        InputError: the output holds shards of another corpus, or there is nothing to embed.
        StoreError: the plan cannot be read or written.
    """
    places = [place if is_url(place) else os.path.abspath(place) for place in corpus]
    wanted = {"corpus": places, "shard_size": shard_size}
    kept = read_file(output, PLAN_NAME)
    if kept is None:
        plan = make_plan(corpus, shard_size, progress=progress)
        content = {
            **wanted,
            "shards": [[[p.path, p.start, p.stop] for p in shard.parts] for shard in plan.shards],
            "left_out": [[*key, count] for key, count in plan.left_out.items()],
        }
        write_file(output, PLAN_NAME, json.dumps(content).encode())
        return plan
    try:
        found = json.loads(kept)
        shards = [
            PlannedShard(number, tuple(Part(*part) for part in parts))
            for number, parts in enumerate(found["shards"])
        ]
        left_out = Counter({(suffix, reason): n for suffix, reason, n in found["left_out"]})
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{PLAN_NAME} in {output} is damaged ({error}); name another output folder"
        ) from error
    if any(found.get(key) != value for key, value in wanted.items()):
        raise InputError(
            f"{output} holds shards of {', '.join(map(str, found['corpus']))} with --shard-size "
            f"{found['shard_size']}, but this run is of {', '.join(places)} with {shard_size}; "
            "name another output folder"
        )
    return Plan(shards, left_out)


def read_items(part: Part) -> Iterator[CorpusItem]:
    """Yield the items of a part in order; what cannot be read is an item with an error.

    Raises:
        VisavisError: a Parquet file or tar cannot be read at all.
    """
    suffix = _suffix(part.path)
    if suffix in (".parquet", ".tar"):
        with _local(part.path) as path:
            yield from _rows(path, part) if suffix == ".parquet" else _members(path, part.path)
        return
    try:
        content: Path | bytes = _read(part.path) if is_url(part.path) else Path(part.path)
        if suffix in DOCUMENT_SUFFIXES:
            yield from _pages(part.path, content)
            return
        visual = Video(content) if suffix in VIDEO_SUFFIXES else Image(content)
    except VisavisError as error:
        yield CorpusItem(part.path, error=str(error))
        return
    yield CorpusItem(part.path, Prompt.of(visual), path="" if is_url(part.path) else part.path)


def is_url(path: str) -> bool:
    """Return whether a path is read through fsspec."""
    return "://" in path


def file_system(path: str) -> tuple[Any, str]:
    """Return fsspec's file system of a path or URL, and the path in it.

    Raises:
        InputError: the protocol is unknown or its package is not installed.
    """
    import fsspec

    try:
        system, inner = fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"{path} cannot be opened: {error}; s3:// needs the package s3fs, gs:// gcsfs, "
            "abfs:// adlfs"
        ) from None
    return system, inner


def read_file(folder: str, name: str) -> bytes | None:
    """Return the content of a file in a folder or at a URL; None if there is none.

    Raises:
        StoreError: it cannot be read.
    """
    system, inner = file_system(folder)
    try:
        content: bytes = system.cat_file(f"{inner}/{name}")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"{name} in {folder} cannot be read ({error})") from error
    return content


def write_file(folder: str, name: str, content: bytes) -> None:
    """Write a file into a folder or at a URL, whole or not at all.

    Raises:
        StoreError: it cannot be written.
    """
    try:
        if is_url(folder):  # object stores keep a file when it is whole
            system, inner = file_system(folder)
            system.makedirs(inner, exist_ok=True)
            system.pipe_file(f"{inner}/{name}", content)
        else:
            with write_atomically(Path(folder, name)) as temporary:
                temporary.write_bytes(content)
    except OSError as error:
        raise StoreError(f"cannot write {name} in {folder}: {error}") from error


def _listed(place: str, plan: Plan) -> list[str]:
    """Return the files at a path or URL in sorted order; what is no medium is counted."""
    place = place if is_url(place) else os.path.abspath(os.path.expanduser(place))
    system, inner = file_system(place)
    try:
        if system.isfile(inner):
            return [place]
        found = sorted(system.find(inner))
    except OSError as error:
        raise InputError(f"{place} cannot be listed ({error}); check address and rights") from error
    if not found:
        raise InputError(f"{place} does not exist or is empty; check the spelling")
    kept = []
    for path in found:
        suffix = _suffix(path)
        relative = path[len(inner) :].split("/")
        if any(name.startswith(".") for name in relative):
            plan.left_out[suffix, "hidden"] += 1
        elif suffix in _MEDIA or suffix in (".parquet", ".tar"):
            kept.append(system.unstrip_protocol(path) if is_url(place) else path)
        else:
            plan.left_out[suffix, UNREAD_SUFFIXES.get(suffix, "not a supported suffix")] += 1
    return kept


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _num_rows(path: str) -> int:
    """Return the number of rows of a Parquet file, from its footer."""
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError:
        raise InputError(
            f"{path} is read with pyarrow, which is not installed: pip install 'visavis[ray]'"
        ) from None
    system, inner = file_system(path)
    try:
        with system.open(inner) as file:
            return int(parquet.ParquetFile(file).metadata.num_rows)
    except (OSError, ArrowInvalid) as error:
        raise InputError(f"{path} cannot be read as Parquet ({error}); copy it again") from error


def _read(url: str) -> bytes:
    system, inner = file_system(url)
    try:
        content: bytes = system.cat_file(inner)
    except OSError as error:
        raise InputError(f"{url} cannot be read ({error})") from error
    return content


@contextmanager
def _local(path: str) -> Iterator[Path]:
    """Yield a local file: the file itself, or a copy of what a URL names."""
    if not is_url(path):
        yield Path(path)
        return
    system, inner = file_system(path)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, os.path.basename(inner))
        try:
            system.get_file(inner, str(copy))
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error})") from error
        yield copy


def _pages(path: str, content: Path | bytes) -> Iterator[CorpusItem]:
    for number, page in enumerate(pages(Document(content)), 1):
        local = "" if isinstance(content, bytes) else path
        yield CorpusItem(page_source(path, number), Prompt.of(page), path=local, page=number)


def _rows(file: Path, part: Part) -> Iterator[CorpusItem]:
    table = Table(file)
    columns = [name for name in _COLUMNS if name in table.columns]
    if not columns:
        raise InputError(
            f"{part.path} has the columns {', '.join(table.columns)}, expected one named image, "
            "video or text"
        )
    for number in range(part.start, len(table) if part.stop is None else part.stop):
        row = table[number]
        source = f"{part.path}#{row.get('id') or f'row={number}'}"
        yield _item(source, {name: row[name] for name in columns})


def _members(file: Path, name: str) -> Iterator[CorpusItem]:
    """Yield the images and videos of a tar, each with the text of its name beside it."""
    media: list[tuple[str, Stored]] = []
    captions: dict[str, Stored] = {}
    for member, stored in members(file):
        key, suffix = os.path.splitext(member)
        if suffix.lower() in SUFFIXES | VIDEO_SUFFIXES:
            media.append((member, stored))
        elif suffix.lower() == ".txt":
            captions[key] = stored
    for member, stored in media:
        key, suffix = os.path.splitext(member)
        kind = "video" if suffix.lower() in VIDEO_SUFFIXES else "image"
        text = (
            captions[key].read()[:MAX_CAPTION].decode("utf-8", "replace") if key in captions else ""
        )
        yield _item(f"{name}#{member}", {kind: stored, "text": text})


def _item(source: str, fields: Mapping[str, Any]) -> CorpusItem:
    """Return a row as an item: its image or video, with its text as caption, else its text."""
    text = str(fields.get("text") or "")
    try:
        visual: Visual | None = None
        if (image := fields.get("image")) is not None:
            visual = Image(image)
        elif (video := fields.get("video")) is not None:
            visual = Video(video.read() if isinstance(video, Stored) else video)
        if visual is None:
            return CorpusItem(source, Prompt.of(Text(text)))
        return CorpusItem(source, Prompt.of(visual), text=text)
    except VisavisError as error:
        return CorpusItem(source, text=text, error=str(error))
