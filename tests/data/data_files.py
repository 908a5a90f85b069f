"""Tiny data sets on disk, and sources as a recipe would name them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image as pil

from visavis.data.examples import ContrastiveExample, Conversation
from visavis.data.sources import Source, SourceConfig, open_data_source
from visavis.inputs import Image, Prompt, Text, Video


def picture_bytes(number: int = 0, kind: str = "PNG") -> bytes:
    """A picture of its own colour."""
    buffer = io.BytesIO()
    pil.new("RGB", (8, 6), (number * 37 % 256, number * 91 % 256, 40)).save(buffer, kind)
    return buffer.getvalue()


def write_pictures(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture_bytes(number))
    return folder


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_tar(path: Path, members: Mapping[str, bytes | Mapping[str, Any]]) -> Path:
    with tarfile.open(path, "w") as shard:
        for name, content in members.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))
    return path


def spec(format: str, path: str, **settings: Any) -> SourceConfig:
    return SourceConfig(format=format, path=path, **settings)


def opened(root: Path, format: str, path: str, **settings: Any) -> Source:
    return open_data_source(spec(format, path, **settings), root, name="mine")


def chats(source: Source) -> list[Conversation]:
    samples = list(source)
    assert all(isinstance(sample, Conversation) for sample in samples)
    return samples  # type: ignore[return-value]


def matches(source: Source) -> list[ContrastiveExample]:
    samples = list(source)
    assert all(isinstance(sample, ContrastiveExample) for sample in samples)
    return samples  # type: ignore[return-value]


def said(prompt: Prompt) -> list[list[str]]:
    """What a prompt holds, message by message: texts, and names of files in brackets."""
    return [
        [part.text if isinstance(part, Text) else f"[{name(part)}]" for part in message.parts]
        for message in prompt.messages
    ]


def name(part: Any) -> str:
    assert isinstance(part, (Image, Video))
    return part.source.name if isinstance(part.source, Path) else type(part.source).__name__
