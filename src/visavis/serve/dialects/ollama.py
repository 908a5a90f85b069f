"""Ollama's API: chat, generate, embed and models. Its streams are one JSON object a line."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

import visavis
from visavis.errors import InputError
from visavis.serve.dialects.openai import ANY_JSON, schema_of, token_logprobs
from visavis.serve.dialects.pieces import given, must_answer
from visavis.serve.errors import as_api_error
from visavis.serve.http import Call, Endpoint, Stream
from visavis.serve.media import Piece, Turn
from visavis.serve.models import Entry, ServedModel, TokenScore
from visavis.serve.schemas import ollama as schemas
from visavis.serve.schemas.base import TextError
from visavis.serve.service import Chat

if TYPE_CHECKING:
    from visavis.generate.streaming import Reply

NDJSON = "application/x-ndjson"
_DURATION = re.compile(r"(-?[0-9.]+)(ms|h|m|s)")
LONGEST = 1e9  # seconds, some thirty years
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def keep_seconds(value: float | str | None) -> float | None:
    """Return the seconds that a `keep_alive` says: a number, or "5m", "1h30m".

    Raises:
        InputError: it is neither.
    """
    if value is None:
        return value
    try:
        seconds = float(value)
    except (ValueError, OverflowError):
        value = str(value)
        matches = list(_DURATION.finditer(value))
        if not matches or "".join(match[0] for match in matches) != value:
            raise InputError(
                f"keep_alive is {value[:40]!r}, expected seconds or a duration such as '5m'"
            ) from None
        try:
            seconds = sum(float(match[1]) * _UNITS[match[2]] for match in matches)
        except ValueError:
            raise InputError(f"keep_alive is {value[:40]!r}, not a duration") from None
    if not math.isfinite(seconds):
        raise InputError(f"keep_alive is {seconds}, expected a finite number")
    return min(seconds, LONGEST)


def _settings(options: schemas.Options | None, form: Any) -> dict[str, Any]:
    options = options or schemas.Options()
    schema = None
    if form == "json":
        schema = ANY_JSON
    elif isinstance(form, dict):
        schema = schema_of("json_schema", form)
    limit = options.num_predict
    if limit == 0:
        raise InputError("num_predict is 0, expected at least 1, or -1 for no limit of its own")
    return given(
        max_new_tokens=limit if limit is not None and limit > 0 else None,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repeat_penalty,
        seed=options.seed,
        stop=options.stop,
        schema=schema,
    )


async def chat(call: Call) -> BaseModel | Stream:
    """Answer a conversation; images belong to its messages (Ollama's API)."""
    body: schemas.OllamaChatRequest = call.body
    turns: list[Turn] = [
        (one.role, _pieces(one.content or "", one.images)) for one in body.messages or []
    ]

    def shaped(text: str, **more: Any) -> BaseModel:
        message = schemas.OllamaMessageOut(content=text)
        return schemas.OllamaChatResponse(message=message, **more)

    return await _answer(call, turns, shaped)


async def generate(call: Call) -> BaseModel | Stream:
    """Answer one prompt (Ollama's API)."""
    body: schemas.GenerateRequest = call.body
    turns: list[Turn] = []
    if body.prompt or body.images:
        if body.system:
            turns.append(("system", [Piece("text", body.system)]))
        turns.append(("user", _pieces(body.prompt or "", body.images)))

    def shaped(text: str, **more: Any) -> BaseModel:
        return schemas.GenerateResponse(response=text, **more)

    return await _answer(call, turns, shaped)


async def _answer(
    call: Call, turns: Sequence[Turn], shaped: Callable[..., BaseModel]
) -> BaseModel | Stream:
    body, started = call.body, time.perf_counter_ns()
    keep = keep_seconds(body.keep_alive)
    if not turns:  # how clients load a model ahead of time, or unload it
        async with call.service.pool.using(body.model, keep) as served:
            reason = "unload" if keep == 0 else "load"
            return shaped("", model=served.name, created_at=_now(), done=True, done_reason=reason)
    must_answer(turns)
    scored = bool(body.logprobs)
    async with AsyncExitStack() as stack:
        chat = await stack.enter_async_context(
            call.service.chat(
                body.model,
                turns,
                _settings(body.options, body.format),
                top_logprobs=(body.top_logprobs or 0) if scored else None,
                keep_seconds=keep,
            )
        )
        if body.stream is not False:
            events = _lines(call, chat, shaped, started, scored)
            return Stream(events, NDJSON, stack.pop_all())
        scores: list[TokenScore] = []
        reply = None
        async for piece in chat:
            scores += piece.scores
            reply = piece.reply or reply
        assert reply is not None
        call.service.count_tokens(chat.name, [reply])
        logprobs = token_logprobs(chat, scores) if scored else None
        return shaped(reply.text, logprobs=logprobs, **_finished(chat, reply, started))
    raise AssertionError  # for mypy: the block returns


async def _lines(
    call: Call, chat: Chat, shaped: Callable[..., BaseModel], started: int, scored: bool
) -> AsyncIterator[str]:
    try:
        async for piece in chat:
            logprobs = token_logprobs(chat, piece.scores) if scored else None
            if piece.reply is None:
                more: dict[str, Any] = {"model": chat.name, "created_at": _now(), "done": False}
            else:
                call.service.count_tokens(chat.name, [piece.reply])
                more = _finished(chat, piece.reply, started)
            line = shaped(piece.text, logprobs=logprobs, **more)
            yield line.model_dump_json(exclude_none=True) + "\n"
    except Exception as error:
        yield json.dumps({"error": as_api_error(error).message}) + "\n"


def _finished(chat: Chat, reply: Reply, started: int) -> dict[str, Any]:
    return {
        "model": chat.name,
        "created_at": _now(),
        "done": True,
        "done_reason": reply.finish_reason,
        "total_duration": time.perf_counter_ns() - started,
        "load_duration": 0,
        "prompt_eval_count": reply.usage.prompt_tokens,
        "prompt_eval_duration": int(reply.timings.prefill_s * 1e9),
        "eval_count": reply.usage.completion_tokens,
        "eval_duration": int(reply.timings.decode_s * 1e9),
    }


def _pieces(text: str, images: Sequence[str] | None) -> list[Piece]:
    shown = [Piece("image", image) for image in images or []]
    return [*shown, *([Piece("text", text)] if text else [])]


async def embed(call: Call) -> BaseModel:
    """Embed texts, images, or pairs of both (Ollama's API)."""
    body: schemas.EmbedRequest = call.body
    texts = [body.input] if isinstance(body.input, str) else body.input or []
    inputs = [[Piece("text", text)] for text in texts]
    inputs += [[Piece("image", image)] for image in body.images or []]
    inputs += [
        _pieces(pair.text or "", [pair.image] if pair.image else None) for pair in body.inputs or []
    ]
    started = time.perf_counter_ns()
    if not inputs:
        raise InputError("nothing to embed: input, images and inputs are empty")
    found = await call.service.embed(
        body.model,
        inputs,
        instruction=body.instruction,
        dim=body.dimensions,
        keep_seconds=keep_seconds(body.keep_alive),
    )
    return schemas.EmbedResponse.model_construct(
        model=found.name,
        embeddings=await call.service.prepare(found.vectors.tolist),
        total_duration=time.perf_counter_ns() - started,
        load_duration=0,
        prompt_eval_count=found.num_tokens,
    )


async def old_embed(call: Call) -> BaseModel:
    """Embed one text (the older form of Ollama's API)."""
    body: schemas.OldEmbedRequest = call.body
    if not body.prompt:
        raise InputError("nothing to embed: prompt is empty")
    found = await call.service.embed(
        body.model,
        [[Piece("text", body.prompt)]],
        keep_seconds=keep_seconds(body.keep_alive),
    )
    return schemas.OldEmbedResponse(embedding=found.vectors[0].tolist())


async def tags(call: Call) -> BaseModel:
    """List the served models (Ollama's API)."""
    entries = call.service.pool.entries.items()
    return schemas.TagsResponse(models=[_tag(name, entry) for name, entry in entries])


async def show(call: Call) -> BaseModel:
    """Describe a served model, loading it first (Ollama's API)."""
    body: schemas.ShowRequest = call.body
    async with call.service.pool.using(body.model or body.name) as served:
        entry = call.service.pool.entries[served.name]
        model = served.model
        info = {
            "general.architecture": "visavis",
            "general.basename": served.name,
            "general.parameter_count": model.num_parameters,
            "visavis.context_length": model.context_length,
        }
        capabilities = []
        if not (model.has_multi_vectors or model.is_reranker):
            info["visavis.embedding_length"] = model.embedding_dim
            capabilities.append("embedding")
        if model.encoder.can_chat:
            capabilities.append("completion")
        if model.takes_images:
            capabilities.append("vision")
        return schemas.ShowResponse(
            details=_details(served),
            model_info=info,
            capabilities=capabilities,
            modified_at=_time(entry.modified),
        )


async def running(call: Call) -> BaseModel:
    """List the loaded models (Ollama's API)."""
    pool, shown = call.service.pool, []
    for name, entry in pool.entries.items():
        if entry.served is None:
            continue
        expiry = pool.expiry(entry)
        # Never is told as Ollama does: a time far away.
        left = timedelta(days=36500 if expiry is None else (expiry - time.monotonic()) / 86400)
        shown.append(
            schemas.Running(
                **_tag(name, entry).model_dump(),
                expires_at=(datetime.now(UTC) + left).isoformat(),
                size_vram=entry.served.num_bytes if entry.served.on_gpu else 0,
                context_length=entry.served.model.context_length,
            )
        )
    return schemas.RunningResponse(models=shown)


async def version(call: Call) -> BaseModel:
    """Tell the version (Ollama's API)."""
    return schemas.VersionResponse(version=visavis.__version__)


def _tag(name: str, entry: Entry) -> schemas.Tag:
    served = entry.served
    return schemas.Tag(
        name=name,
        model=name,
        modified_at=_time(entry.modified),
        size=served.num_bytes if served else 0,
        digest=served.model.fingerprint if served else "",
        details=_details(served),
    )


def _details(served: ServedModel | None) -> schemas.Details:
    millions = f"{served.model.num_parameters / 1e6:.1f}M" if served else ""
    kind = served.number_type if served else ""
    return schemas.Details(
        format="visavis",
        family="llava",
        families=["llava"],
        parameter_size=millions,
        quantization_level=kind,
    )


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def _now() -> str:
    return datetime.now(UTC).isoformat()


def _endpoint(
    method: str, path: str, handler: Any, response: Any, request: Any = None, streams: str = ""
) -> Endpoint:
    return Endpoint(method, path, handler, response, TextError, request, streams, tag="Ollama")


ENDPOINTS = [
    _endpoint(
        "POST", "/api/chat", chat, schemas.OllamaChatResponse, schemas.OllamaChatRequest, NDJSON
    ),
    _endpoint(
        "POST", "/api/generate", generate, schemas.GenerateResponse, schemas.GenerateRequest, NDJSON
    ),
    _endpoint("POST", "/api/embed", embed, schemas.EmbedResponse, schemas.EmbedRequest),
    _endpoint(
        "POST", "/api/embeddings", old_embed, schemas.OldEmbedResponse, schemas.OldEmbedRequest
    ),
    _endpoint("GET", "/api/tags", tags, schemas.TagsResponse),
    _endpoint("POST", "/api/show", show, schemas.ShowResponse, schemas.ShowRequest),
    _endpoint("GET", "/api/ps", running, schemas.RunningResponse),
    _endpoint("GET", "/api/version", version, schemas.VersionResponse),
]
