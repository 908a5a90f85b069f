"""Relevance by a reranker: the scores of documents for a query, for `/v1/rerank`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from visavis.errors import InputError
from visavis.serve.media import Piece
from visavis.serve.service import Service


@dataclass(frozen=True)
class Relevance:
    """The scores of a request, float32 [N] between 0 and 1, and the tokens that were read."""

    name: str
    scores: np.ndarray
    num_tokens: int


async def relevance(
    service: Service,
    name: str | None,
    query: Sequence[Piece],
    documents: Sequence[Sequence[Piece]],
    instruction: str | None,
) -> Relevance | None:
    """Return the scores of documents for a query; None where the model is no reranker.

    Raises:
        ApiError, InputError: an item cannot be used; the message names it.
    """
    service.check_open()
    async with service.pool.using(name) as served:
        if not served.model.is_reranker:
            return None
        reader = service.reader()

        def prepare() -> list[Any]:
            asked, found = reader.item(query), []
            for number, pieces in enumerate(documents):
                try:
                    found.append(served.model.prepare_pair(asked, reader.item(pieces), instruction))
                except InputError as error:
                    raise type(error)(f"document {number}: {error}") from None
            return found

        prepared = await service.prepare(prepare)
        future = served.submit_inputs(prepared)
        try:
            vectors = await asyncio.wrap_future(future)
        finally:
            future.cancel()
        num_tokens = sum(len(one.token_ids) for one in prepared)
        service.metrics.prompt_tokens.labels(served.name, "rerank").inc(num_tokens)
        return Relevance(served.name, np.asarray(vectors)[:, 0], num_tokens)
