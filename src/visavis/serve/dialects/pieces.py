"""Content parts of several APIs as pieces of prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from visavis.errors import InputError
from visavis.serve.media import Piece, Turn
from visavis.serve.schemas.base import FilePart, ImagePart, TextPart, VideoPart
from visavis.serve.schemas.openai import ChatMessage

Value = TypeVar("Value")


def url_of(value: Any) -> str:
    """Return the URL in an `{"url": …}` object or a plain string."""
    return value if isinstance(value, str) else value.url


def pieces_of(content: str | Sequence[Any] | None) -> list[Piece]:
    """Return the pieces of a message's content."""
    if content is None:
        return []
    if isinstance(content, str):
        return [Piece("text", content)]
    return [_piece(part) for part in content]


def _piece(part: Any) -> Piece:
    if isinstance(part, TextPart):
        return Piece("text", part.text)
    if isinstance(part, ImagePart):
        return Piece("image", url_of(part.image_url))
    if isinstance(part, VideoPart):
        return Piece("video", url_of(part.video_url))
    assert isinstance(part, FilePart)
    return Piece("document", part.file.file_data)


def turns_of(messages: Iterable[ChatMessage]) -> list[Turn]:
    """Return the turns of OpenAI's messages."""
    return [
        ("system" if one.role == "developer" else one.role, pieces_of(one.content))
        for one in messages
    ]


def must_answer(turns: Sequence[Turn]) -> None:
    """Raise an InputError unless the last turn is one that can be answered."""
    if turns[-1][0] != "user":
        raise InputError(
            f"the last message is from the {turns[-1][0]}, expected one from the user to answer"
        )


def given(**settings: Value | None) -> dict[str, Value]:
    """Return the settings that are not None."""
    return {name: value for name, value in settings.items() if value is not None}
