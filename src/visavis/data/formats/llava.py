"""LLaVA's conversations: {id, image or video, conversations: [{from, value}]}.

    {"id": 7, "image": "a.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWho?"}, {"from": "gpt", "value": "A cat."}]}

Markers say where pictures go. One newline after a marker is dropped: the chat format of the model
writes what stands there. Markers of files that are not there, and files without markers, are
errors; LLaVA's own code trains on the wrong picture then.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal

from visavis.data.examples import Conversation
from visavis.data.media_paths import Options, Place, field, listed
from visavis.data.readers import Row
from visavis.errors import InputError
from visavis.inputs import Message, Part, Prompt, Role, Text, Visual

_MARKER = re.compile(r"<(image|video)>\n?")
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


def conversation(row: Row, place: Place, options: LlavaOptions) -> Conversation:
    """Return a row's conversation.

    Raises:
        InputError: roles or markers do not fit.
    """
    turns = list(_turns(row))
    _check_roles([role for role, _ in turns])
    values = [
        _moved(text, options.images_first) if role == "user" else text for role, text in turns
    ]
    visuals = _visuals(row, values, place, options.frames)
    messages = []
    for (role, _), value in zip(turns, values, strict=True):
        if role != "user" and _MARKER.search(value):
            raise InputError(
                f"a marker of a picture stands in a turn of the {role}: {value[:60]!r}"
            )
        messages.append(Message(role, tuple(_parts(value, visuals))))
    return Conversation(row["id"], Prompt(tuple(messages)))


def _turns(row: Row) -> Iterator[tuple[Role, str]]:
    """Yield role and text of each turn; `from` and `value`, or `role` and `content`."""
    turns = field(row, "conversations", list, what="a list of turns {from, value}")
    if not turns:
        raise InputError("its conversation is empty, expected turns of human and gpt")
    for number, turn in enumerate(turns, 1):
        named = turn if isinstance(turn, dict) else {}
        role, text = named.get("from", named.get("role")), named.get("value", named.get("content"))
        if role not in _ROLES or not isinstance(text, str):
            raise InputError(
                f"its turn {number} is {str(turn)[:80]!r}, expected {{from, value}} with from one "
                f"of {', '.join(_ROLES)} and value a text"
            )
        yield _ROLES[role], text


def _check_roles(roles: list[Role]) -> None:
    said = roles[1:] if roles[0] == "system" else roles
    if not said or said != ["user", "assistant"] * (len(said) // 2):
        raise InputError(
            f"its turns are of {', '.join(roles)}; expected human and gpt in turn, the first human "
            "(after a system turn, if any) and the last gpt"
        )


def _moved(text: str, images_first: str) -> str:
    markers = [found[0].rstrip("\n") for found in _MARKER.finditer(text)]
    one_inside = len(markers) == 1 and not text.startswith(markers[0])
    if markers and (images_first == "all" or (images_first == "one" and one_inside)):
        rest = re.sub("<image>|<video>", "", text).strip()
        return "".join(f"{marker}\n" for marker in markers) + rest
    return text


def _visuals(
    row: Row, values: list[str], place: Place, frames: int | None
) -> dict[str, Iterator[Visual]]:
    """Return what the markers stand for, in order. A row of videos alone may mark them as images.

    Raises:
        InputError: there are more or fewer markers than files.
    """
    marked = [found[1] for value in values for found in _MARKER.finditer(value)]
    images: list[Any] = [place.image(one) for one in listed(row.get("image"))]
    videos: list[Any] = [place.video(one, frames) for one in listed(row.get("video"))]
    if videos and not images:
        kinds = [("image> or <video", len(marked), videos)]
        files = iter(videos)
        found = {"image": files, "video": files}
    else:
        kinds = [
            (kind, marked.count(kind), each)
            for kind, each in (("image", images), ("video", videos))
        ]
        found = {"image": iter(images), "video": iter(videos)}
    for kind, number, each in kinds:
        if number != len(each):
            raise InputError(
                f"it has {number} <{kind}> in its text and {len(each)} files for them, expected "
                "as many of the one as of the other"
            )
    return found


def _parts(text: str, visuals: dict[str, Iterator[Visual]]) -> Iterator[Part]:
    at = 0
    for found in _MARKER.finditer(text):
        if found.start() > at:
            yield Text(text[at : found.start()])
        yield next(visuals[found[1]])
        at = found.end()
    if at < len(text) or not text:
        yield Text(text[at:])
