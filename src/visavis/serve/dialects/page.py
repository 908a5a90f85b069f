"""The API of the web page: its search, its items, where a hit matches, and folders to add.

Bodies are HTML forms, which carry files. The conversation is in page_chat.py.
"""

from __future__ import annotations

import threading
from collections import Counter
from datetime import datetime
from pathlib import Path, PurePath
from typing import Any

from pydantic import BaseModel
from starlette.datastructures import FormData
from starlette.responses import FileResponse, HTMLResponse, Response

from visavis.errors import InputError
from visavis.index import Hit, Index
from visavis.index.filters import KINDS
from visavis.index.items import preview
from visavis.index.relevance import SIZE, relevance
from visavis.index.store import StoredItem
from visavis.index.words import file_words
from visavis.processing.images import decode_image
from visavis.serve.dialects.forms import filter_of, number, parameters, texts, uploaded
from visavis.serve.dialects.page_chat import chat
from visavis.serve.dialects.search import image, with_index
from visavis.serve.errors import ApiError
from visavis.serve.http import Call, Endpoint
from visavis.serve.indexes import described, item_of
from visavis.serve.media import Piece
from visavis.serve.schemas.base import TextError

WEB_FOLDER = Path(__file__).parents[1] / "web"
MAX_HITS = 200  # of one request; the page asks for more as it is scrolled
MAX_FOLDERS = 500  # that are proposed
FOUND_TEXT = 4000  # characters of the text in an item that the page shows
ITEMS = "/page/items"
# A browser shows these without running what is in them.
MEDIA_TYPES = {
    ".pdf": "application/pdf",
    ".mp4": "video/mp4",
    ".m4v": "video/mp4",
    ".mov": "video/quicktime",
    ".webm": "video/webm",
    ".mkv": "video/x-matroska",
    ".ogv": "video/ogg",
    ".avi": "video/x-msvideo",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".png": "image/png",
    ".gif": "image/gif",
    ".webp": "image/webp",
    ".avif": "image/avif",
    ".bmp": "image/bmp",
}


async def page(call: Call) -> Response:
    """Return the web page."""
    return HTMLResponse((WEB_FOLDER / "index.html").read_bytes())


async def info(call: Call) -> Any:
    """Describe what is served."""
    service = call.service
    async with service.pool.using(None) as served:
        return {
            "model": served.model.name,
            "chat": served.model.encoder.can_chat,
            "where": served.model.takes_images,
            "examples": list(service.examples),
            "folders": [folder.name or str(folder) for folder in service.adding.folders],
        }


async def items(call: Call) -> Any:
    """List the items of the index that meet the filters, those added first first."""
    given = parameters(call.query)
    wanted, offset = filter_of(given), number(given, "offset", 0)
    limit = min(number(given, "limit", 100), MAX_HITS)

    def work(index: Index) -> dict[str, Any]:
        found = index.items(limit, offset, wanted)
        return {"total": index.count(wanted), "items": [_shown(one) for one in found]}

    return await with_index(call, None, work)


async def facets(call: Call) -> Any:
    """Count the items of each kind and folder."""

    def work(index: Index) -> dict[str, Any]:
        counts = index.store.folders() if index.store.exists() else {}
        kinds, folders = dict.fromkeys(KINDS, 0), Counter[str]()
        for (kind, folder), count in counts.items():
            kinds[kind] += count
            folders[folder] += count
        del folders[""]  # of items that are no files
        shown = sorted(folders.most_common(MAX_FOLDERS))
        return {
            "kinds": kinds,
            "folders": [{"folder": folder, "count": count} for folder, count in shown],
        }

    return await with_index(call, None, work)


async def search(call: Call) -> Any:
    """Find items by words, an uploaded image, both, or another item."""
    form: FormData = call.body
    given = texts(form)
    text, shown = given.get("text", "").strip(), await uploaded(form, "image")
    like = number(given, "like") if shown is None and "like" in given else None
    if not text and shown is None and like is None:
        raise InputError("nothing to look for: type some words or add an image")
    wanted, negative = filter_of(given), given.get("negative", "").strip() or None
    k, offset = min(number(given, "k", 24), MAX_HITS), number(given, "offset", 0)

    def find(index: Index) -> dict[str, Any]:
        found = call.service.reader().image(Piece("image", shown)) if shown is not None else None
        total, hits = index.count(wanted), []
        if total and like is not None and not (text or negative):
            item_of(index, like)
            hits = index.similar(like, k, wanted, offset=offset)
        elif total:
            query = call.service.indexes.query(index, text, found, like)
            hits = index.search(query, k, wanted, negative=negative, offset=offset)
        if len(hits) < k:  # an item is not like itself; others were removed meanwhile
            total = min(total, offset + len(hits))
        only_words = shown is None and like is None and not negative
        least = index.model.profile.min_score
        nothing = only_words and bool(hits) and not hits[0].words and hits[0].score < least
        return {
            "total": total,
            "hits": [_found(hit) for hit in hits],
            "nothing_similar": nothing and not offset,
        }

    return await with_index(call, None, find)


def _found(hit: Hit) -> dict[str, Any]:
    assert hit.vector_score is not None
    return {**_shown(hit.item), "score": round(hit.vector_score, 4), "words": hit.words}


async def where(call: Call) -> Any:
    """Find the parts of an item or an uploaded image that match words, an image or both."""
    form: FormData = call.body
    given = texts(form)
    text, shown = given.get("text", "").strip(), await uploaded(form, "image")
    asked = await uploaded(form, "query")
    if not text and asked is None:
        raise InputError("nothing to look for: type some words or add an image")
    item = number(given, "like") if shown is None else None
    gone = threading.Event()

    def work(index: Index) -> dict[str, Any] | None:
        reader = call.service.reader()
        if item is not None:
            seen = preview(item_of(index, item), SIZE)
            if isinstance(seen, str):
                raise InputError(f"item {item} has no image")
        else:
            assert shown is not None
            seen = decode_image(reader.image(Piece("image", shown)))
        image = reader.image(Piece("image", asked)) if asked is not None else None
        query = call.service.indexes.query(index, text, image, None)
        found = relevance(index.model, seen, query, wanted=lambda: not gone.is_set())
        if found is None:
            return None
        rows, columns = found.cells.shape
        cells = [[round(cell, 4) for cell in row] for row in found.cells.tolist()]
        return {"rows": rows, "columns": columns, "relevance": cells, "score": found.score}

    try:
        return await with_index(call, None, work)
    finally:
        gone.set()


async def file(call: Call) -> Response:
    """Return the file of an item, for players and viewers of documents."""
    wanted = call.path["item"]
    item = await with_index(call, None, lambda index: item_of(index, wanted))
    media_type = media_type_of(item.path)
    if not media_type or not Path(item.path).is_file():
        raise ApiError(404, f"item {wanted} has no file that can be opened here", code="no_file")
    # No name: the browser shows it and does not store it under one.
    headers = {"cache-control": "private, no-cache", "content-disposition": "inline"}
    return FileResponse(item.path, media_type=media_type, headers=headers)


async def folders(call: Call) -> Any:
    """List the folders in an allowed folder."""
    given = parameters(call.query)
    folder, inside = number(given, "folder", 0), given.get("path", "")
    adding = call.service.adding
    return {"folders": await call.service.prepare(lambda: adding.inside(folder, inside))}


async def add(call: Call) -> Any:
    """Begin to add an allowed folder to the index."""
    call.service.check_open()
    call.service.indexes.resolve(None)
    given = texts(call.body)
    call.service.adding.start(call.service, number(given, "folder", 0), given.get("path", ""))
    return call.service.adding.progress.as_json()


async def adding(call: Call) -> Any:
    """Tell how far the addition of a folder is."""
    return call.service.adding.progress.as_json()


async def stop_adding(call: Call) -> Any:
    """End the addition of a folder after the files in hand."""
    call.service.adding.stop()
    return call.service.adding.progress.as_json()


def media_type_of(path: str) -> str:
    """Return the media type of a file that browsers show; empty for any other."""
    return MEDIA_TYPES.get(PurePath(path).suffix.lower(), "")


def _shown(item: StoredItem) -> dict[str, Any]:
    """Return the fields of an item that the page shows."""
    # The words of the file's name stand above already.
    found_text = item.found_text.removeprefix(file_words(item.path)).strip()
    has_file = item.kind in ("page", "video", "image") and media_type_of(item.path)
    date = None if item.date is None else datetime.fromtimestamp(item.date).isoformat()
    return {
        **described(item, ITEMS),
        "kind": item.kind,
        "page": item.page,
        "begin_s": item.begin_s,
        "end_s": item.end_s,
        "date": date,
        "place": item.place,
        "found_text": found_text[:FOUND_TEXT],
        "file": f"{ITEMS}/{item.id}/file" if has_file else None,
    }


def _endpoint(method: str, path: str, handler: Any, *, form: bool = False) -> Endpoint:
    return Endpoint(method, path, handler, BaseModel, TextError, form=form)


ENDPOINTS = [  # of the page alone: not in the API's description
    _endpoint("GET", "/", page),
    _endpoint("GET", "/page/info", info),
    _endpoint("GET", "/page/facets", facets),
    _endpoint("GET", ITEMS, items),
    _endpoint("GET", f"{ITEMS}/{{item:int}}/image", image),
    _endpoint("GET", f"{ITEMS}/{{item:int}}/file", file),
    _endpoint("POST", "/page/search", search, form=True),
    _endpoint("POST", "/page/where", where, form=True),
    _endpoint("POST", "/page/chat", chat, form=True),
    _endpoint("GET", "/page/folders", folders),
    _endpoint("POST", "/page/adding", add, form=True),
    _endpoint("GET", "/page/adding", adding),
    _endpoint("POST", "/page/adding/stop", stop_adding),
]
