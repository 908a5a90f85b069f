"""The conversation of the web page: about items and files, answered as server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from starlette.datastructures import FormData, UploadFile

from visavis.errors import InputError
from visavis.index import Index
from visavis.index.items import visual_of
from visavis.inputs import Text
from visavis.serve.dialects.openai import SSE
from visavis.serve.dialects.search import with_index
from visavis.serve.errors import as_api_error
from visavis.serve.http import Call, Stream
from visavis.serve.indexes import item_of
from visavis.serve.media import Kind, Piece, Turn
from visavis.serve.service import Chat

MAX_NEW_TOKENS = 256
MAX_TURNS = 200


class Shown(BaseModel):
    """An item of the index or one of the uploaded files, counted from 0, that a turn shows."""

    model_config = ConfigDict(extra="forbid")
    item: int | None = Field(None, ge=0, lt=2**63)
    file: int | None = Field(None, ge=0)


class PageTurn(BaseModel):
    """A turn of the conversation."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "user", "assistant"]
    text: str
    images: list[Shown] = Field([], max_length=64)


_TURNS = TypeAdapter(list[PageTurn])


async def chat(call: Call) -> Stream:
    """Answer a conversation about items and uploaded files."""
    form: FormData = call.body
    told = _conversation(form.get("messages"))
    files = [await _file(one) for one in form.getlist("file") if isinstance(one, UploadFile)]
    named = {one.item for turn in told for one in turn.images if one.item is not None}
    items: dict[int, Piece] = {}
    if named:
        items = await with_index(
            call, None, lambda index: {number: _item(index, number) for number in named}
        )
    turns: list[Turn] = [
        (turn.role, [*_pieces(turn.images, items, files), Piece("text", Text(turn.text).text)])
        for turn in told
    ]
    async with AsyncExitStack() as stack:
        settings: Any = {"max_new_tokens": MAX_NEW_TOKENS}
        begun = await stack.enter_async_context(call.service.chat(None, turns, settings))
        return Stream(_events(call, begun), SSE, stack.pop_all())
    raise AssertionError  # for mypy: the block returns


async def _events(call: Call, begun: Chat) -> AsyncIterator[str]:
    def event(**data: Any) -> str:
        return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"

    try:
        async for piece in begun:
            if piece.reply is None:
                yield event(piece=piece.text)
                continue
            reply = piece.reply
            call.service.count_tokens(begun.name, [reply])
            seconds = round(reply.timings.prefill_s + reply.timings.decode_s, 2)
            tokens = reply.usage.completion_tokens
            yield event(done=reply.finish_reason, tokens=tokens, seconds=seconds)
    except Exception as error:
        yield event(error=as_api_error(error).message)


def _conversation(text: Any) -> list[PageTurn]:
    """Return the conversation; the last turn is the user's question."""
    try:
        turns = _TURNS.validate_json(text if isinstance(text, str) else "")
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "messages"
        raise InputError(
            f"messages are not a list of role, text and images ({place}: {first['msg']})"
        ) from None
    if not turns or turns[0].role == "assistant" or turns[-1].role != "user":
        raise InputError("messages must begin and end with one of the user")
    if len(turns) > MAX_TURNS:
        raise InputError(f"{len(turns)} messages, expected at most {MAX_TURNS}; begin a new chat")
    return turns


def _pieces(shown: Sequence[Shown], items: dict[int, Piece], files: Sequence[Piece]) -> list[Piece]:
    pieces = []
    for one in shown:
        if one.item is not None and one.file is None:
            pieces.append(items[one.item])
        elif one.item is None and one.file is not None and one.file < len(files):
            pieces.append(files[one.file])
        else:
            raise InputError("an image of a message names neither an item nor an uploaded file")
    return pieces


def _item(index: Index, number: int) -> Piece:
    item = item_of(index, number)
    visual = visual_of(item)
    return Piece("text", item.text) if visual is None else Piece("image", visual)


async def _file(upload: UploadFile) -> Piece:
    media_type = upload.content_type or ""
    kinds: dict[str, Kind] = {"video/": "video", "application/pdf": "document"}
    kind: Kind = next(
        (kind for start, kind in kinds.items() if media_type.startswith(start)), "image"
    )
    return Piece(kind, await upload.read())
