"""Images, from everything a user passes to decoded RGB pixels, their sizes and content hashes.

    path · bytes · PIL · array ── decode_image ──► PIL, RGB, upright

Decoding accepts what Pillow reads safely and answers everything else with one `ImageError`.
Sizing is in `resize.py`. This module opens no URLs and imports no torch. Colour profiles (ICC) are
not applied, as in every published pipeline of these models.
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image as pil
from PIL import UnidentifiedImageError

from visavis.errors import ImageError, InputError
from visavis.inputs import Content, Document, Image, Page, Prompt, Stored, Text, Video, Visual
from visavis.processing import pdf
from visavis.processing.media import FORMATS, frame_files, name_of, open_media
from visavis.processing.pixel_modes import scale_transparency_key, to_rgb

MAX_PIXELS = 64_000_000  # read from the header, before anything is decoded
MAX_SIDE = 65_535  # longest side, also what JPEG itself allows

_HEIC = b"....ftyp(heic|heix|heim|heis|hevc|hevx|mif1|msf1)"
_RAW = "it is a camera raw file; export it as JPEG or TIFF"
_max_pixels = MAX_PIXELS


def set_max_pixels(number: int) -> None:
    """Set how many pixels an image may have, for this process; 64 million until it is called.

    An image of more than `MAX_PIXELS` is read at a half, a quarter … of its width and height, the
    largest that has at most `MAX_PIXELS`. JPEG is decoded at that size, so that its memory stays
    that of `MAX_PIXELS`; other formats are decoded whole first, which takes 3 to 8 bytes for each
    of `number` pixels.

    Args:
        number: pixels, at least `MAX_PIXELS`.

    Raises:
        InputError: it is less than `MAX_PIXELS`.
    """
    global _max_pixels
    if number < MAX_PIXELS:
        raise InputError(f"max_pixels is {number}, expected at least {MAX_PIXELS}")
    _max_pixels = number
    pil.MAX_IMAGE_PIXELS = max(pil.MAX_IMAGE_PIXELS or 0, number)  # Pillow's own limit


# What files that are not pictures start with, as patterns → what to say about them.
_NOT_PICTURES: tuple[tuple[bytes, str], ...] = (
    (b"%PDF", "it is a PDF document; pass it as visavis.Document(path)"),
    (_HEIC, "it is a HEIC image: pip install 'visavis[heic]', or export it as JPEG"),
    (b"FUJIFILMCCD-RAW|IIU\\0|IIR[OS]|....ftypcrx ", _RAW),
    (b"8BPS|\xff\x0a|....JXL |\x76\x2f\x31\x01", "this image format is not read; export it as PNG"),
    (b"....ftyp|\x1aE\xdf\xa3|RIFF....AVI", "it is a video; pass it as visavis.Video(path)"),
    (b"<svg", "it is an SVG drawing; export it as PNG"),
    (rb"<\?xml", "it is XML, perhaps an SVG drawing; export it as PNG"),
    (b"<!doctype html", "it is a web page, perhaps a failed download; download the picture again"),
    (b"<html", "it is a web page, perhaps a failed download; download the picture again"),
    (b"version https://git-lfs", "it is a Git LFS pointer; run `git lfs pull`"),
)

# EXIF orientation → the transpose that turns the picture upright; 1 is upright already.
_UPRIGHT: dict[int, pil.Transpose] = {
    2: pil.Transpose.FLIP_LEFT_RIGHT,
    3: pil.Transpose.ROTATE_180,
    4: pil.Transpose.FLIP_TOP_BOTTOM,
    5: pil.Transpose.TRANSPOSE,
    6: pil.Transpose.ROTATE_270,
    7: pil.Transpose.TRANSVERSE,
    8: pil.Transpose.ROTATE_90,
}
_EXIF_ORIENTATION = 0x0112
_open_lock = threading.Lock()  # warnings.catch_warnings is not thread-safe


# ---- decoding ------------------------------------------------------------------------------------


def decode_image(image: Any) -> pil.Image:
    """Return the image as an upright RGB image.

    Animations and multi-page files give their first frame (a PIL image its current one);
    transparency is laid on white; grey, palette, 1-bit and CMYK become RGB; 16-bit grey is scaled
    by 255/65535; wider integers and floats are scaled by the range they declare (`pixel_modes.py`).

    Args:
        image: a `visavis.Image` or anything it takes: path, data: URI, bytes, PIL image, or numpy
            array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] of uint8, bool or float in 0..1.

    Raises:
        ImageError: it cannot be read as an image, or is larger than MAX_PIXELS or MAX_SIDE.
    """
    source = _source(image)
    if isinstance(source, Page):
        return pdf.render(source)
    name = _name(source)
    try:
        if isinstance(source, np.ndarray):
            rgb = to_rgb(_from_array(source, name), name)
            factor = _reduction(rgb.size)
            return rgb.reduce(factor) if factor > 1 else rgb
        if isinstance(source, pil.Image):
            return _decode(source, name)
    except ImageError:
        raise
    except Exception as error:
        raise _damaged(name, error) from error
    with open_image(source) as (_, opened):
        return _decode(opened, name)


def image_size(image: Any) -> tuple[int, int]:
    """Return width and height that `decode_image` will give, from the header alone.

    Raises:
        ImageError: the header cannot be read, or the image is too large.
    """
    source = _source(image)
    if isinstance(source, Page):
        return pdf.page_size(source)
    if not isinstance(source, (Path, bytes, Stored)):  # its pixels are there already
        return decode_image(source).size
    name = _name(source)
    with open_image(source) as (data, opened):
        return _header_size(opened, data, name) or _decode(opened, name).size


@contextmanager
def open_image(source: Path | bytes | Stored) -> Iterator[tuple[BinaryIO, pil.Image]]:
    """Yield the file of an image and the image, of which only the header is read.

    Raises:
        ImageError: it is no image, or reading it in the block fails.
    """
    name = _name(source)
    try:
        with open_media(source) as data, _open_header(data, name) as opened:
            yield data, opened
    except ImageError:
        raise
    except Exception as error:  # Pillow's readers raise nearly anything on damaged data
        raise _damaged(name, error) from error


@contextmanager
def without_warnings() -> Iterator[None]:
    """Silence Pillow, whose warnings are errors here, or only noise."""
    with _open_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def image_format(content: bytes) -> str:
    """Return which of `media.FORMATS` an encoded image is in.

    Raises:
        ImageError: it is in none of them.
    """
    with _open_header(io.BytesIO(content), _name(content)) as opened:
        return "JPEG" if opened.format == "MPO" else str(opened.format)


def _header_size(opened: pil.Image, data: BinaryIO, name: str) -> tuple[int, int] | None:
    """Return the width and height of the upright image; None if the header does not give them.

    What ICO's header says may be wrong, and a PNG may say how it is turned after its pixels.
    TIFF's size is that of the upright image once it is loaded.
    """
    _check_size(opened, name)
    if opened.format in ("ICO", "TIFF") or (opened.format == "PNG" and _ends_late(data)):
        return None
    factor = _reduction(opened.size)
    width, height = (-(-side // factor) for side in opened.size)
    orientation = None
    with suppress(Exception):
        orientation = pil.Image.getexif(opened).get(_EXIF_ORIENTATION)
    return (height, width) if orientation in (5, 6, 7, 8) else (width, height)


# ---- content hashes ------------------------------------------------------------------------------

_Stamp = tuple[int, int, int]  # size, modification time, inode


def content_hash(visual: Any) -> str:
    """Return 32 hex digits that name the content: of a file's bytes for a path or bytes, of the
    decoded pixels for a PIL image or array; of a `Video` or `Document` with what it asks for."""
    return ContentHasher().content(visual).hash


class ContentHasher:
    """Hashes images, videos and documents: an unchanged file once, a document once for all of its
    pages."""

    def __init__(self) -> None:
        self._images: dict[tuple[Path, tuple[_Stamp, ...], bool], Content] = {}
        self._documents: dict[tuple[Path | bytes, _Stamp | None], bytes] = {}

    def identify(self, prompt: Prompt) -> Prompt:
        """Return the prompt with the content of its images and videos; each file is opened once.

        Raises:
            ImageError: one cannot be read.
        """
        if not prompt.visuals:
            return prompt

        def identified(part: Text | Visual) -> Text | Visual:
            if not isinstance(part, (Image, Video)) or part.content is not None:
                return part
            return replace(part, content=self.content(part, with_size=True))

        return Prompt(
            tuple(replace(m, parts=tuple(map(identified, m.parts))) for m in prompt.messages)
        )

    def hash(self, visual: Visual) -> str:
        """Return the content hash of an image, video or document, known or read now.

        Raises:
            ImageError: it cannot be read.
        """
        known = None if isinstance(visual, Document) else visual.content
        return (known or self.content(visual)).hash

    def content(self, visual: Any, *, with_size: bool = False) -> Content:
        """Return the hash of an image, video or document, and the stamps of its files.

        Args:
            with_size: read the size of an image's file from its header too.

        Raises:
            ImageError: it cannot be read.
        """
        stamp = stamp_of(visual)  # before reading: a change meanwhile gives another stamp later
        source = visual.source if isinstance(visual, Image) else visual
        if not isinstance(source, Path):
            return self._read(visual, stamp, with_size)
        key = (source, stamp, with_size)
        if key not in self._images:
            self._images[key] = self._read(visual, stamp, with_size)
        return self._images[key]

    def _read(self, visual: Any, stamp: tuple[_Stamp, ...], with_size: bool) -> Content:
        digest, size = hashlib.blake2b(digest_size=16), None
        if isinstance(visual, Document):
            digest.update(f"pages {visual.pages} ".encode())
            digest.update(self._document(visual.source))
        elif isinstance(visual, Video):
            digest.update(f"frames {visual.frames} ".encode())
            for each in frame_files(visual.source) or (visual.source,):
                self._update(digest, _source(each))
        else:
            size = self._update(digest, _source(visual), with_size)
        return Content(digest.hexdigest(), size, stamp)

    def _update(
        self, digest: hashlib.blake2b, source: Any, with_size: bool = False
    ) -> tuple[int, int] | None:
        """Add a source to a digest; return the size in its header if that is asked for."""
        if isinstance(source, (Path, bytes, Stored)):
            with open_media(source) as data:
                while chunk := data.read(2**20):
                    digest.update(chunk)
                return _size_in(data, _name(source)) if with_size else None
        if isinstance(source, Page):
            digest.update(f"page {source.number} ".encode())
            digest.update(self._document(source.document))
            return None
        rgb = decode_image(source)
        digest.update(f"rgb {rgb.width} {rgb.height} ".encode())
        digest.update(rgb.tobytes())
        return rgb.size

    def _document(self, source: Path | bytes | str) -> bytes:
        assert not isinstance(source, str)  # Document has replaced it
        key = (source, _file_stamp(source) if isinstance(source, Path) else None)
        if key not in self._documents:
            digest = hashlib.blake2b(digest_size=16)
            self._update(digest, source)
            self._documents[key] = digest.digest()
        return self._documents[key]


def stamp_of(visual: Any) -> tuple[_Stamp, ...]:
    """Return size, modification time and inode of each file that an image, video or document is
    read from: another stamp is another content."""
    return tuple(stamp for path in _files_of(visual) if (stamp := _file_stamp(path)))


def _files_of(visual: Any) -> Iterator[Path]:
    source = visual.source if isinstance(visual, (Document, Video)) else _source(visual)
    if isinstance(visual, Video):
        for each in frame_files(source) or (source,):
            yield from [each] if isinstance(each, Path) else _files_of(each)
    elif isinstance(source, Page):
        yield from [source.document] if isinstance(source.document, Path) else []
    elif isinstance(source, Path):
        yield source


def _file_stamp(path: Path) -> _Stamp | None:
    try:
        status = path.stat()
    except (OSError, ValueError):  # opening it says why in better words
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino


def _size_in(data: BinaryIO, name: str) -> tuple[int, int] | None:
    data.seek(0)
    try:
        with _open_header(data, name) as opened:
            return _header_size(opened, data, name)
    except ImageError:
        raise
    except Exception as error:
        raise _damaged(name, error) from error


def _source(image: Any) -> Path | pil.Image | np.ndarray | bytes | Page | Stored:
    source = (image if isinstance(image, Image) else Image(image)).source
    assert not isinstance(source, str)  # Image has replaced it
    return source


def _name(source: Path | pil.Image | np.ndarray | bytes | Stored) -> str:
    if isinstance(source, (Path, bytes, Stored)):
        return name_of(source)
    if isinstance(source, np.ndarray):
        return f"the array of shape {list(source.shape)} and type {source.dtype}"
    return f"the PIL image ({source.mode}, {source.width}×{source.height})"


def _damaged(name: str, error: Exception) -> ImageError:
    return ImageError(
        f"{name} cannot be decoded ({type(error).__name__}: {error}); it is probably "
        "truncated or damaged: download or export it again"
    )


def _open_header(data: BinaryIO, name: str) -> pil.Image:
    """Return the lazily opened image; its size is known, its pixels are not read yet."""
    pil.preinit()  # the common readers; Pillow loads the others only when these do not match
    formats = [kind for kind in FORMATS if kind != "HEIF"]
    if "HEIF" in FORMATS and re.match(_HEIC, data.read(12), re.DOTALL):
        import pillow_heif

        pillow_heif.register_heif_opener(thumbnails=False)
        formats.append("HEIF")
    data.seek(0)
    try:
        with without_warnings():
            opened = pil.open(data, formats=formats)
    except pil.DecompressionBombError as error:
        raise ImageError(f"{name} is too large: {error}; expected at most {_limits()}") from None
    except UnidentifiedImageError:
        data.seek(0)
        start = data.read(64).lstrip(b"\xef\xbb\xbf \r\n\t").lower()
        flags = re.IGNORECASE | re.DOTALL
        hints = (hint for magic, hint in _NOT_PICTURES if re.match(magic, start, flags))
        hint = next(hints, "it is damaged or of another kind; open it in a viewer and save as PNG")
        raise ImageError(
            f"{name} is not a picture that can be read (it starts {start[:12]!r}), expected one "
            f"of {', '.join(FORMATS)}; {hint}"
        ) from None
    if opened.format == "TIFF" and _is_raw(opened):
        raise ImageError(f"{name} cannot be read: {_RAW}")
    return opened


def _decode(opened: pil.Image, name: str) -> pil.Image:
    _check_size(opened, name)
    factor = _reduction(opened.size)
    size = opened.size
    if factor > 1 and opened.format in ("JPEG", "MPO"):
        opened.draft(None, (size[0] // factor, size[1] // factor))
    scale_transparency_key(opened)
    opened.load()
    _check_size(opened, name)  # some containers (ICO) learn their true size only now
    factor = max(1, round(factor * opened.width / size[0]))  # what draft has left to do
    orientation = None
    with suppress(Exception):  # a picture with broken EXIF data is still a picture, unrotated
        orientation = opened.getexif().get(_EXIF_ORIENTATION)
    rgb = to_rgb(opened, name)
    if factor > 1:
        rgb = rgb.reduce(factor)
    if orientation in _UPRIGHT:
        rgb = rgb.transpose(_UPRIGHT[orientation])
    if rgb is not opened:
        rgb.info = {}  # or a second decode_image would apply EXIF and transparency again
    return rgb


def _is_raw(tiff: pil.Image) -> bool:
    """Whether a TIFF is a camera raw file (DNG, NEF, ARW, CR2): its first image is a preview."""
    tags = getattr(tiff, "tag_v2", {})
    is_preview, sub_images, dng_version = int(tags.get(254, 0)) & 1, tags.get(330), 50706 in tags
    return dng_version or bool(is_preview and sub_images) or 50752 in tags  # CR2 slices


def _ends_late(png: BinaryIO) -> bool:
    """Whether a PNG holds text or EXIF data behind its pixels, where only a full read finds it."""
    png.seek(8)
    pixels = False
    while len(header := png.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        pixels = pixels or kind == b"IDAT"
        if pixels and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
            return True
        png.seek(length + 4, io.SEEK_CUR)
    return False


def _reduction(size: tuple[int, int]) -> int:
    """Return by which power of two an image is read smaller, so that it has MAX_PIXELS at most."""
    factor = 1
    while -(-size[0] // factor) * -(-size[1] // factor) > MAX_PIXELS:
        factor *= 2
    return factor


def _check_size(image: pil.Image, name: str) -> None:
    width, height = image.size
    if width * height == 0:
        raise ImageError(f"{name} has no pixels ({width}×{height})")
    if width * height > _max_pixels or max(width, height) > MAX_SIDE:
        raise ImageError(
            f"{name} has {width}×{height} = {width * height / 1e6:.1f} megapixels, expected at "
            f"most {_limits()}; make it smaller first, or raise --max-pixels"
        )


def _limits() -> str:
    return f"{_max_pixels / 1e6:.0f} megapixels and {MAX_SIDE} pixels a side"


def _from_array(array: np.ndarray, name: str) -> pil.Image:
    channels_last = array.ndim == 3 and array.shape[2] in (1, 3, 4)
    if array.ndim != 2 and not channels_last:
        first = array.ndim == 3 and array.shape[0] in (1, 3, 4)
        hint = "; channels come last: use array.transpose(1, 2, 0)" if first else ""
        hint = "; pass the pictures of a batch one by one" if array.ndim == 4 else hint
        raise ImageError(f"{name} is not a picture, expected [H, W] or [H, W, 1 or 3 or 4]{hint}")
    if array.size == 0:
        raise ImageError(f"{name} has no pixels")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # a resized picture may overshoot a little
            raise ImageError(
                f"{name} has values from {low:g} to {high:g}, expected floats in 0..1; it was "
                "probably normalised for a model, or is 0..255: undo that or use uint8"
            )
        array = np.rint(np.clip(array.astype(np.float32), 0, 1) * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ImageError(
            f"{name} is not a picture, expected uint8, bool or float in 0..1; scale the values "
            "to 0..255 and use .astype('uint8')"
        )
    array = array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array
    image = pil.fromarray(np.ascontiguousarray(array))
    _check_size(image, name)
    return image
