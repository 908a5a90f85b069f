"""A Model Context Protocol server over one index: assistants search it, look at what they found and
add folders. The SDK speaks the stateless revision of 2026-07-28 and the handshake of older clients.

Tools return structured content for programs, and thumbnails and resource links for models. Files
are read only inside the folders that the server was started with.
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import anyio.to_thread
from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import (
    CallToolResult,
    ContentBlock,
    ImageContent,
    ResourceLink,
    TextContent,
    ToolAnnotations,
)

import visavis
from visavis.api import Model
from visavis.errors import InputError, VisavisError
from visavis.index import Hit, Index
from visavis.index.items import visual_of
from visavis.index.store import StoredItem
from visavis.inputs import Image
from visavis.serve.config import Limits
from visavis.serve.errors import ApiError
from visavis.serve.fetch import Fetcher
from visavis.serve.indexes import encoded_image, item_of
from visavis.serve.media import Piece, Reader

INSTRUCTIONS = (
    "Searches the user's images, videos and PDF pages by meaning. Describe what should be seen in "
    "plain words. Items have numbers: pass one to `similar` or `describe_image`, or read the "
    "resource visavis://item/NUMBER to see it larger."
)
MAX_HITS = 50
MAX_THUMBNAILS = 8
MAX_FAILURES = 20
THUMBNAIL_SIZE = 256  # pixels, longer side
RESOURCE_SIZE = 1024
_READS = ToolAnnotations(read_only_hint=True, open_world_hint=False)
_ADDS = ToolAnnotations(read_only_hint=False, destructive_hint=False, idempotent_hint=True)


class Library:
    """The model and the index behind the tools; used by one thread at a time.

    Args:
        load: returns the model; called at first use, so that the server starts at once.
        folders: files and folders outside of these are refused.
    """

    def __init__(self, load: Callable[[], Model], path: Path, folders: Sequence[Path]) -> None:
        self.load, self.path = load, path
        self.folders = [folder.expanduser().resolve() for folder in folders]
        self.lock = threading.Lock()
        self._opened: tuple[Model, Index] | None = None

    def opened(self) -> tuple[Model, Index]:
        """Return the model and the index, loading them at first."""
        if self._opened is None:
            model = self.load()
            self._opened = model, Index(self.path, model)
        return self._opened

    def inside(self, path: str) -> Path:
        """Return a path that lies in one of the folders.

        Raises:
            InputError: it lies elsewhere, or does not exist.
        """
        found = Path(path).expanduser().resolve()
        if not any(found.is_relative_to(folder) for folder in self.folders):
            shown = ", ".join(map(str, self.folders)) or "none"
            raise InputError(
                f"{path} is outside of the folders that this server may read ({shown}); start it "
                "with --folder to allow another one"
            )
        if not found.exists():
            raise InputError(f"there is no {path}")
        return found

    def image(self, item: int | None, image: str | None, path: str | None) -> Any:
        """Return the image to look at: that of an item, one that was sent, or a file."""
        if sum(one is not None for one in (item, image, path)) != 1:
            raise InputError("give exactly one of item, image (a data URI or base64) and path")
        if path is not None:
            return Image(self.inside(path))
        if image is not None:
            fetcher = Fetcher((), max_bytes=Limits().body_bytes)
            return Reader(Limits(), fetcher).image(Piece("image", image))
        assert item is not None
        visual = visual_of(item_of(self.opened()[1], item))
        if visual is None:
            raise InputError(f"item {item} is a text and has no image")
        return visual

    def hits(self, query: Any, limit: int, filter: str | None = None) -> CallToolResult:
        """Return the nearest items as structured content, links and thumbnails."""
        if not 1 <= limit <= MAX_HITS:
            raise InputError(f"limit is {limit}, expected 1 to {MAX_HITS}")
        index = self.opened()[1]
        found = index.search(query, limit, filter) if len(index) else []
        shown = [_described(hit) for hit in found]
        content: list[ContentBlock] = [TextContent(text=_listed(shown))]
        content += [_link(hit.item) for hit in found]
        for hit in found[:MAX_THUMBNAILS]:
            thumbnail = self.thumbnail(hit.item)
            content += [thumbnail] if thumbnail else []
        return CallToolResult(content=content, structured_content={"hits": shown})

    def thumbnail(self, item: StoredItem) -> ImageContent | None:
        """Return a small image of an item; None of a text, or of a file that is gone."""
        try:
            data = encoded_image(item, THUMBNAIL_SIZE)
        except (VisavisError, ApiError):
            return None
        return ImageContent(data=base64.b64encode(data).decode(), mime_type="image/jpeg")


def make_server(library: Library) -> MCPServer:  # each tool is short
    """Return the server with its tools and resources."""
    server = MCPServer("visavis", version=visavis.__version__, instructions=INSTRUCTIONS)

    async def run(work: Callable[[], Any]) -> Any:
        """Do work beside the event loop, alone; a user's mistake is an error of the tool."""

        def alone() -> Any:
            with library.lock:
                try:
                    return work()
                except ApiError as error:
                    raise ToolError(error.message) from None
                except VisavisError as error:
                    raise ToolError(str(error)) from None

        return await anyio.to_thread.run_sync(alone)

    @server.tool(annotations=_READS)
    async def search(query: str, limit: int = 10, filter: str | None = None) -> CallToolResult:
        """Find images, videos, PDF pages and texts by a description in words.

        Args:
            query: what should be seen or said, in plain words.
            limit: maximum number of items, up to 50.
            filter: conditions such as "kind:page folder:/papers after:2024-01 before:2025
                tag=beach", or one glob on sources such as "*/holiday/*".
        """
        result: CallToolResult = await run(partial(library.hits, query, limit, filter))
        return result

    @server.tool(annotations=_READS)
    async def similar(
        item: int | None = None,
        image: str | None = None,
        path: str | None = None,
        limit: int = 10,
    ) -> CallToolResult:
        """Find items that look like an item, an image or a file.

        Args:
            item: number of an item that was found before.
            image: an image as a data URI or base64.
            path: a file inside the folders that this server may read.
            limit: maximum number of items, up to 50.
        """

        def work() -> CallToolResult:
            return library.hits(library.image(item, image, path), limit)

        result: CallToolResult = await run(work)
        return result

    @server.tool(annotations=_READS)
    async def describe_image(
        question: str = "Describe this image.",
        item: int | None = None,
        image: str | None = None,
        path: str | None = None,
        max_new_tokens: int = 256,
    ) -> CallToolResult:
        """Answer a question about an image, with the vision-language model of this server.

        Args:
            question: what to answer.
            item: number of an item that was found before.
            image: an image as a data URI or base64.
            path: a file inside the folders that this server may read.
            max_new_tokens: the answer's length at most.
        """

        def work() -> CallToolResult:
            shown = library.image(item, image, path)
            if not 1 <= max_new_tokens <= Limits().new_tokens:
                raise InputError(
                    f"max_new_tokens is {max_new_tokens}, expected 1 to {Limits().new_tokens}"
                )
            model = library.opened()[0]
            reply = model.chat(question, [shown], max_new_tokens=max_new_tokens)
            text = reply.text.strip()
            found = {"answer": text, "finish_reason": reply.finish_reason}
            return CallToolResult(content=[TextContent(text=text)], structured_content=found)

        result: CallToolResult = await run(work)
        return result

    @server.tool(annotations=_ADDS)
    async def add_folder(path: str) -> CallToolResult:
        """Add the images, videos and PDFs of a folder to the index; known ones are skipped.

        Args:
            path: a folder or file inside the folders that this server may read.
        """

        def work() -> CallToolResult:
            report = library.opened()[1].add(library.inside(path))
            failed = [{"source": name, "reason": reason} for name, reason in report.failed]
            found = {
                "added": report.added,
                "changed": report.changed,
                "unchanged": report.unchanged,
                "failed": failed[:MAX_FAILURES],
                "num_failed": len(failed),
            }
            text = (
                f"{report.added} added, {report.changed} changed, {report.unchanged} known "
                f"already, {len(failed)} could not be read."
            )
            return CallToolResult(content=[TextContent(text=text)], structured_content=found)

        result: CallToolResult = await run(work)
        return result

    @server.resource("visavis://item/{item}", name="item", mime_type="image/jpeg")
    async def item_image(item: str) -> bytes:
        """An item of the index as a JPEG."""

        def work() -> bytes:
            if not item.isascii() or not item.isdigit():
                raise InputError(f"{item[:40]!r} is not the number of an item")
            return encoded_image(item_of(library.opened()[1], int(item[:19])), RESOURCE_SIZE)

        data: bytes = await run(work)
        return data

    return server


def _described(hit: Hit) -> dict[str, Any]:
    item = hit.item
    return {
        "item": item.id,
        "score": round(hit.score, 4),
        "source": item.source,
        "kind": item.kind,
        "page": item.page,
        "begin_s": item.begin_s,
        "end_s": item.end_s,
        "text": item.text,
        "why": hit.why,
        "uri": _uri(item),
    }


def _listed(shown: Sequence[dict[str, Any]]) -> str:
    if not shown:
        return "Nothing found: the index is empty or no source matches the filter."
    lines = (f"{one['item']}: {one['source']} (score {one['score']})" for one in shown)
    return "Nearest first:\n" + "\n".join(lines)


def _uri(item: StoredItem) -> str:
    return f"visavis://item/{item.id}"


def _link(item: StoredItem) -> ResourceLink:
    has_image = item.is_file or item.preview is not None
    kind = "image/jpeg" if has_image else "text/plain"
    return ResourceLink(uri=_uri(item), name=item.source[-200:], mime_type=kind)
