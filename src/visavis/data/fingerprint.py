"""What a fingerprint of data is made of: bytes that change when the samples would."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from visavis.data.datasets import load_source
from visavis.data.formats.image_folder import Folder
from visavis.data.readers import find_files
from visavis.errors import TrainError
from visavis.inputs import Stored

WHOLE_BYTES = 256 << 20  # files up to this size are read whole, larger ones in pieces
PIECES = 256
_CHUNK = 1 << 20


def of_files(path: str, root: Path) -> Iterator[bytes]:
    """Yield the contents of data files."""
    for file in find_files(path, root):
        yield from of_file(file)


def of_file(path: Path) -> Iterator[bytes]:
    """Yield a file's size and contents, of a large one only pieces; a folder's files'.

    Raises:
        TrainError: it cannot be read.
    """
    try:
        if path.is_dir():
            for inside in sorted(path.iterdir()):
                yield from of_file(inside)
            return
        size = path.stat().st_size
        yield f"{size} ".encode()
        with path.open("rb") as file:
            for start, end in _pieces(size):
                file.seek(start)
                while start < end and (chunk := file.read(min(end - start, _CHUNK))):
                    yield chunk
                    start += len(chunk)
    except OSError as error:
        raise TrainError(f"cannot read {path}: {error}") from error


def _pieces(size: int) -> Iterator[tuple[int, int]]:
    """Yield from where to where: all of it, or pieces at even distances, both ends included."""
    if size <= WHOLE_BYTES:
        yield 0, size
        return
    length = WHOLE_BYTES // PIECES
    for number in range(PIECES):
        start = number * (size - length) // (PIECES - 1)
        yield start, start + length


def of_pictures(path: str, root: Path) -> Iterator[bytes]:
    """Yield name and size of each picture in a folder."""
    folder = Folder(root / path)
    for picture in folder.pictures:
        yield f"{picture.relative_to(folder.path)} {picture.stat().st_size} ".encode()


def of_records(path: str, root: Path) -> Iterator[bytes]:
    """Yield texts and pictures of a data set."""
    for record in load_source(path, root):
        yield repr(replace(record, image=b"")).encode()
        yield record.image.read() if isinstance(record.image, Stored) else record.image
