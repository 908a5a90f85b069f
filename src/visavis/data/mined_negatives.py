"""Mined negatives as JSON lines, which a data source joins by id (`SourceConfig.negatives`).

    {"id": "7", "negatives": [{"image": "a.jpg", "score": 0.41, "source": "nearest"}]}

Paths are relative to the file's folder. Images and videos that are not files (in a tar, a table or
memory) are written once to `<name>-files/` beside it. A corpus file has lines of the same items.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from visavis.data.corpus import Corpus, CorpusEntry
from visavis.data.hard_negatives import Negative
from visavis.data.media_paths import Place
from visavis.data.readers import open_rows
from visavis.errors import InputError
from visavis.inputs import Document, Image, Message, Prompt, Stored, Text, Video
from visavis.processing.images import content_hash, decode_image, image_format
from visavis.processing.media import FORMATS
from visavis.utils import write_atomically

DIGITS = 6  # of scores
_NOTES = ("id", "score", "source")


def write_mined(
    path: Path, corpus: Corpus, rows: Iterable[tuple[CorpusEntry, list[Negative]]]
) -> None:
    """Write a line for each sample; the file appears when all of them are written.

    Raises:
        InputError: an item is no text, image or video that a line can hold, or the disk is full.
    """
    files = path.with_name(f"{path.stem}-files")
    items: dict[int, dict[str, Any]] = {}
    try:
        with write_atomically(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            for entry, negatives in rows:
                found = []
                for one in negatives:
                    if one.place not in items:
                        items[one.place] = to_item(corpus.prompt(one.place)[0], files)
                    score = {} if one.score is None else {"score": round(one.score, DIGITS)}
                    found.append({**items[one.place], **score, "source": one.source})
                line = {"id": entry.id, "negatives": found}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    except OSError as error:
        raise InputError(
            f"cannot write {path} ({error.strerror or error}); vectors are kept: make room, and "
            "run the same command again."
        ) from error


def to_item(prompt: Prompt, files: Path) -> dict[str, Any]:
    """Return a prompt as {text, image, video, document}, whose keys' order is that of the parts.

    Args:
        files: folder for what is no file yet; paths start at its parent.

    Raises:
        InputError: its parts alternate, so that no such object says their order.
    """
    item: dict[str, Any] = {}
    last = ""
    for part in (part for message in prompt.messages for part in message.parts):
        key = type(part).__name__.lower()
        if key in item and (key, last) != ("image", "image"):
            raise InputError(
                f"an item has its parts in an order that a line cannot say ({prompt.text[:60]!r}); "
                "expected texts and pictures that do not alternate."
            )
        value = part.text if isinstance(part, Text) else _reference(part, files)
        if key in item:
            item[key] = [*(item[key] if isinstance(item[key], list) else [item[key]]), value]
        else:
            item[key] = value
        last = key
    return item


def _reference(part: Image | Video | Document, files: Path) -> str | list[str]:
    """Return where an image, video or document is, writing it first if it is nowhere."""
    source = part.source
    if isinstance(source, Path):
        return Path(os.path.relpath(source, files.parent)).as_posix()
    if isinstance(source, tuple):
        return [str(_reference(frame, files)) for frame in source]
    content = source.read() if isinstance(source, Stored) else source
    if not isinstance(content, bytes):
        encoded = io.BytesIO()
        decode_image(part).save(encoded, "PNG")
        content = encoded.getvalue()
    path = files / (content_hash(part) + _suffix(part, content))
    if not path.exists():
        with write_atomically(path) as temporary:
            temporary.write_bytes(content)
    return path.relative_to(files.parent).as_posix()


def _suffix(part: Image | Video | Document, content: bytes) -> str:
    if not isinstance(part, Image):
        return ".mp4" if isinstance(part, Video) else ".pdf"
    return FORMATS[image_format(content)][0]


def read_corpus(path: Path) -> list[Prompt]:
    """Return items of JSON lines {text, image, video, document}; paths start at the file's folder.

    Raises:
        TrainError: the file cannot be read.
        InputError: a line is no item; the message names it.
    """
    rows, place = open_rows([path]), Place(path.parent, path.parent)
    found = []
    for number in range(len(rows)):
        row = {key: value for key, value in rows[number].items() if key not in _NOTES}
        try:
            found.append(Prompt((Message("user", place.item(row)),)))
        except InputError as error:
            raise InputError(f"{rows.where(number)}: {error}") from error
    return found
