"""OpenAI's Responses API: one answer to one input, whole or as events. Nothing is stored."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

from visavis.serve.dialects.openai import SSE, schema_of
from visavis.serve.dialects.pieces import given, must_answer
from visavis.serve.errors import as_api_error
from visavis.serve.http import Call, Endpoint, Stream
from visavis.serve.media import Piece, Turn
from visavis.serve.schemas import responses as schemas
from visavis.serve.schemas.base import OpenAIError, TextPart
from visavis.serve.service import Chat

if TYPE_CHECKING:
    from visavis.generate.streaming import Reply


def _turns(body: schemas.ResponsesRequest) -> list[Turn]:
    turns: list[Turn] = []
    if body.instructions:
        turns.append(("system", [Piece("text", body.instructions)]))
    if isinstance(body.input, str):
        return [*turns, ("user", [Piece("text", body.input)])]
    for one in body.input:
        role = "system" if one.role == "developer" else one.role
        content = one.content
        pieces = [Piece("text", content)] if isinstance(content, str) else _pieces(content)
        turns.append((role, pieces))
    return turns


def _pieces(content: Sequence[Any]) -> list[Piece]:
    pieces = []
    for part in content:
        if isinstance(part, TextPart):
            pieces.append(Piece("text", part.text))
        elif isinstance(part, schemas.InputImage):
            pieces.append(Piece("image", part.image_url))
        else:
            pieces.append(Piece("document", part.file_data))
    return pieces


async def respond(call: Call) -> BaseModel | Stream:
    """Answer one input of text, images and documents (Responses API)."""
    body: schemas.ResponsesRequest = call.body
    turns = _turns(body)
    must_answer(turns)
    form = body.text.format if body.text else None
    settings = given(
        max_new_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        schema=schema_of(form.type, form.schema_) if form else None,
    )
    async with AsyncExitStack() as stack:
        chat = await stack.enter_async_context(call.service.chat(body.model, turns, settings))
        if body.stream:
            return Stream(_events(call, chat), SSE, stack.pop_all())
        reply = None
        async for piece in chat:
            reply = piece.reply or reply
        assert reply is not None
        call.service.count_tokens(chat.name, [reply])
        return _response(call, chat, reply)
    raise AssertionError  # for mypy: the block returns


def _response(call: Call, chat: Chat, reply: Reply | None) -> schemas.ResponsesResponse:
    """Return the response, without output while `reply` is None."""
    body: schemas.ResponsesRequest = call.body
    usage, output = None, []
    status: Literal["in_progress", "completed", "incomplete"] = "in_progress"
    if reply is not None:
        status = "completed" if reply.finish_reason == "stop" else "incomplete"
        output = [_message(call, reply.text, status)]
        read, new = reply.usage.prompt_tokens, reply.usage.completion_tokens
        cached = schemas.InputTokensDetails(cached_tokens=reply.usage.cached_tokens)
        usage = schemas.ResponsesUsage(
            input_tokens=read,
            input_tokens_details=cached,
            output_tokens=new,
            total_tokens=read + new,
        )
    limited = status == "incomplete"
    details = schemas.IncompleteDetails(reason="max_output_tokens") if limited else None
    return schemas.ResponsesResponse(
        id=f"resp_{call.request_id}",
        created_at=int(chat.created),
        status=status,
        model=chat.name,
        output=output,
        usage=usage,
        incomplete_details=details,
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
    )


def _message(call: Call, text: str, status: Any) -> schemas.OutputMessage:
    content = [] if status == "in_progress" else [schemas.OutputText(text=text)]
    return schemas.OutputMessage(id=f"msg_{call.request_id}", status=status, content=content)


async def _events(call: Call, chat: Chat) -> AsyncIterator[str]:
    number = 0

    def event(kind: str, **fields: Any) -> str:
        nonlocal number
        shown = {
            name: value.model_dump() if isinstance(value, BaseModel) else value
            for name, value in fields.items()
        }
        data = {"type": kind, "sequence_number": number, **shown}
        number += 1
        return f"event: {kind}\ndata: {json.dumps(data, ensure_ascii=False, allow_nan=False)}\n\n"

    begun = _response(call, chat, None)
    place = {"item_id": f"msg_{call.request_id}", "output_index": 0, "content_index": 0}
    yield event("response.created", response=begun)
    yield event("response.in_progress", response=begun)
    item = _message(call, "", "in_progress")
    yield event("response.output_item.added", output_index=0, item=item)
    yield event("response.content_part.added", part=schemas.OutputText(text=""), **place)
    try:
        reply = None
        async for piece in chat:
            reply = piece.reply
            if reply is None:
                yield event("response.output_text.delta", delta=piece.text, logprobs=[], **place)
    except Exception as error:
        told = as_api_error(error)
        failure = {"code": told.code or "server_error", "message": told.message}
        failed = begun.model_copy(update={"status": "failed", "error": failure})
        yield event("response.failed", response=failed)
        return
    assert reply is not None
    call.service.count_tokens(chat.name, [reply])
    done = _response(call, chat, reply)
    yield event("response.output_text.done", text=reply.text, logprobs=[], **place)
    yield event("response.content_part.done", part=done.output[0].content[0], **place)
    yield event("response.output_item.done", output_index=0, item=done.output[0])
    yield event(f"response.{done.status}", response=done)


ENDPOINTS = [
    Endpoint(
        "POST",
        "/v1/responses",
        respond,
        schemas.ResponsesResponse,
        OpenAIError,
        request=schemas.ResponsesRequest,
        streams="text/event-stream",
        tag="OpenAI",
    )
]
