"""OpenAI's chat completions and list of models."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from visavis.errors import InputError
from visavis.serve.dialects.pieces import given, must_answer, turns_of
from visavis.serve.errors import as_api_error, body_of
from visavis.serve.http import Call, Endpoint, Stream
from visavis.serve.models import TokenScore
from visavis.serve.schemas import openai as schemas
from visavis.serve.schemas.base import OpenAIError
from visavis.serve.service import Chat, Piecewise

if TYPE_CHECKING:
    from visavis.generate.streaming import Reply

SSE = "text/event-stream; charset=utf-8"
ANY_JSON = {"type": "object"}
MAX_SCHEMA_BYTES = 64 * 1024


def schema_of(kind: str, schema: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the JSON schema that an answer keeps to; None: any text.

    Raises:
        InputError: the schema is missing or too large.
    """
    if kind == "text":
        return None
    if kind == "json_object":
        return ANY_JSON
    if schema is None:
        raise InputError("response format json_schema holds no schema")
    if len(json.dumps(schema)) > MAX_SCHEMA_BYTES:
        raise InputError(f"the JSON schema has more than {MAX_SCHEMA_BYTES // 1024} KiB")
    return schema


def settings_of(body: schemas.ChatRequest) -> dict[str, Any]:
    """Return the settings of generation that a request asks for."""
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise InputError("max_tokens and max_completion_tokens are two names of one thing")
    schema = None
    if (form := body.response_format) is not None:
        schema = schema_of(form.type, form.json_schema.schema_ if form.json_schema else None)
    return given(
        max_new_tokens=body.max_completion_tokens or body.max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=None if body.top_k is None else max(0, body.top_k),  # -1: all
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        logit_bias=body.logit_bias,
        seed=body.seed,
        stop=body.stop,
        schema=schema,
    )


async def complete(call: Call) -> BaseModel | Stream:
    """Answer a conversation about text, images, videos and documents."""
    body: schemas.ChatRequest = call.body
    turns = turns_of(body.messages)
    must_answer(turns)
    if body.top_logprobs is not None and not body.logprobs:
        raise InputError("top_logprobs needs logprobs: true")
    stack = AsyncExitStack()
    async with stack:
        chat = await stack.enter_async_context(
            call.service.chat(
                body.model,
                turns,
                settings_of(body),
                n=body.n or 1,
                top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            )
        )
        if body.stream:
            return Stream(_events(call, chat), SSE, stack.pop_all())
        texts = [""] * (body.n or 1)
        scores: list[list[TokenScore]] = [[] for _ in texts]
        replies: dict[int, Reply] = {}
        async for piece in chat:
            scores[piece.index] += piece.scores
            if piece.reply is not None:
                replies[piece.index] = piece.reply
                texts[piece.index] = piece.reply.text
        ordered = [replies[number] for number in range(len(texts))]
        call.service.count_tokens(chat.name, ordered)
        choices = [
            schemas.Choice(
                index=number,
                message=schemas.AnswerMessage(content=text),
                finish_reason=_reason(ordered[number]),
                logprobs=logprobs_of(chat, scores[number]) if body.logprobs else None,
            )
            for number, text in enumerate(texts)
        ]
        return schemas.ChatResponse(
            id=f"chatcmpl-{call.request_id}",
            created=int(chat.created),
            model=chat.name,
            choices=choices,
            usage=usage_of(ordered),
        )
    raise AssertionError  # for mypy: the block returns


async def _events(call: Call, chat: Chat) -> AsyncIterator[str]:
    body: schemas.ChatRequest = call.body
    with_usage = bool(body.stream_options and body.stream_options.include_usage)

    def event(choices: list[schemas.ChunkChoice], **more: Any) -> str:
        chunk = schemas.ChatChunk(
            id=f"chatcmpl-{call.request_id}",
            created=int(chat.created),
            model=chat.name,
            choices=choices,
            **more,
        )
        left_out = set() if with_usage else {"usage"}
        dumped = chunk.model_dump(exclude=left_out)
        for choice in dumped["choices"]:
            choice["delta"] = {k: v for k, v in choice["delta"].items() if v is not None}
        return f"data: {json.dumps(dumped, ensure_ascii=False, allow_nan=False)}\n\n"

    def choice(piece: Piecewise, **delta: str) -> schemas.ChunkChoice:
        scored = body.logprobs and piece.scores
        return schemas.ChunkChoice(
            index=piece.index,
            delta=schemas.Delta.model_validate(delta),
            finish_reason=_reason(piece.reply) if piece.reply else None,
            logprobs=logprobs_of(chat, piece.scores) if scored else None,
        )

    try:
        for number in range(body.n or 1):
            yield event([choice(Piecewise(number, ""), role="assistant", content="")])
        replies: list[Reply] = []
        async for piece in chat:
            if piece.reply is not None:
                replies.append(piece.reply)
                yield event([choice(piece)])
            else:
                yield event([choice(piece, content=piece.text)])
        call.service.count_tokens(chat.name, replies)
        if with_usage:
            yield event([], usage=usage_of(replies))
    except Exception as error:
        yield f"data: {json.dumps(body_of(as_api_error(error), 'openai'))}\n\n"
    yield "data: [DONE]\n\n"


def logprobs_of(chat: Chat, scores: Sequence[TokenScore]) -> schemas.Logprobs:
    """Return the log probabilities of tokens."""
    return schemas.Logprobs(content=token_logprobs(chat, scores))


def token_logprobs(chat: Chat, scores: Sequence[TokenScore]) -> list[schemas.TokenLogprob]:
    """Return each token with its log probability."""

    def shown(token_id: int, logprob: float) -> dict[str, Any]:
        text = chat.token_text(token_id)
        # JSON has no -infinity: what a grammar forbids is as unlikely as a float can say.
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}

    return [
        schemas.TokenLogprob(
            **shown(score.token_id, score.logprob),
            top_logprobs=[schemas.TopLogprob(**shown(*top)) for top in score.top],
        )
        for score in scores
    ]


def usage_of(replies: Sequence[Reply]) -> schemas.Usage:
    """Return the tokens of a request; its prompt counts once."""
    prompt = replies[0].usage.prompt_tokens
    new = sum(reply.usage.completion_tokens for reply in replies)
    cached = min(reply.usage.cached_tokens for reply in replies)
    return schemas.Usage(
        prompt_tokens=prompt,
        completion_tokens=new,
        total_tokens=prompt + new,
        prompt_tokens_details=schemas.TokenDetails(cached_tokens=cached),
    )


def _reason(reply: Reply) -> Any:
    return reply.finish_reason


async def models(call: Call) -> BaseModel:
    """List the served models."""
    created = call.service.started
    cards = [schemas.ModelCard(id=name, created=created) for name in call.service.pool.entries]
    return schemas.ModelList(data=cards)


async def model(call: Call) -> BaseModel:
    """Describe one served model."""
    name = call.service.pool.resolve(call.path["model"])
    return schemas.ModelCard(id=name, created=call.service.started)


def _endpoint(method: str, path: str, handler: Any, response: Any, **more: Any) -> Endpoint:
    return Endpoint(method, path, handler, response, OpenAIError, tag="OpenAI", **more)


ENDPOINTS = [
    _endpoint(
        "POST",
        "/v1/chat/completions",
        complete,
        schemas.ChatResponse,
        request=schemas.ChatRequest,
        streams="text/event-stream",
    ),
    _endpoint("GET", "/v1/models", models, schemas.ModelList),
    _endpoint("GET", "/v1/models/{model:path}", model, schemas.ModelCard),
]
