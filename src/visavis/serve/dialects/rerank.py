"""Reranking (Jina's and Cohere's shape), by the scores of a reranker or the cosine of embeddings, and
scoring (vLLM's), by the cosine.

Of a multi-vector model it is the mean of the best cosines of the query's vectors: MaxSim divided by
their number.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel

from visavis.errors import InputError
from visavis.model.maxsim import maxsim
from visavis.serve.dialects.pieces import pieces_of
from visavis.serve.http import Call, Endpoint
from visavis.serve.media import Piece
from visavis.serve.relevance import relevance
from visavis.serve.schemas import rerank as schemas
from visavis.serve.schemas.base import DetailError, MessageError, OpenAIError


async def rerank(call: Call) -> BaseModel:
    """Order documents (texts, images or both) by their relevance to a query."""
    body: schemas.RerankRequest = call.body
    inputs = [_pieces(body.query), *map(_pieces, body.documents)]
    judged = await relevance(call.service, body.model, inputs[0], inputs[1:], body.instruction)
    if judged is not None:
        return _ordered(call, judged.name, judged.scores, judged.num_tokens)
    found = await call.service.embed(
        body.model, inputs, instruction=body.instruction, num_queries=1, multi=True
    )
    documents = found.of_inputs[1:]
    similarities = _similarities([found.of_inputs[0]] * len(documents), documents)
    scores = np.array([_relevance(cosine) for cosine in similarities])
    return _ordered(call, found.name, scores, found.num_tokens)


def _ordered(call: Call, name: str, scores: np.ndarray, num_tokens: int) -> BaseModel:
    """Return the response of a model of that name: the documents by their scores [N]."""
    body: schemas.RerankRequest = call.body
    order = np.argsort(-scores, kind="stable")[: body.top_n]
    results = [
        schemas.RerankResult(
            index=int(index),
            relevance_score=float(scores[index]),
            document=_shown(body.documents[index]) if body.return_documents else None,
        )
        for index in order
    ]
    units = {"search_units": 1, "input_tokens": num_tokens}
    return schemas.RerankResponse(
        id=call.request_id,
        model=name,
        results=results,
        usage=schemas.RerankUsage(total_tokens=num_tokens, prompt_tokens=num_tokens),
        meta=schemas.RerankMeta(api_version={"version": "2"}, billed_units=units),
    )


async def score(call: Call) -> BaseModel:
    """Return the cosine of texts and images, one against many or pair by pair."""
    body: schemas.ScoreRequest = call.body
    first: Any = _listed(body.text_1 if body.text_1 is not None else body.queries)
    second: Any = _listed(body.text_2 if body.text_2 is not None else body.documents)
    if len(first) != 1 and len(first) != len(second):
        raise InputError(
            f"text_1 has {len(first)} entries and text_2 {len(second)}; expected one, or as many"
        )
    inputs = [*map(_pieces, first), *map(_pieces, second)]
    found = await call.service.embed(
        body.model, inputs, instruction=body.instruction, num_queries=len(first), multi=True
    )
    ours, theirs = list(found.of_inputs[: len(first)]), found.of_inputs[len(first) :]
    cosines = _similarities(ours * (len(theirs) // len(ours)), theirs)
    data = [schemas.Score(index=i, score=float(cosine)) for i, cosine in enumerate(cosines)]
    return schemas.ScoreResponse(
        id=call.request_id,
        created=int(time.time()),
        model=found.name,
        data=data,
        usage=schemas.ScoreUsage(prompt_tokens=found.num_tokens, total_tokens=found.num_tokens),
    )


def _pieces(item: str | schemas.RerankItem) -> list[Piece]:
    if isinstance(item, str):
        return [Piece("text", item)]
    if item.content is not None:
        return pieces_of(item.content)
    image = [Piece("image", item.image)] if item.image is not None else []
    text = [Piece("text", item.text)] if item.text is not None else []
    return [*image, *text]


def _similarities(queries: Sequence[np.ndarray], documents: Sequence[np.ndarray]) -> np.ndarray:
    """Return the similarity of each query and document, float [N]: of vectors [D] their cosine,
    of [tokens, D] the mean of the best cosines of the query's."""
    pairs = zip(queries, documents, strict=True)
    return np.array(
        [
            float(query @ document) if query.ndim == 1 else maxsim(query, document) / len(query)
            for query, document in pairs
        ]
    )


def _listed(side: Any) -> Sequence[Any]:
    return side if isinstance(side, list) else [side]


def _relevance(cosine: float) -> float:
    return min(1.0, max(0.0, (1 + float(cosine)) / 2))


def _shown(document: str | schemas.RerankItem) -> dict[str, Any]:
    if isinstance(document, str):
        return {"text": document}
    return document.model_dump(exclude_none=True)


ENDPOINTS = [
    *(
        Endpoint(
            "POST",
            path,
            rerank,
            schemas.RerankResponse,
            error,
            request=schemas.RerankRequest,
            tag="Rerank",
        )
        for path, error in (("/v1/rerank", DetailError), ("/v2/rerank", MessageError))
    ),
    Endpoint(
        "POST",
        "/v1/score",
        score,
        schemas.ScoreResponse,
        OpenAIError,
        request=schemas.ScoreRequest,
        tag="Rerank",
    ),
]
