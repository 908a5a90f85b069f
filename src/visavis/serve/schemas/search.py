"""Searching and managing the indexes of the server."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from visavis.serve.schemas.base import Request, Response

Name = Annotated[str | None, Field(max_length=256, description="Of an index; the first one.")]
MAX_HITS = 1000
MAX_ADDED = 1000


class SearchRequest(Request):
    """Body of `POST /v1/search`: words, an image, both, or an item that the index has already."""

    index: Name = None
    text: str | None = None
    image: str | None = Field(None, description="A data URI, base64, or an allowed URL.")
    like: Annotated[
        int | None, Field(ge=0, le=2**63 - 1, description="Number of an item of the index.")
    ] = None
    k: Annotated[int, Field(ge=1, le=MAX_HITS)] = 10
    filter: Annotated[
        str | None, Field(max_length=1024, description="Only sources that match this glob.")
    ] = None

    @model_validator(mode="after")
    def _something(self) -> SearchRequest:
        if not (self.text and self.text.strip()) and self.image is None and self.like is None:
            raise ValueError("nothing to search for: give 'text', 'image' or 'like'")
        if self.image is not None and self.like is not None:
            raise ValueError("expected 'image' or 'like', not both")
        return self


class Item(Response):
    """An item of an index. `image` is where a preview of it can be fetched."""

    id: int
    name: str
    source: str
    text: str
    image: str | None


class Hit(Item):
    """A found item; `score` is its cosine with the query."""

    score: float


class SearchResponse(Response):
    """Response of `POST /v1/search`, nearest first."""

    index: str
    hits: list[Hit]


class NewItem(Request):
    """An item to add. A later item of the same source replaces it."""

    source: Annotated[str, Field(min_length=1, max_length=4096)]
    text: str | None = None
    image: str | None = Field(None, description="A data URI, base64, or an allowed URL.")

    @model_validator(mode="after")
    def _something(self) -> NewItem:
        if not (self.text and self.text.strip()) and self.image is None:
            raise ValueError("expected 'text', 'image' or both")
        return self


class AddRequest(Request):
    """Body of `POST /v1/indexes/{index}/items`."""

    items: Annotated[list[NewItem], Field(min_length=1, max_length=MAX_ADDED)]


class Failure(Response):
    """An item that could not be added, and why."""

    source: str
    reason: str


class AddResponse(Response):
    """The number of items added, changed and unchanged, and the failures."""

    added: int
    changed: int
    unchanged: int
    failed: list[Failure]


class IndexCard(Response):
    """An index of the server."""

    name: str
    items: int
    model: str


class IndexList(Response):
    """Response of `GET /v1/indexes`."""

    data: list[IndexCard]


class ItemList(Response):
    """Response of `GET /v1/indexes/{index}/items`: the items that were added first."""

    data: list[Item]


class PruneResponse(Response):
    """The sources of files that were gone and have been forgotten."""

    removed: list[str]


class Health(Response):
    """Whether the server answers, and which models are loaded."""

    status: str
    models: dict[str, str]
