"""Rerank requests of Jina and Cohere, and vLLM's score requests."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from visavis.serve.schemas.base import (
    MAX_DOCUMENTS,
    Ignored,
    Instruction,
    ModelName,
    Parts,
    Request,
    Response,
)


class RerankItem(Request):
    """A query or document as an object: text, an image, or both; or content parts."""

    text: str | None = None
    image: str | None = Field(None, description="A data URI, base64, or an allowed URL.")
    content: Parts | None = None

    @model_validator(mode="after")
    def _something(self) -> RerankItem:
        if (self.content is not None) == (self.text is not None or self.image is not None):
            raise ValueError("expected 'text', 'image' or both, or 'content'")
        return self


Documents = Annotated[list[str | RerankItem], Field(min_length=1, max_length=MAX_DOCUMENTS)]


class RerankRequest(Request):
    """Body of `POST /v1/rerank` and `POST /v2/rerank`."""

    model: ModelName = None
    query: str | RerankItem
    documents: Documents
    top_n: Annotated[int | None, Field(ge=1, le=2**31)] = None
    return_documents: bool | None = None
    instruction: Instruction = None
    max_tokens_per_doc: Ignored = None
    max_chunks_per_doc: Ignored = None
    rank_fields: None = None
    truncation: Ignored = None
    priority: Ignored = None
    user: Ignored = None


class RerankResult(Response):
    """A document's place in the request and its relevance, (1 + cosine) / 2."""

    index: int
    relevance_score: float
    document: dict[str, Any] | None = None


class RerankUsage(Response):
    """Tokens of the query and the documents."""

    total_tokens: int
    prompt_tokens: int


class RerankMeta(Response):
    """Version of the API."""

    api_version: dict[str, str]
    billed_units: dict[str, int]


class RerankResponse(Response):
    """Response of `POST /v1/rerank` and `POST /v2/rerank`, most relevant first."""

    id: str
    model: str
    results: list[RerankResult]
    usage: RerankUsage
    meta: RerankMeta


ScoreSide = str | RerankItem | Documents


class ScoreRequest(Request):
    """Body of `POST /v1/score`: one of `text_1` against each of `text_2`, or pair by pair."""

    model: ModelName = None
    text_1: ScoreSide | None = None
    text_2: ScoreSide | None = None
    queries: ScoreSide | None = Field(None, description="Another name of `text_1`.")
    documents: ScoreSide | None = Field(None, description="Another name of `text_2`.")
    instruction: Instruction = None
    encoding_format: Ignored = None
    user: Ignored = None
    priority: Ignored = None
    truncate_prompt_tokens: None = None

    @model_validator(mode="after")
    def _both(self) -> ScoreRequest:
        for names in (("text_1", "queries"), ("text_2", "documents")):
            if sum(getattr(self, name) is not None for name in names) != 1:
                raise ValueError(f"exactly one of {names[0]!r} and {names[1]!r} is expected")
        return self


class Score(Response):
    """The cosine of a pair."""

    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreUsage(Response):
    """Tokens of both sides."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0


class ScoreResponse(Response):
    """Response of `POST /v1/score`."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Score]
    usage: ScoreUsage
