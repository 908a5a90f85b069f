"""The API of the web page: forms with an uploaded image, answers as server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from starlette.datastructures import FormData, UploadFile
from starlette.responses import HTMLResponse, Response

from visavis.errors import InputError
from visavis.index import Index
from visavis.index.items import visual_of
from visavis.inputs import Text, Visual
from visavis.serve.dialects.openai import SSE
from visavis.serve.dialects.search import image, with_index
from visavis.serve.errors import as_api_error
from visavis.serve.http import Call, Endpoint, Stream
from visavis.serve.indexes import described, item_of
from visavis.serve.media import Piece, Turn
from visavis.serve.schemas.base import TextError
from visavis.serve.service import Chat

WEB_FOLDER = Path(__file__).parents[1] / "web"
MAX_HITS = 100
MAX_NEW_TOKENS = 256
ITEMS = "/page/items"


async def page(call: Call) -> Response:
    """Return the web page."""
    return HTMLResponse((WEB_FOLDER / "index.html").read_bytes())


async def info(call: Call) -> Any:
    """Tell what is served, and the items to show first."""

    def work(index: Index) -> dict[str, Any]:
        items = [described(one, ITEMS) for one in index.items(MAX_HITS)]
        return {"num_items": len(index), "items": items}

    service = call.service
    async with service.pool.using(None) as served:
        about = {
            "model": served.model.name,
            "takes_images": served.model.takes_images,
            "examples": list(service.examples),
        }
    return {**about, **await with_index(call, None, work)}


async def search(call: Call) -> Any:
    """Find items by words, an uploaded image, both, or another item."""
    form: FormData = call.body
    text = _field(form, "text").strip()
    shown = await _uploaded(form)
    like = _number(form, "like") if shown is None and _field(form, "like") else None
    k = min(_number(form, "k", default=24), MAX_HITS)
    if not text and shown is None and like is None:
        raise InputError("nothing to look for: type some words or add an image")

    def find(index: Index) -> dict[str, Any]:
        found = call.service.reader().image(Piece("image", shown)) if shown is not None else None
        indexes = call.service.indexes
        hits = indexes.search(index, indexes.query(index, text, found, like), k)
        only_words = shown is None and like is None
        least = index.model.profile.min_score
        return {
            "hits": [{**described(hit.item, ITEMS), "score": round(hit.score, 4)} for hit in hits],
            "nothing_similar": only_words and bool(hits) and hits[0].score < least,
        }

    return await with_index(call, None, find)


async def chat(call: Call) -> Stream:
    """Answer a conversation about an uploaded image or an item."""
    form: FormData = call.body
    turns = _turns(_field(form, "messages"))
    visual: bytes | Visual | None = await _uploaded(form)
    if visual is None and _field(form, "like"):
        number = _number(form, "like")
        visual = await with_index(call, None, lambda index: visual_of(item_of(index, number)))
        if visual is None:
            raise InputError(f"item {number} has no image")
    if visual is not None:  # the whole conversation is about it: it opens the first turn
        role, pieces = turns[0]
        turns[0] = role, [Piece("image", visual), *pieces]
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


def _turns(text: str) -> list[Turn]:
    """Return the conversation; the last turn is the user's question."""
    try:
        given = json.loads(text)
        turns: list[Turn] = [
            (turn["role"], [Piece("text", Text(turn["text"]).text)]) for turn in given
        ]
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        name = type(error).__name__
        raise InputError(f"messages are not a list of role and text ({name})") from None
    roles = {role if isinstance(role, str) else "" for role, _ in turns}
    if not roles <= {"system", "user", "assistant"}:
        raise InputError("a message has another role than system, user or assistant")
    if not turns or turns[0][0] != "user" or turns[-1][0] != "user":
        raise InputError("messages must begin and end with one of the user")
    return turns


async def _uploaded(form: FormData) -> bytes | None:
    upload = form.get("image")
    return await upload.read() if isinstance(upload, UploadFile) else None


def _field(form: FormData, name: str) -> str:
    value = form.get(name, "")
    if not isinstance(value, str):
        raise InputError(f"{name} is a file, expected text")
    return value


def _number(form: FormData, name: str, default: int | None = None) -> int:
    value = _field(form, name)
    if not value and default is not None:
        return default
    try:
        return int(value[:40])
    except ValueError:
        raise InputError(f"{name} is {value[:40]!r}, expected a number") from None


def _endpoint(method: str, path: str, handler: Any, *, form: bool = False) -> Endpoint:
    return Endpoint(method, path, handler, BaseModel, TextError, form=form)


ENDPOINTS = [  # of the page alone: not in the API's description
    _endpoint("GET", "/", page),
    _endpoint("GET", "/page/info", info),
    _endpoint("POST", "/page/search", search, form=True),
    _endpoint("POST", "/page/chat", chat, form=True),
    _endpoint("GET", f"{ITEMS}/{{item:int}}/image", image),
]
