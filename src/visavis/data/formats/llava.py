"""Conversations: LLaVA's rows, and rows of `messages` as in TRL, LLaMA-Factory and ms-swift.

    {"id": 7, "image": "a.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWho?"}, {"from": "gpt", "value": "A cat."}]}

    {"images": ["a.jpg"], "messages": [
        {"role": "user", "content": "<image>Who?"}, {"role": "assistant", "content": "A cat."}]}

The markers `<image>` and `<video>` say where files go; they are text in a row without such files.
A content may also be a list of parts, {type: text, text}, {type: image} or {type: video}, which may
name their file as `image` or `video`. One newline after a marker is dropped: the chat format of the
model writes what stands there. Markers of files that are not there, and files without markers, are
errors; LLaVA's own code trains on the wrong image then.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from visavis.data.examples import Conversation
from visavis.data.media_paths import Options, Place, field, listed
from visavis.data.readers import Row
from visavis.errors import InputError
from visavis.inputs import Message, Part, Prompt, Role, Text

KINDS = ("image", "video")
_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


class LlavaOptions(Options):
    """Options of `llava`.

    Args:
        images_first: move markers within a question to its start: `all` of them, as LLaVA 1.5 and
            TinyLLaVA do; `one`, the only one of a question, as LLaVA-NeXT and LLaVE do.
        frames: of each video; None: as many as the model takes.
    """

    images_first: Literal["no", "one", "all"] = "no"
    frames: int | None = None


@dataclass(frozen=True)
class _Slot:
    """Where a file goes; `value` where the part itself names it."""

    kind: str
    value: Any = None


_Turn: TypeAlias = tuple[Role, list[Text | _Slot]]


def conversation(row: Row, place: Place, options: LlavaOptions) -> Conversation:
    """Return a row's conversation.

    Raises:
        InputError: roles or markers do not fit.
    """
    names = [name for name in ("conversations", "messages") if row.get(name) is not None]
    if len(names) == 2:
        raise InputError("it has both 'conversations' and 'messages', expected one of them")
    name = names[0] if names else "conversations"
    turns = field(row, name, list, what="a list of turns {from, value}")
    messages = read_messages(turns, {kind: _files(row, kind) for kind in KINDS}, place, options)
    _check_roles([message.role for message in messages])
    return Conversation(row["id"], Prompt(messages))


def read_messages(
    turns: Sequence[Any],
    files: Mapping[str, Sequence[Any]],
    place: Place,
    options: LlavaOptions,
) -> tuple[Message, ...]:
    """Return the messages of turns with their files in the places of markers.

    Args:
        turns: of `from` and `value`, or `role` and `content`.
        files: of each kind, in the order of their markers.

    Raises:
        InputError: a turn has another form, or there are more or fewer markers than files.
    """
    if not turns:
        raise InputError("its conversation is empty, expected turns of human and gpt")
    kinds = [kind for kind in KINDS if files[kind]]
    markers = KINDS if kinds == ["video"] else kinds  # many call videos <image>
    read = [_turn(turn, number, markers, options) for number, turn in enumerate(turns, 1)]
    slots = [
        piece.kind
        for _, pieces in read
        for piece in pieces
        if isinstance(piece, _Slot) and piece.value is None
    ]
    found = {kind: iter(files[kind]) for kind in KINDS}
    counts = {kind: slots.count(kind) for kind in KINDS}
    if kinds == ["video"]:
        found["image"] = found["video"]
        counts = {"image": 0, "video": len(slots)}
    for kind, number in counts.items():
        named = "image> or <video" if kinds == ["video"] else kind
        if number != len(files[kind]):
            raise InputError(
                f"it has {number} <{named}> in its text and {len(files[kind])} files for them, "
                "expected as many of the one as of the other"
            )

    def part(piece: Text | _Slot) -> Part:
        if isinstance(piece, Text):
            return piece
        is_open = piece.value is None
        value = next(found[piece.kind]) if is_open else piece.value
        kind = "video" if kinds == ["video"] and is_open else piece.kind
        return place.image(value) if kind == "image" else place.video(value, options.frames)

    return tuple(Message(role, tuple(map(part, pieces))) for role, pieces in read)


def _files(row: Row, kind: str) -> list[Any]:
    """Return the files of a row: under `image` or `images`, and likewise for videos."""
    one, many = listed(row.get(kind)), listed(row.get(f"{kind}s"))
    if one and many:
        raise InputError(f"it has both {kind!r} and '{kind}s', expected one of them")
    return one or many


def _turn(turn: Any, number: int, kinds: Sequence[str], options: LlavaOptions) -> _Turn:
    named = turn if isinstance(turn, dict) else {}
    said, content = named.get("from", named.get("role")), named.get("value", named.get("content"))
    role = _ROLES.get(said) if isinstance(said, str) else None
    if role is None or not isinstance(content, (str, list)):
        raise InputError(
            f"its turn {number} is {str(turn)[:80]!r}, expected {{from, value}} or {{role, "
            f"content}} with a role of {', '.join(_ROLES)} and a text or a list of parts"
        )
    if isinstance(content, list):
        pieces = [_content_part(part) for part in content]
    else:
        marker = re.compile(rf"<({'|'.join(kinds)})>\n?") if kinds else None
        if marker and role == "user":
            content = _moved(content, marker, options.images_first)
        pieces = list(_split(content, marker))
    if role != "user" and any(isinstance(piece, _Slot) for piece in pieces):
        raise InputError(f"an image or video stands in a turn of the {role}: {str(turn)[:60]!r}")
    return role, pieces


def _content_part(part: Any) -> Text | _Slot:
    """Return a part of a content list, as {type: image, image: a.jpg}."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return Text(part["text"])
    if kind in KINDS:
        return _Slot(kind, part.get(kind))
    raise InputError(
        f"a part of a message is {str(part)[:60]!r}, expected {{type: text, text}}, "
        "{type: image} or {type: video}"
    )


def _split(text: str, marker: re.Pattern[str] | None) -> Iterator[Text | _Slot]:
    at = 0
    for found in marker.finditer(text) if marker else ():
        if found.start() > at:
            yield Text(text[at : found.start()])
        yield _Slot(found[1])
        at = found.end()
    if at < len(text) or not text:
        yield Text(text[at:])


def _check_roles(roles: list[Role]) -> None:
    said = roles[1:] if roles[0] == "system" else roles
    if not said or said != ["user", "assistant"] * (len(said) // 2):
        raise InputError(
            f"its turns are of {', '.join(roles)}; expected human and gpt in turn, the first human "
            "(after a system turn, if any) and the last gpt"
        )


def _moved(text: str, marker: re.Pattern[str], images_first: str) -> str:
    markers = [found[0].rstrip("\n") for found in marker.finditer(text)]
    one_inside = len(markers) == 1 and not text.startswith(markers[0])
    if markers and (images_first == "all" or (images_first == "one" and one_inside)):
        rest = text
        for one in set(markers):
            rest = rest.replace(one, "")
        return "".join(f"{one}\n" for one in markers) + rest.strip()
    return text
