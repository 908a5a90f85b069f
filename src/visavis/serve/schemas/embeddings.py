"""Embedding requests: OpenAI, vLLM, Jina, SGLang, Infinity and llama.cpp on `/v1/embeddings`;
Cohere's `/v2/embed` and Voyage's `/v1/multimodalembeddings`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from visavis.serve.schemas.base import (
    MAX_BATCH,
    MAX_MESSAGES,
    MAX_PARTS,
    Ignored,
    ImagePart,
    ImageUrl,
    Instruction,
    ModelName,
    Parts,
    Request,
    Response,
    TextPart,
)
from visavis.serve.schemas.openai import ChatMessage

Encoding = Literal["float", "base64", "int8", "uint8", "binary", "ubinary"]
VoyageDtype = Literal["float", "int8", "uint8", "binary", "ubinary"]
Dimensions = Annotated[
    int | None,
    Field(ge=1, le=2**31, description="Keep the first numbers of each vector, normalised again."),
]
InputType = Annotated[
    str | None,
    Field(max_length=64, description="What the inputs are: queries or documents."),
]


class EmbeddingItem(Request):
    """One input as an object: the forms of Jina, SGLang, llama.cpp and content lists."""

    text: str | None = None
    image: Annotated[str | None, Field(description="A data URI, base64, or an allowed URL.")] = None
    video: Annotated[str | None, Field(description="A data URI, base64, or an allowed URL.")] = None
    pdf: Annotated[str | None, Field(description="A data URI or base64.")] = None
    content: str | Parts | None = None
    prompt_string: str | None = None
    multimodal_data: Annotated[list[str] | None, Field(max_length=MAX_PARTS)] = None

    @model_validator(mode="after")
    def _something(self) -> EmbeddingItem:
        forms = [
            any((self.text is not None, self.image, self.video, self.pdf)),
            self.content is not None,
            self.prompt_string is not None,
        ]
        if sum(forms) != 1:
            raise ValueError(
                "expected 'text', 'image', 'video' or 'pdf'; or 'content'; or 'prompt_string' "
                "with 'multimodal_data'"
            )
        return self


Tokens = Annotated[list[int], Field(max_length=1_000_000)]


class EmbeddingsRequest(Request):
    """Body of `POST /v1/embeddings`. Either `input` (OpenAI, Jina, SGLang, Infinity, llama.cpp)
    or `messages` (vLLM) is given."""

    model: ModelName = None
    input: (
        str
        | EmbeddingItem
        | Annotated[list[str | EmbeddingItem], Field(min_length=1, max_length=MAX_BATCH)]
        | Tokens
        | Annotated[list[Tokens], Field(max_length=MAX_BATCH)]
        | None
    ) = None
    content: str | Parts | EmbeddingItem | None = Field(
        None, description="llama.cpp's older name of `input`."
    )
    messages: Annotated[list[ChatMessage] | None, Field(max_length=MAX_MESSAGES)] = None
    dimensions: Dimensions = None
    encoding_format: Encoding | None = None
    embedding_type: (
        Encoding | Annotated[list[Encoding], Field(min_length=1, max_length=1)] | None
    ) = Field(None, description="Jina's name of `encoding_format`.")
    output_dtype: VoyageDtype | None = Field(
        None, description="Voyage's; with encoding_format base64, of the bytes."
    )
    output_dimension: Dimensions = Field(None, description="Voyage's name of `dimensions`.")
    truncation: bool | None = Field(None, description="Voyage's; nothing is truncated.")
    normalized: Literal[True] | None = Field(None, description="Vectors are unit vectors.")
    modality: Literal["text", "image", "video"] | None = Field(
        None, description="Infinity's: what the strings in `input` are."
    )
    task: Annotated[str | None, Field(max_length=64, description="Jina's input type.")] = None
    input_type: InputType = None
    instruction: Instruction = None
    truncate: Literal[False] | None = Field(
        None, description="Nothing is truncated; an input that is too long is an error."
    )
    user: Ignored = None
    add_special_tokens: Ignored = None
    add_generation_prompt: Literal[False] | None = None
    late_chunking: Literal[False] | None = None
    return_multivector: Literal[False] | None = None
    truncate_prompt_tokens: None = None
    priority: Ignored = None

    @model_validator(mode="after")
    def _one_of(self) -> EmbeddingsRequest:
        given = [name for name in ("input", "messages", "content") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                f"one of 'input' and 'messages' is expected, found {' and '.join(given) or 'none'}"
            )
        return self


class Embedding(Response):
    """One vector, in the order of the inputs: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | list[int] | str


class EmbeddingUsage(Response):
    """Tokens of a request; image tokens count too."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(Response):
    """Response of `POST /v1/embeddings`."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class CohereInput(Request):
    """One input of text and images."""

    content: Annotated[
        list[Annotated[TextPart | ImagePart, Field(discriminator="type")]],
        Field(min_length=1, max_length=MAX_PARTS),
    ]


class CohereRequest(Request):
    """Body of `POST /v2/embed`."""

    model: ModelName = None
    input_type: (
        Literal["search_query", "search_document", "classification", "clustering", "image"] | None
    ) = None
    texts: Annotated[list[str] | None, Field(max_length=MAX_BATCH)] = None
    images: Annotated[list[str] | None, Field(max_length=MAX_BATCH)] = None
    inputs: Annotated[list[CohereInput] | None, Field(max_length=MAX_BATCH)] = None
    embedding_types: Annotated[list[Encoding] | None, Field(max_length=6)] = None
    output_dimension: Dimensions = None
    truncate: Literal["NONE", "START", "END"] | None = Field(
        None, description="Nothing is truncated: an input that is too long is an error."
    )
    max_tokens: Ignored = None
    priority: Ignored = None
    instruction: Instruction = None

    @model_validator(mode="after")
    def _one_of(self) -> CohereRequest:
        if sum(bool(each) for each in (self.texts, self.images, self.inputs)) != 1:
            raise ValueError("exactly one of 'texts', 'images' and 'inputs' is expected")
        return self


class CohereVectors(Response):
    """The vectors in each form that was asked for."""

    float_: list[list[float]] | None = Field(None, alias="float")
    int8: list[list[int]] | None = None
    uint8: list[list[int]] | None = None
    binary: list[list[int]] | None = None
    ubinary: list[list[int]] | None = None
    base64: list[str] | None = None


class CohereVersion(Response):
    """Version of the API."""

    version: str = "2"


class CohereMeta(Response):
    """Version of the API and numbers of tokens and images."""

    api_version: CohereVersion = CohereVersion()
    billed_units: dict[str, int]


class CohereResponse(Response):
    """Response of `POST /v2/embed`."""

    id: str
    response_type: Literal["embeddings_by_type"] = "embeddings_by_type"
    embeddings: CohereVectors
    texts: list[str] = []
    meta: CohereMeta


class VoyagePart(Request):
    """A piece of an input; the field that `type` names is given, the others are left out."""

    type: Literal["text", "image_url", "image_base64", "video_url", "video_base64"]
    text: str | None = None
    image_url: str | ImageUrl | None = None
    image_base64: str | None = None
    video_url: str | ImageUrl | None = None
    video_base64: str | None = None

    @model_validator(mode="after")
    def _as_its_type_says(self) -> VoyagePart:
        names = ("text", "image_url", "image_base64", "video_url", "video_base64")
        if [name for name in names if getattr(self, name) is not None] != [self.type]:
            raise ValueError(f"expected the field {self.type!r} and none of the others")
        return self


class VoyageInput(Request):
    """One input of text, images and videos."""

    content: Annotated[list[VoyagePart], Field(min_length=1, max_length=MAX_PARTS)]


class VoyageRequest(Request):
    """Body of `POST /v1/multimodalembeddings`."""

    model: ModelName = None
    inputs: Annotated[list[VoyageInput], Field(min_length=1, max_length=MAX_BATCH)]
    input_type: Literal["query", "document"] | None = None
    truncation: bool | None = Field(
        None, description="Nothing is truncated: an input that is too long is an error."
    )
    output_dtype: VoyageDtype | None = None
    output_dimension: Dimensions = None
    output_encoding: Literal["base64"] | None = Field(
        None, description="base64 of the vectors' bytes, little-endian."
    )
    encoding_format: Literal["base64"] | None = Field(
        None, description="The client's older name of `output_encoding`."
    )
    instruction: Instruction = None


class VoyageUsage(Response):
    """Tokens, and pixels of the images and videos as they were sent."""

    text_tokens: int
    image_pixels: int
    video_pixels: int
    total_tokens: int


class VoyageResponse(Response):
    """Response of `POST /v1/multimodalembeddings`."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: VoyageUsage
