"""The web application behind the page: search, pictures by number, chat. Knows no HTML.

    GET  /                            the page
    GET  /api/info                    what is served, and the pictures to show first
    POST /api/search                  form: text, image (a file), like (an item's number), k
    GET  /api/items/{id}/picture      a JPEG of an indexed item; `size` pixels a side
    POST /api/chat                    form: messages (JSON), image or like; server-sent events

Files are handed out by their number in the index, never by path. All work of the model happens in
one thread, where answers to several people grow together.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from visavis.errors import ImageError, InputError, VisavisError
from visavis.generate.scheduler import BatchScheduler
from visavis.generate.streaming import Reply
from visavis.index.items import preview, title, visual_of
from visavis.index.store import StoredItem
from visavis.inputs import Image, Prompt, Text, Visual
from visavis.inputs import Message as Turn
from visavis.utils import jpeg_preview

if TYPE_CHECKING:
    from visavis.api import Model
    from visavis.index import Index

WEB_FOLDER = Path(__file__).parent / "web"
MAX_BODY_BYTES = 32 * 2**20  # a photo from any camera; its pixels are bounded by decode_image
MAX_HITS = 100
MAX_NEW_TOKENS = 256
PICTURE_SIZES = range(64, 2049)  # pixels, longer side
NUM_KEPT_PICTURES = 512  # encoded thumbnails, some 20 kB each
HEADERS = (
    (b"content-security-policy", b"default-src 'self'; img-src 'self' blob: data:"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)

Result = TypeVar("Result")
log = logging.getLogger(__name__)


def create_app(model: Model, index: Index, *, examples: Sequence[str] = ()) -> Starlette:
    """Return the application; `examples` are searches that the page proposes."""
    site = Site(model, index, examples)
    routes = [
        Route("/", site.page),
        Route("/api/info", site.info),
        Route("/api/search", site.search, methods=["POST"]),
        Route("/api/items/{item_id:int}/picture", site.picture),
        Route("/api/chat", site.chat, methods=["POST"]),
        Mount("/static", StaticFiles(directory=WEB_FOLDER)),
    ]
    # Only pages of this very server may talk to it: another site that the same browser has open
    # could otherwise ask about the user's pictures (by its own name for 127.0.0.1, or directly).
    middleware = [
        Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"]),
        Middleware(Guard),
    ]
    handlers: dict[Any, Any] = {VisavisError: _user_error, HTTPException: _http_error}
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


class Site:
    """The endpoints, and the desk at which the model works."""

    def __init__(self, model: Model, index: Index, examples: Sequence[str]) -> None:
        self.model = model
        self.index = index
        self.examples = list(examples)
        self.desk = BatchScheduler(model.ask, model.engine())
        self._encoded = lru_cache(maxsize=NUM_KEPT_PICTURES)(_encode_picture)

    async def page(self, request: Request) -> Response:
        return FileResponse(WEB_FOLDER / "index.html")

    async def info(self, request: Request) -> Response:
        items = await run_in_threadpool(self.index.items, MAX_HITS)
        return JSONResponse(
            {
                "model": self.model.name,
                "takes_images": self.model.takes_images,
                "num_items": await run_in_threadpool(len, self.index),
                "items": [_describe(item) for item in items],
                "examples": self.examples,
            }
        )

    async def search(self, request: Request) -> Response:
        async with request.form(max_files=1, max_fields=8) as form:
            text = _field(form, "text").strip()
            visual = await self._visual(form)
            k = _number(form, "k", default=24)
        if not text and visual is None:
            raise InputError("nothing to look for: type some words or add a picture")
        parts = (*([visual] if visual else []), *([Text(text)] if text else []))
        query = Prompt((Turn("user", parts),))
        hits = await self._in_worker(lambda: self.index.search(query, k=min(k, MAX_HITS)))
        found = [{**_describe(hit.item), "score": round(hit.score, 4)} for hit in hits]
        return JSONResponse({"hits": found})

    async def picture(self, request: Request) -> Response:
        try:
            size = int(request.query_params.get("size", "320"))
        except ValueError:
            raise InputError("size is not a number") from None
        if size not in PICTURE_SIZES:
            raise InputError(
                f"size is {size}, expected {PICTURE_SIZES.start} to {PICTURE_SIZES.stop - 1} pixels"
            )
        item = await run_in_threadpool(self._item, request.path_params["item_id"])
        encoded = await run_in_threadpool(self._encoded, item, size)
        # The page's addresses hold the content hash, so a picture never changes under its address.
        cached = {"cache-control": "private, max-age=86400, immutable"}
        return Response(encoded, media_type="image/jpeg", headers=cached)

    async def chat(self, request: Request) -> Response:
        async with request.form(max_files=1, max_fields=8) as form:
            messages = _turns(_field(form, "messages"))
            visual = await self._visual(form)
        if visual is not None:  # the whole conversation is about it: it opens the first turn
            first = messages[0]
            messages[0] = Turn(first.role, (visual, *first.parts))
        return StreamingResponse(
            self._answer(messages),
            media_type="text/event-stream",
            headers={"cache-control": "no-store"},
        )

    async def _answer(self, messages: list[Turn]) -> AsyncIterator[str]:
        """Yield server-sent events: pieces of text, then `done` or `error`."""
        events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def send(event: dict[str, Any] | None) -> None:
            with suppress(RuntimeError):  # the server is being closed: nobody listens any more
                loop.call_soon_threadsafe(events.put_nowait, event)

        def ended(future: Future[Reply]) -> None:
            error = None if future.cancelled() else future.exception()
            if isinstance(error, VisavisError):
                send({"error": str(error)})
            elif error is not None:
                send({"error": f"the model failed ({type(error).__name__}); see the terminal"})
                log.error("an answer failed", exc_info=error)
            elif not future.cancelled():
                reply = future.result()
                seconds = reply.timings.prefill_s + reply.timings.decode_s
                tokens = reply.usage.completion_tokens
                done = {"done": reply.finish_reason, "tokens": tokens, "seconds": round(seconds, 2)}
                send(done)
            send(None)

        answer = self.desk.answer(
            Prompt(tuple(messages)),
            lambda piece: send({"piece": piece}),
            max_new_tokens=MAX_NEW_TOKENS,
        )
        answer.add_done_callback(ended)
        try:
            while (event := await events.get()) is not None:
                yield f"data: {json.dumps(event, ensure_ascii=False)}\n\n"
        finally:
            answer.cancel()

    async def _in_worker(self, work: Callable[[], Result]) -> Result:
        return await asyncio.wrap_future(self.desk.work(work))

    async def _visual(self, form: FormData) -> Visual | None:
        """Return the uploaded picture, or what an indexed item shows."""
        upload = form.get("image")
        if isinstance(upload, UploadFile):
            return Image(await upload.read())
        if not _field(form, "like"):
            return None
        item = await run_in_threadpool(self._item, _number(form, "like"))
        visual = visual_of(item)
        if visual is None:
            raise InputError(f"item {item.id} has no picture")
        return visual

    def _item(self, item_id: int) -> StoredItem:
        item = self.index.item(item_id) if item_id < 2**63 else None
        if item is None:
            raise HTTPException(404, f"the index has no item {item_id}")
        return item


class Guard:
    """Bounds what is uploaded, refuses requests of other sites, adds security headers."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        num_received = 0

        async def bounded_receive() -> Message:
            nonlocal num_received
            message = await receive()
            num_received += len(message.get("body", b""))
            if num_received > MAX_BODY_BYTES:
                raise HTTPException(413, _TOO_LARGE)
            return message

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        headers = Headers(scope=scope)
        origin = headers.get("origin")
        refusal: tuple[int, str] | None = None
        if origin is not None and origin.partition("://")[2] != headers.get("host"):
            refusal = 403, f"requests from {origin} are refused; open the page itself"
        elif int(headers.get("content-length", "0")) > MAX_BODY_BYTES:
            refusal = 413, _TOO_LARGE
        if refusal is not None:
            response = JSONResponse({"error": refusal[1]}, status_code=refusal[0])
            await response(scope, receive, send_with_headers)
            return
        await self.app(scope, bounded_receive, send_with_headers)


_TOO_LARGE = f"more than {MAX_BODY_BYTES // 2**20} MiB; make the picture smaller first"


def _encode_picture(item: StoredItem, size: int) -> bytes:
    picture = preview(item, size)
    if isinstance(picture, str):
        raise HTTPException(404, f"item {item.id} has no picture")
    return jpeg_preview(picture, size)


def _describe(item: StoredItem) -> dict[str, Any]:
    has_picture = item.is_file or item.preview is not None
    return {
        "id": item.id,
        "name": title(item),
        "source": item.source,
        "text": item.text,
        "picture": f"/api/items/{item.id}/picture?v={item.content[:8]}" if has_picture else None,
    }


def _turns(text: str) -> list[Turn]:
    """Return the conversation; the last turn is the user's question."""
    try:
        given = json.loads(text)
        turns = [Turn(turn["role"], (Text(turn["text"]),)) for turn in given]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"messages are not a list of role and text: {error}") from None
    if not turns or turns[0].role != "user" or turns[-1].role != "user":
        raise InputError("messages must begin and end with one of the user")
    return turns


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
        return int(value)
    except ValueError:
        raise InputError(f"{name} is {value[:40]!r}, expected a number") from None


async def _user_error(request: Request, error: Exception) -> Response:
    status = 415 if isinstance(error, ImageError) else 400
    return JSONResponse({"error": str(error)}, status_code=status)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, status_code=error.status_code)
