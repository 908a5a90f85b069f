"""The content of requests as prompts: text, and images, videos and documents as data.

A dialect lists pieces; `Reader.prompt` decodes them, fetches allowed URLs and holds the limits. No
piece can name a file of this machine: what is neither a data URI nor a URL is base64.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from visavis.errors import InputError
from visavis.inputs import Document, Image, Message, Part, Prompt, Role, Text, Video, Visual
from visavis.processing.images import image_size
from visavis.serve.config import Limits
from visavis.serve.errors import ApiError
from visavis.serve.fetch import Fetcher

Kind: TypeAlias = Literal["text", "image", "video", "document"]
_DATA_URI = re.compile(
    r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+-]+=[\w.+\"-]*)*);base64,", re.IGNORECASE
)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_MEDIA_TYPES = {"image": "image/", "video": "video/", "document": "application/pdf"}


@dataclass(frozen=True)
class Piece:
    """A piece of a message as it was sent.

    Args:
        value: the text; or a data URI, URL or base64, the bytes of a file, or what the server
            itself has.
    """

    kind: Kind
    value: str | bytes | Visual


Turn: TypeAlias = tuple[Role, Sequence[Piece]]


@dataclass
class Cost:
    """The counts of media in the prompts of one request."""

    images: int = 0
    videos: int = 0
    documents: int = 0
    image_pixels: int = 0


class Reader:
    """Makes prompts of what one request sent, within the limits; used by one thread at a time."""

    def __init__(self, limits: Limits, fetcher: Fetcher) -> None:
        self.limits, self.fetcher = limits, fetcher
        self.cost = Cost()

    def prompt(self, turns: Iterable[Turn]) -> Prompt:
        """Return the prompt of some turns.

        Raises:
            InputError: a piece cannot be read, or a turn is empty.
            ApiError: a limit is exceeded (413).
        """
        turns = list(turns)
        visuals = sum(piece.kind != "text" for _, pieces in turns for piece in pieces)
        if visuals > self.limits.images:
            raise ApiError(
                413,
                f"{visuals} images, videos and documents in one prompt, expected at most "
                f"{self.limits.images}",
                code="too_many_images",
            )
        texts = (piece.value for _, pieces in turns for piece in pieces if piece.kind == "text")
        chars = sum(len(text) for text in texts if isinstance(text, str))
        if chars > self.limits.text_chars:
            raise ApiError(
                413,
                f"a text of {chars} characters, expected at most {self.limits.text_chars}",
                code="text_too_long",
            )
        messages = [Message(role, tuple(map(self._part, pieces))) for role, pieces in turns]
        return Prompt(tuple(messages))

    def item(self, pieces: Sequence[Piece]) -> Prompt:
        """Return the prompt of one input that is embedded."""
        return self.prompt([("user", pieces)])

    def _part(self, piece: Piece) -> Part:
        value = piece.value
        if isinstance(value, Image | Video | Document):
            return value
        if piece.kind == "text":
            assert isinstance(value, str)
            return Text(value)
        if piece.kind == "image":
            return self.image(piece)
        if piece.kind == "video":
            self.cost.videos += 1
            return Video(self._bytes(piece))
        self.cost.documents += 1
        return Document(self._bytes(piece))

    def image(self, piece: Piece) -> Image:
        """Return an image that was sent.

        Raises:
            ImageError: it is not an image.
            ApiError: it, or all images of the request, have too many pixels (413).
        """
        image = Image(self._bytes(piece))
        width, height = image_size(image)
        self.cost.images += 1
        self.cost.image_pixels += width * height
        if width * height > self.limits.image_pixels:
            raise ApiError(
                413,
                f"an image of {width} × {height} pixels, expected at most "
                f"{self.limits.image_pixels / 1e6:g} megapixels; make it smaller first",
                code="image_too_large",
            )
        if self.cost.image_pixels > self.limits.request_pixels:
            raise ApiError(
                413,
                f"images of more than {self.limits.request_pixels / 1e6:g} megapixels in one "
                "request; send them in several",
                code="too_many_pixels",
            )
        return image

    def _bytes(self, piece: Piece) -> bytes:
        value, kind = piece.value, piece.kind
        if isinstance(value, bytes):
            return value
        assert isinstance(value, str)
        value = value.strip()
        if match := _DATA_URI.match(value):
            media_type = (match[1] or "").lower()
            # Clients send what they do not know as plain bytes; what it is shows in its content.
            known = ("", "application/octet-stream")
            if media_type not in known and not media_type.startswith(_MEDIA_TYPES[kind]):
                raise InputError(
                    f"the {kind} is a data URI of {media_type[:60]}, expected "
                    f"{_MEDIA_TYPES[kind]}{'…' if kind != 'document' else ''}"
                )
            return _decoded(value[match.end() :], kind)
        if value[:5].lower() == "data:":
            raise InputError(
                f"the {kind} is a data URI that is not base64; expected "
                f"data:{_MEDIA_TYPES[kind]}…;base64,…"
            )
        if _URL.match(value):
            return self.fetcher.fetch(value)
        return _decoded(value, kind)


def _decoded(payload: str, kind: str) -> bytes:
    try:
        data = base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError):
        raise InputError(
            f"the {kind} is neither a data URI (data:{_MEDIA_TYPES[kind]}…;base64,…) nor base64; "
            "files of the server cannot be named"
        ) from None
    if not data:
        raise InputError(f"the {kind} is empty")
    return data
