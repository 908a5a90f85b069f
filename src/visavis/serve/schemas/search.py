"""Searching and managing the indexes of the server."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from visavis.serve.schemas.base import Request, Response

Name = Annotated[str | None, Field(max_length=256, description="Of an index; the first one.")]
MAX_HITS = 1000
MAX_ADDED = 1000
MAX_OFFSET = 100_000


Date = Annotated[
    str | None, Field(max_length=40, description="ISO 8601, local time; 2024 and 2024-05 too.")
]


class FilterFields(Request):
    """Conditions that an item has to meet, all of them."""

    kinds: Annotated[list[Literal["image", "page", "video", "text"]], Field(max_length=4)] = []
    folder: Annotated[str, Field(max_length=4096, description="Its file is below it.")] = ""
    glob: Annotated[str, Field(max_length=1024, description="Its source matches this.")] = ""
    after: Date = None
    before: Date = None
    metadata: Annotated[dict[str, str], Field(max_length=32)] = {}


class SearchRequest(Request):
    """Body of `POST /v1/search`: words, an image, both, or an item that the index has already."""

    index: Name = None
    text: str | None = None
    image: str | None = Field(None, description="A data URI, base64, or an allowed URL.")
    like: Annotated[
        int | None, Field(ge=0, le=2**63 - 1, description="Number of an item of the index.")
    ] = None
    k: Annotated[int, Field(ge=1, le=MAX_HITS)] = 10
    offset: Annotated[
        int, Field(ge=0, le=MAX_OFFSET, description="Hits to leave out, for the next page.")
    ] = 0
    filter: Annotated[
        Annotated[str, Field(max_length=1024)] | FilterFields | None,
        Field(description="Conditions on items, as fields, as text, or a glob on their sources."),
    ] = None
    mode: Annotated[
        Literal["hybrid", "vector", "text"],
        Field(description="Search by vectors, by the words of 'text', or by both."),
    ] = "hybrid"
    negative: Annotated[
        str | None, Field(max_length=1024, description="Words that hits should not be like.")
    ] = None

    @model_validator(mode="after")
    def _something(self) -> SearchRequest:
        if not (self.text and self.text.strip()) and self.image is None and self.like is None:
            raise ValueError("nothing to search for: give 'text', 'image' or 'like'")
        if self.image is not None and self.like is not None:
            raise ValueError("expected 'image' or 'like', not both")
        if self.mode == "text" and not (self.text and self.text.strip()):
            raise ValueError("the mode 'text' needs 'text'")
        return self


class Item(Response):
    """An item of an index. `image` is where a preview of it can be fetched; `page` is that of a
    document, `begin_s` and `end_s` are seconds of a video, `date` is in Unix seconds."""

    id: int
    name: str
    source: str
    kind: str
    page: int | None
    begin_s: float | None
    end_s: float | None
    date: float | None
    place: str
    text: str
    metadata: dict[str, Any]
    image: str | None


class Hit(Item):
    """A found item. `score` is what hits are sorted by, `vector_score` its cosine with the query,
    `words` are those of the query that were found in it, `why` says so in one line."""

    score: float
    vector_score: float | None
    words: list[str]
    why: str


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
