"""Files that users name: pictures, videos and documents are opened, or found in folders.

Whatever is not there or may not be read is one `ImageError`. Knows nothing of what is inside, and
opens no URLs.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from visavis.errors import ImageError
from visavis.inputs import DOCUMENT_SUFFIXES, VIDEO_SUFFIXES, Stored

# Pillow's name of a format → the suffixes that `find_images` takes for it. Formats that start
# another program (EPS), or that nearly any bytes match (TGA, PCX), are left out on purpose.
FORMATS: dict[str, tuple[str, ...]] = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k", ".jpx"),
    "ICO": (".ico",),
}
SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)


def name_of(source: Path | bytes | Stored, what: str = "image") -> str:
    """Return what messages call it: the quoted path, or "the image of 9 bytes"."""
    if isinstance(source, bytes):
        return f"the {what} of {len(source)} bytes"
    text = source.name if isinstance(source, Stored) else str(source)
    return repr(text if len(text) <= 200 else text[:197] + "…")


def open_media(source: Path | bytes | Stored, what: str = "image") -> BinaryIO:
    """Return an open, non-empty regular file (or the bytes as one).

    Raises:
        ImageError: there is none, it is empty, or it may not be read.
    """
    noun = "picture" if what == "image" else what
    if isinstance(source, Stored):
        source = source.read()
    if isinstance(source, bytes):
        if not source:
            raise ImageError(f"the {what} is empty (0 bytes), expected a {noun}; was it cut off?")
        return io.BytesIO(source)
    name = name_of(source)
    try:
        if source.is_dir():
            raise ImageError(f"{name} is a folder, expected one {noun}; name a file in it")
        if source.exists() and not source.is_file():
            raise ImageError(f"{name} is a device or pipe, expected a {noun} file")
        opened = source.open("rb")
    except FileNotFoundError:
        raise ImageError(
            f"{name} does not exist, expected a {noun} file; check the spelling"
            + ("" if source.is_absolute() else f" (looked in {Path.cwd()})")
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{name} cannot be opened ({reason}); check path and rights") from None
    if os.fstat(opened.fileno()).st_size == 0:
        opened.close()
        raise ImageError(
            f"{name} is empty (0 bytes), expected a {noun}; an interrupted download is the "
            "likely cause: fetch it again"
        )
    return opened


def find_images(
    paths: str | Path | Iterable[str | Path], *, with_others: bool = False
) -> list[Path]:
    """Return the picture files under `paths`, without duplicates.

    Folders are searched recursively and in sorted order for the suffixes in FORMATS; hidden files
    and folders (".…") are left out and links to folders are not followed. A file that is named
    itself is taken whatever its suffix is.

    Args:
        with_others: look for videos and documents too.

    Raises:
        ImageError: a path does not exist, or a folder cannot be read or holds no picture.
    """
    found: dict[Path, None] = {}
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        path = Path(path).expanduser()
        if path.is_dir():
            found.update(dict.fromkeys(_walk(path, with_others)))
        elif path.exists():
            found[path] = None
        else:
            raise ImageError(
                f"{name_of(path)} does not exist, expected a picture or a folder of pictures; "
                "check the spelling" + ("" if path.is_absolute() else f" (looked in {Path.cwd()})")
            )
    return list(found)


def _walk(folder: Path, with_others: bool) -> list[Path]:
    wanted = SUFFIXES | VIDEO_SUFFIXES | DOCUMENT_SUFFIXES if with_others else SUFFIXES

    def unreadable(error: OSError) -> None:
        raise ImageError(
            f"folder {error.filename!r} cannot be read ({error.strerror}); "
            "change its rights or name the folders you want one by one"
        )

    pictures: list[Path] = []
    others = 0
    for root, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and Path(name).suffix.lower() in wanted:
                pictures.append(Path(root, name))
            else:
                others += 1
    if not pictures:
        raise ImageError(
            f"folder {name_of(folder)} holds no pictures{', videos or PDFs' * with_others} "
            f"({others} other files), expected some with the suffix {' '.join(sorted(wanted))}"
        )
    return sorted(pictures)


def frame_files(source: Any) -> tuple[Any, ...]:
    """Return the frames of a video that is given as pictures, a list of them or a folder, by
    the numbers in their names (2 before 10); () for a video file."""
    if isinstance(source, tuple):
        return source
    if not isinstance(source, Path) or not source.is_dir():
        return ()
    return tuple(sorted(find_images(source), key=_natural))


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    return [
        (piece.isdigit(), int(piece) if piece.isdigit() else 0, piece)
        for piece in re.findall(r"[0-9]+|[^0-9]+", str(path))
    ]
