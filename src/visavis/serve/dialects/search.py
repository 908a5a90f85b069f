"""Search, management of indexes, health and metrics: the server's own API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import parse_qs

from pydantic import BaseModel
from starlette.responses import Response

from visavis.errors import InputError
from visavis.index import Filter, Hit, Index
from visavis.index.filters import local_date
from visavis.inputs import Image
from visavis.serve.http import Call, Endpoint
from visavis.serve.indexes import Indexes, add, described, described_hit, item_of
from visavis.serve.media import Piece
from visavis.serve.metrics import TEXT
from visavis.serve.schemas import search as schemas
from visavis.serve.schemas.base import OpenAIError

Result = TypeVar("Result")
IMAGE_HEADERS = {"cache-control": "private, max-age=86400, immutable"}


async def with_index(call: Call, name: str | None, work: Callable[[Index], Result]) -> Result:
    """Run a function with an index, beside the event loop."""
    service = call.service
    service.check_open()
    service.indexes.resolve(name)
    async with service.pool.using(None) as served:
        return await service.prepare_index(lambda: work(service.indexes.open(name, served)))


async def search(call: Call) -> BaseModel:
    """Find the items of an index that are nearest to words, an image, both, or another item."""
    body: schemas.SearchRequest = call.body
    name = call.service.indexes.resolve(body.index)

    def find(index: Index) -> list[schemas.Hit]:
        reader = call.service.reader()
        image: Any = reader.image(Piece("image", body.image)) if body.image is not None else None
        hits = found(call.service.indexes, index, body, image)
        return [schemas.Hit(**described_hit(hit, _items(name))) for hit in hits]

    return schemas.SearchResponse(index=name, hits=await with_index(call, name, find))


def found(
    indexes: Indexes, index: Index, body: schemas.SearchRequest, image: Image | None
) -> list[Hit]:
    """Return the hits of a request; `image` is the one that came with it."""
    conditions = as_filter(body.filter)
    has_words = body.text is not None and bool(body.text.strip())
    if body.like is not None and not has_words and not body.negative:  # its vector is known
        item_of(index, body.like)
        return index.similar(body.like, body.k, conditions, offset=body.offset, with_itself=True)
    return indexes.search(
        index,
        indexes.query(index, body.text or "", image, body.like),
        body.k,
        filter=conditions,
        mode=body.mode,
        negative=body.negative,
        offset=body.offset,
    )


def as_filter(given: str | schemas.FilterFields | None) -> Filter | None:
    """Return the conditions of a request.

    Raises:
        InputError: one of them cannot be used.
    """
    if not isinstance(given, schemas.FilterFields):
        return Filter.of(given)
    return Filter(
        kinds=tuple(given.kinds),
        folder=given.folder,
        glob=given.glob,
        after=None if given.after is None else local_date("after", given.after),
        before=None if given.before is None else local_date("before", given.before),
        metadata=tuple(given.metadata.items()),
    )


async def indexes(call: Call) -> BaseModel:
    """List the indexes of this server."""
    cards = [
        await with_index(
            call,
            name,
            lambda index, name=name: schemas.IndexCard(  # type: ignore[misc]
                name=name, items=len(index), model=index.model.name
            ),
        )
        for name in call.service.indexes.paths
    ]
    return schemas.IndexList(data=cards)


async def items(call: Call) -> BaseModel:
    """List the items of an index that were added first."""
    name = call.service.indexes.resolve(call.path["index"])
    limit = _number(call, "limit", 100)
    if not 1 <= limit <= schemas.MAX_HITS:
        raise InputError(f"limit is {limit}, expected 1 to {schemas.MAX_HITS}")
    found = await with_index(call, name, lambda index: index.items(limit))
    return schemas.ItemList(data=[schemas.Item(**described(one, _items(name))) for one in found])


async def add_items(call: Call) -> BaseModel:
    """Add texts and images to an index; files of the server cannot be named."""
    body: schemas.AddRequest = call.body

    def work(index: Index) -> schemas.AddResponse:
        reader, new, failed = call.service.reader(), [], []
        for item in body.items:
            one: dict[str, Any] = {"source": item.source}
            try:
                if item.image is not None:
                    one["image"] = reader.image(Piece("image", item.image))
                if item.text is not None:
                    one["text"] = item.text
                new.append(one)
            except InputError as error:
                failed.append((item.source, str(error)))
        report = add(index, new) if new else None
        failed += report.failed if report else []
        return schemas.AddResponse(
            added=report.added if report else 0,
            changed=report.changed if report else 0,
            unchanged=report.unchanged if report else 0,
            failed=[schemas.Failure(source=name, reason=reason) for name, reason in failed],
        )

    return await with_index(call, call.path["index"], work)


async def prune(call: Call) -> BaseModel:
    """Forget the files of an index that no longer exist."""
    name = call.path["index"]
    removed = await with_index(call, name, lambda index: index.prune() if len(index) else [])
    return schemas.PruneResponse(removed=removed)


async def image(call: Call) -> Response:
    """Return a JPEG of an item, `size` pixels on its longer side (320)."""
    size = _number(call, "size", 320)
    number = call.path["item"]
    encoded = await with_index(
        call,
        call.path.get("index"),
        lambda index: call.service.indexes.image(index, number, size),
    )
    # Addresses hold the content's hash, so what is behind one never changes.
    return Response(encoded, media_type="image/jpeg", headers=IMAGE_HEADERS)


def _number(call: Call, name: str, default: int) -> int:
    values = parse_qs(call.query, max_num_fields=16).get(name)
    if values is None:
        return default
    if not values[-1].isascii() or not values[-1].isdigit() or len(values[-1]) > 9:
        raise InputError(f"{name} is not a number")
    return int(values[-1])


def _items(index: str) -> str:
    return f"/v1/indexes/{index}/items"


async def healthy(call: Call) -> BaseModel:
    """Tell that the process answers."""
    return _health(call, "ok")


async def ready(call: Call) -> BaseModel:
    """Tell that requests are taken; status 503 while the server is stopping."""
    call.service.check_open()
    return _health(call, "ready")


def _health(call: Call, status: str) -> schemas.Health:
    entries = call.service.pool.entries.items()
    models = {name: "loaded" if one.served else "not loaded" for name, one in entries}
    return schemas.Health(status=status, models=models)


async def metrics(call: Call) -> Response:
    """Return counters and gauges in Prometheus' text form."""
    return Response(call.service.metrics.text(), media_type=TEXT)


def _endpoint(method: str, path: str, handler: Any, response: Any, request: Any = None) -> Endpoint:
    return Endpoint(method, path, handler, response, OpenAIError, request, tag="Search and health")


ENDPOINTS = [
    _endpoint("POST", "/v1/search", search, schemas.SearchResponse, schemas.SearchRequest),
    _endpoint("GET", "/v1/indexes", indexes, schemas.IndexList),
    _endpoint("GET", "/v1/indexes/{index}/items", items, schemas.ItemList),
    _endpoint(
        "POST", "/v1/indexes/{index}/items", add_items, schemas.AddResponse, schemas.AddRequest
    ),
    _endpoint("POST", "/v1/indexes/{index}/prune", prune, schemas.PruneResponse),
    _endpoint("GET", "/v1/indexes/{index}/items/{item:int}/image", image, bytes),
    _endpoint("GET", "/healthz", healthy, schemas.Health),
    _endpoint("GET", "/readyz", ready, schemas.Health),
    _endpoint("GET", "/metrics", metrics, str),
]
