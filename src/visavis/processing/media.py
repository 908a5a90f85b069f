"""Files that users name: images, videos and documents are opened, or found in folders.

A source that is missing or may not be read raises `ImageError`.
"""

from __future__ import annotations

import importlib.util
import io
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
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
if importlib.util.find_spec("pillow_heif"):  # `images._open_header` registers it when needed
    FORMATS["HEIF"] = (".heic", ".heif", ".hif")
SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)
# Suffixes of images that are not read, with what to do about them.
UNREAD_SUFFIXES: dict[str, str] = {
    **dict.fromkeys(
        (".heic", ".heif", ".hif"),
        "HEIC needs pillow-heif: pip install 'visavis[heic]', or export it as JPEG",
    ),
    **dict.fromkeys(
        (".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".pef", ".srw"),
        "camera raw is not read: export it as JPEG or TIFF",
    ),
    **dict.fromkeys(
        (".psd", ".svg", ".eps", ".jxl", ".exr", ".hdr", ".tga", ".pcx", ".dds", ".xcf"),
        "this image format is not read: export it as PNG",
    ),
}
UNREAD_SUFFIXES = {s: reason for s, reason in UNREAD_SUFFIXES.items() if s not in SUFFIXES}
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # Path has made one slash of two


def name_of(source: Path | bytes | Stored, what: str = "image") -> str:
    """Return the name of a source in messages: the quoted path, or "the image of 9 bytes"."""
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
        if os.path.isdir(source):
            raise ImageError(f"{name} is a folder, expected one {noun}; name a file in it")
        if os.path.exists(source) and not os.path.isfile(source):
            raise ImageError(f"{name} is a device or pipe, expected a {noun} file")
        opened = source.open("rb")
    except FileNotFoundError:
        raise _absent(source, f"a {noun} file") from None
    except ImageError:
        raise
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


def _absent(path: Path, expected: str) -> ImageError:
    """Return the error for a path that does not exist, or that is no path."""
    url = _URL.match(str(path))
    if url and not path.is_absolute():
        return ImageError(
            f"{name_of(path)} is a URL ({url[1].lower()}), expected {expected}; visavis opens no "
            "URLs: download the file first and give its path"
        )
    if str(path).lower().startswith("data:"):
        return ImageError(
            f"a data: URI stands where {expected} is expected; save it as a file, or pass it as a "
            "str in Python or over HTTP"
        )
    return ImageError(
        f"{name_of(path)} does not exist, expected {expected}; check the spelling"
        + ("" if path.is_absolute() else f" (looked in {Path.cwd()})")
    )


@dataclass
class MediaScan:
    """Files below the paths that a user named.

    Attributes:
        files: those of a wanted kind, each once; folders are searched in sorted order.
        unreadable: (folder, reason) of folders that cannot be listed.
        left_out: (suffix, reason) → number of files; a link to a folder counts as one file.
    """

    files: dict[Path, None] = field(default_factory=dict)
    unreadable: list[tuple[Path, str]] = field(default_factory=list)
    left_out: Counter[tuple[str, str]] = field(default_factory=Counter)


def scan_media(path: str | Path, *, with_others: bool = False) -> MediaScan:
    """Find the image files below a path, and count what is left out.

    Folders are searched recursively for the suffixes in FORMATS; hidden files and folders (".…")
    are left out and links to folders are not followed. A file that is named itself is taken
    with any suffix.

    Args:
        with_others: look for videos and documents too.

    Raises:
        ImageError: the path does not exist, or is a folder without such a file.
    """
    path = Path(path).expanduser()
    scan = MediaScan()
    if os.path.isdir(path):
        _walk(path, with_others, scan)
    elif os.path.lexists(path):  # opening a dangling link says what it is
        scan.files[path] = None
    else:
        raise _absent(path, "an image or a folder of images")
    return scan


def find_images(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    """Return the image files under `paths`, without duplicates, as `scan_media` finds them.

    Images of formats that are not read (HEIC without pillow-heif, camera raw) give a warning with
    their number and the reason.

    Raises:
        ImageError: a path does not exist, or a folder cannot be read or holds no image.
    """
    found: dict[Path, None] = {}
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        scan = scan_media(path)
        for _, reason in scan.unreadable:
            raise ImageError(reason)
        found.update(scan.files)
        if unread := _unread(scan):
            warnings.warn(f"{name_of(Path(path))}: left out {unread}", stacklevel=2)
    return list(found)


def _unread(scan: MediaScan) -> str:
    """Return how many images of a scan are not read, with the reasons; empty: none."""
    counts = [(n, key) for key, n in sorted(scan.left_out.items()) if key[0] in UNREAD_SUFFIXES]
    return "; ".join(f"{number} {suffix} ({reason})" for number, (suffix, reason) in counts)


def _walk(folder: Path, with_others: bool, scan: MediaScan) -> None:
    wanted = SUFFIXES | VIDEO_SUFFIXES | DOCUMENT_SUFFIXES if with_others else SUFFIXES

    def unreadable(error: OSError) -> None:
        name = Path(os.fsdecode(error.filename))
        reason = (
            f"folder {name_of(name)} cannot be read ({error.strerror}); "
            "change its rights or name the folders you want one by one"
        )
        scan.unreadable.append((name, reason))

    found: list[Path] = []
    for root, folders, names in os.walk(folder, onerror=unreadable):
        for name in folders:
            if name.startswith("."):
                scan.left_out["folder", "hidden"] += 1
            elif os.path.islink(os.path.join(root, name)):
                scan.left_out["folder", "a link to a folder"] += 1
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            suffix = Path(name).suffix.lower()
            if name.startswith("."):
                scan.left_out[suffix, "hidden"] += 1
            elif suffix in wanted:
                found.append(Path(root, name))
            else:
                scan.left_out[suffix, UNREAD_SUFFIXES.get(suffix, "not a supported suffix")] += 1
    if not found and not scan.unreadable:
        raise ImageError(
            f"folder {name_of(folder)} holds no pictures{', videos or PDFs' * with_others} "
            f"({scan.left_out.total()} other files), expected some with the suffix "
            f"{' '.join(sorted(wanted))}"
            + (f"; left out {unread}" if (unread := _unread(scan)) else "")
        )
    scan.files.update(dict.fromkeys(sorted(found)))


def frame_files(source: Any) -> tuple[Any, ...]:
    """Return the frames of a video that is given as images, a list of them or a folder, by
    the numbers in their names (2 before 10); () for a video file."""
    if isinstance(source, tuple):
        return source
    if not isinstance(source, Path) or not os.path.isdir(source):
        return ()
    return tuple(sorted(find_images(source), key=_natural))


_DIGITS = frozenset("0123456789")


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    return [
        (piece[0] in _DIGITS, int(piece) if piece[0] in _DIGITS else 0, piece)
        for piece in re.findall(r"[0-9]+|[^0-9]+", str(path))
    ]
