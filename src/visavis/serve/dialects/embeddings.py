"""Embeddings: `/v1/embeddings` in the forms of OpenAI, vLLM, Jina, SGLang, Infinity and llama.cpp;
Cohere's `/v2/embed` and Voyage's `/v1/multimodalembeddings`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel

from visavis.errors import InputError
from visavis.serve.dialects.pieces import pieces_of, url_of
from visavis.serve.dialects.sides import side_of
from visavis.serve.encode import base64_rows, encode, quantize
from visavis.serve.http import Call, Endpoint
from visavis.serve.media import Kind, Piece
from visavis.serve.schemas import embeddings as schemas
from visavis.serve.schemas.base import DetailError, MessageError, OpenAIError

MEDIA_MARKER = "<__media__>"  # where an image of `multimodal_data` stands (llama.cpp)
FOREIGN_TOKENS = (
    "the inputs are token ids, probably of another model's vocabulary, which mean nothing to this "
    "model; send texts (in LangChain: OpenAIEmbeddings(check_embedding_ctx_length=False))"
)


async def openai(call: Call) -> BaseModel:
    """Embed texts, images and combinations of them."""
    body: schemas.EmbeddingsRequest = call.body
    if body.messages is not None:
        inputs = [[piece for one in body.messages for piece in pieces_of(one.content)]]
    else:
        inputs = _inputs(body)
    side = side_of(body.input_type, body.task)
    found = await call.service.embed(
        body.model,
        inputs,
        instruction=body.instruction,
        side=side,
        dim=body.dimensions or body.output_dimension,
    )
    kind: Any = body.embedding_type
    kind = kind[0] if isinstance(kind, list) else kind
    dtype = body.output_dtype or "float"
    if body.encoding_format == "base64" and dtype != "float":  # of Voyage's client
        rows = await call.service.prepare(lambda: base64_rows(quantize(found.vectors, dtype)))
    else:
        kind = body.encoding_format or kind or dtype
        rows = await call.service.prepare(lambda: encode(found.vectors, kind))
    return schemas.EmbeddingsResponse.model_construct(
        data=_numbered(rows),
        model=found.name,
        usage=schemas.EmbeddingUsage(prompt_tokens=found.num_tokens, total_tokens=found.num_tokens),
    )


def _numbered(rows: Sequence[Any]) -> list[schemas.Embedding]:
    # Not validated again: these are thousands of numbers of our own.
    return [
        schemas.Embedding.model_construct(index=index, embedding=row)
        for index, row in enumerate(rows)
    ]


def _inputs(body: schemas.EmbeddingsRequest) -> list[list[Piece]]:
    """Return the pieces of each input of `/v1/embeddings`."""
    given: Any = body.input if body.input is not None else body.content
    kind: Kind = body.modality or "text"
    if isinstance(given, str | schemas.EmbeddingItem):
        given = [given]
    elif body.content is not None:  # content parts: one input
        return [pieces_of(given)]
    if isinstance(given[0], int | list):
        raise InputError(FOREIGN_TOKENS)
    return [[Piece(kind, one)] if isinstance(one, str) else _item_pieces(one) for one in given]


def _item_pieces(item: schemas.EmbeddingItem) -> list[Piece]:
    if item.content is not None:
        return pieces_of(item.content)
    if item.prompt_string is not None:
        return _marked(item.prompt_string, item.multimodal_data or [])
    named: list[tuple[Kind, str | None]] = [
        ("image", item.image),
        ("video", item.video),
        ("document", item.pdf),
        ("text", item.text),
    ]
    return [Piece(kind, value) for kind, value in named if value is not None]


def _marked(text: str, media: Sequence[str]) -> list[Piece]:
    """Return llama.cpp's prompt: an image in the place of each marker."""
    texts = text.split(MEDIA_MARKER)
    if len(texts) - 1 != len(media):
        raise InputError(
            f"prompt_string has {len(texts) - 1} {MEDIA_MARKER} markers, but multimodal_data "
            f"holds {len(media)} images"
        )
    pieces: list[Piece] = []
    for number, part in enumerate(texts):
        if part:
            pieces.append(Piece("text", part))
        if number < len(media):
            pieces.append(Piece("image", media[number]))
    return pieces


async def cohere(call: Call) -> BaseModel:
    """Embed texts, images and combinations of them (Cohere's API)."""
    body: schemas.CohereRequest = call.body
    if body.texts:
        inputs = [[Piece("text", text)] for text in body.texts]
    elif body.images:
        inputs = [[Piece("image", image)] for image in body.images]
    else:
        inputs = [pieces_of(one.content) for one in body.inputs or []]
    found = await call.service.embed(
        body.model,
        inputs,
        instruction=body.instruction,
        side=side_of(body.input_type),
        dim=body.output_dimension,
    )
    kinds = body.embedding_types or ["float"]

    def encoded() -> dict[str, Any]:
        names = {"float": "float_"}
        return {names.get(kind, kind): encode(found.vectors, kind) for kind in kinds}

    units = {"input_tokens": found.num_tokens, "images": found.cost.images}
    return schemas.CohereResponse.model_construct(
        id=call.request_id,
        embeddings=schemas.CohereVectors.model_construct(**await call.service.prepare(encoded)),
        texts=body.texts or [],
        meta=schemas.CohereMeta(billed_units=units),
    )


async def voyage(call: Call) -> BaseModel:
    """Embed texts, images, videos and combinations of them (Voyage's API)."""
    body: schemas.VoyageRequest = call.body
    inputs = [[_voyage_piece(part) for part in one.content] for one in body.inputs]
    found = await call.service.embed(
        body.model,
        inputs,
        instruction=body.instruction,
        side=side_of(body.input_type),
        dim=body.output_dimension,
    )
    as_base64 = body.output_encoding or body.encoding_format
    dtype = body.output_dtype or "float"

    def rows() -> list[Any]:
        quantized: np.ndarray = quantize(found.vectors, dtype)
        return base64_rows(quantized) if as_base64 else quantized.tolist()

    return schemas.VoyageResponse.model_construct(
        data=_numbered(await call.service.prepare(rows)),
        model=found.name,
        usage=schemas.VoyageUsage(
            text_tokens=found.text_tokens,
            image_pixels=found.cost.image_pixels,
            video_pixels=0,
            total_tokens=found.num_tokens,
        ),
    )


def _voyage_piece(part: schemas.VoyagePart) -> Piece:
    value = url_of(getattr(part, part.type))
    kind: Kind = "text" if part.type == "text" else "image" if "image" in part.type else "video"
    return Piece(kind, value)


ENDPOINTS = [
    *(
        Endpoint(
            "POST",
            path,
            openai,
            schemas.EmbeddingsResponse,
            OpenAIError,
            request=schemas.EmbeddingsRequest,
            tag="Embeddings",
        )
        for path in ("/v1/embeddings", "/embeddings")
    ),
    Endpoint(
        "POST",
        "/v2/embed",
        cohere,
        schemas.CohereResponse,
        MessageError,
        request=schemas.CohereRequest,
        tag="Embeddings",
    ),
    Endpoint(
        "POST",
        "/v1/multimodalembeddings",
        voyage,
        schemas.VoyageResponse,
        DetailError,
        request=schemas.VoyageRequest,
        tag="Embeddings",
    ),
]
