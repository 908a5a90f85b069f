"""One endpoint of an API: reads and checks its request, runs it, sends its response.

read_body (bytes, time) ──► pydantic model ──► handler ──► pydantic model, or a Stream of text
                                                 │
                client gone, or out of time: the handler is cancelled, its memory returned
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Any, TypeAlias

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response as StarletteResponse
from starlette.types import Message, Receive, Scope, Send

from visavis.serve.config import Limits
from visavis.serve.errors import ApiError, as_api_error
from visavis.serve.guard import send_error, send_json
from visavis.serve.service import Service

LARGE_BODY = 64 * 2**10  # bytes; larger bodies are parsed beside the event loop
MAX_KEYS = 50_000  # of a body: each may be wrong, and what is wrong is listed


@dataclass(frozen=True)
class Stream:
    """A response in pieces.

    Args:
        events: the text, piece by piece.
        media_type: of the response.
        stack: what the events hold; closed after them, also where the client leaves before the
            first.
    """

    events: AsyncIterator[str]
    media_type: str
    stack: AsyncExitStack


@dataclass(frozen=True)
class Call:
    """One request to an endpoint."""

    service: Service
    body: Any  # the request model; None where there is none
    path: dict[str, Any]
    query: str
    request_id: str


# Gives a pydantic model or dict, a Stream, or a response of Starlette.
Handler: TypeAlias = Callable[[Call], Awaitable[Any]]


@dataclass(frozen=True)
class Endpoint:
    """A method and path of an API, with what it takes and gives.

    Args:
        request: the model of its JSON body; None: it takes none.
        response: the model of its JSON response; str of a text, bytes of a JPEG.
        error: the model of its errors.
        streams: media type of its streamed form; empty: it has none.
        tag: heading in the API's description; empty: it is left out of that.
        form: whether its body is an HTML form.
    """

    method: str
    path: str
    handler: Handler
    response: type
    error: type[BaseModel]
    request: type[BaseModel] | None = None
    streams: str = ""
    tag: str = ""
    form: bool = False

    @property
    def summary(self) -> str:
        """The first line of the handler's docstring."""
        return (self.handler.__doc__ or "").strip().partition("\n")[0]


class EndpointApp:
    """The ASGI application of one endpoint."""

    def __init__(self, endpoint: Endpoint, service: Service) -> None:
        self.endpoint, self.service = endpoint, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["route"] = self.endpoint.path
        limits = self.service.config.limits
        started = False

        async def send_noted(message: Any) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            body = await read_body(scope, receive, limits)
            work = asyncio.create_task(self._respond(scope, body, send_noted))
            await until_done_or_gone(work, receive, limits.request_seconds)
        except (ClientGoneError, OSError):
            return
        except Exception as error:
            if started:  # uvicorn logs it and closes the connection
                raise
            await send_error(scope, send_noted, as_api_error(error))

    async def _respond(self, scope: Scope, body: bytes, send: Send) -> None:
        endpoint, service = self.endpoint, self.service
        parsed: Any = None
        if endpoint.request is not None:
            parse = parser(endpoint.request, body)
            parsed = await service.prepare(parse) if len(body) > LARGE_BODY else parse()
            if hasattr(parsed, "model"):
                scope["state"]["model"] = service.pool.resolve(parsed.model)
        elif endpoint.form:
            parsed = await form_of(scope, body, service.config.limits.images)
        call = Call(
            service,
            parsed,
            scope.get("path_params", {}),
            scope.get("query_string", b"").decode("latin-1"),
            scope["state"]["request_id"],
        )
        result = await endpoint.handler(call)
        if isinstance(result, Stream):
            await send_stream(send, result)
            return
        if isinstance(result, StarletteResponse):
            await result(scope, _nothing, send)
            return
        dumped = await service.prepare(lambda: _dumped(result))
        await send_json(send, 200, dumped, {})


def _dumped(result: BaseModel | dict[str, Any]) -> bytes:
    if isinstance(result, BaseModel):
        return result.model_dump_json(by_alias=True).encode()
    return json.dumps(result, allow_nan=False).encode()


async def _nothing() -> Message:
    """Wait for good: a client that leaves is noticed by `until_done_or_gone`."""
    await asyncio.Event().wait()
    raise AssertionError


async def form_of(scope: Scope, body: bytes, max_files: int) -> FormData:
    """Return the fields of an HTML form.

    Raises:
        ApiError: it is malformed (400).
    """

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    try:
        limit = max(len(body), 1)
        return await Request(scope, receive).form(
            max_files=max_files, max_fields=16, max_part_size=limit
        )
    except HTTPException as error:
        message = f"the form is malformed: {error.detail}"
        raise ApiError(error.status_code, message, code="invalid_form") from None


class ClientGoneError(Exception):
    """The client has closed the connection."""


async def until_done_or_gone(work: asyncio.Task[None], receive: Receive, seconds: float) -> None:
    """Wait for a task; cancel it when the client leaves or the time is over.

    Raises:
        ClientGoneError: the client has left.
        ApiError: the time is over (504).
    """
    gone = asyncio.create_task(disconnected(receive))
    try:
        await asyncio.wait({work, gone}, timeout=seconds, return_when="FIRST_COMPLETED")
        if work.done():
            work.result()
        elif gone.done():
            raise ClientGoneError
        else:
            message = f"the request took more than {seconds:g} s and was stopped"
            raise ApiError(504, message, code="timeout")
    finally:
        for task in (work, gone):
            task.cancel()
        # What was cancelled returns its memory before anything else is said.
        await asyncio.gather(work, gone, return_exceptions=True)


async def disconnected(receive: Receive) -> None:
    """Return once the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def read_body(scope: Scope, receive: Receive, limits: Limits) -> bytes:
    """Return the body of a request.

    Raises:
        ApiError: it is too large (413) or too slow (408).
        ClientGoneError: the client has left.
    """
    length = dict(scope["headers"]).get(b"content-length", b"0")
    if not length.isdigit():
        raise ApiError(400, "the Content-Length header is not a number", code="invalid_header")
    chunks, size = [], int(length[:20])
    try:
        async with asyncio.timeout(limits.body_seconds):
            received, more = 0, True
            while more or size > limits.body_bytes:
                if size > limits.body_bytes:
                    raise ApiError(
                        413,
                        f"a body of more than {limits.body_bytes / 2**20:g} MiB; send fewer or "
                        "smaller images",
                        code="body_too_large",
                        closes=True,
                    )
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                chunks.append(message.get("body", b""))
                received += len(chunks[-1])
                more = message.get("more_body", False)
                size = max(size, received)
    except TimeoutError:
        slow = f"the body took more than {limits.body_seconds:g} s to arrive"
        raise ApiError(408, slow, code="slow_body", closes=True) from None
    return b"".join(chunks)


def parser(model: type[BaseModel], body: bytes) -> Callable[[], BaseModel]:
    """Return a function that makes a request model of a JSON body.

    Raises (when called):
        ApiError: the body is not JSON, or not what the model describes (400).
    """

    def parse() -> BaseModel:
        try:
            # Refuses NaN, lone surrogates and deep nesting.
            value = from_json(body, allow_inf_nan=False, cache_strings="none")
        except ValueError as error:
            raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
        if not isinstance(value, dict):
            kind = type(value).__name__
            raise ApiError(400, f"the body is a JSON {kind}, not an object", code="invalid_json")
        if count_keys(value) > MAX_KEYS:
            message = f"the body holds more than {MAX_KEYS} keys and lists"
            raise ApiError(400, message, code="invalid_value")
        try:
            return model.model_validate(value)
        except ValidationError as error:
            raise as_api_error(error) from None

    return parse


def count_keys(value: Any) -> int:
    """Return how many keys and lists a JSON value holds; stops counting above MAX_KEYS."""
    count, left = 0, [value]
    while left and count <= MAX_KEYS:
        one = left.pop()
        inside = one.values() if isinstance(one, dict) else one
        count += len(one) if isinstance(one, dict) else 1
        left += [each for each in inside if isinstance(each, dict | list)]
    return count


async def send_stream(send: Send, stream: Stream) -> None:
    """Send a response piece by piece."""
    headers = [
        (b"content-type", stream.media_type.encode()),
        (b"cache-control", b"no-store"),
        (b"x-accel-buffering", b"no"),
    ]
    events: Any = stream.events
    async with stream.stack, aclosing(events):
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for text in events:
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
    await send({"type": "http.response.body", "body": b""})
