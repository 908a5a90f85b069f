"""Base classes and the content parts that several APIs share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MAX_BATCH = 2048  # inputs of one embedding request, as in OpenAI's API
MAX_DOCUMENTS = 1024  # documents of one rerank or score request
MAX_MESSAGES = 1024  # messages of one conversation
MAX_PARTS = 1024  # content parts of one message or item

Ignored = Annotated[Any, Field(description="Accepted for compatibility; has no effect.")]
ModelName = Annotated[
    str | None,
    Field(max_length=256, description="Name of a served model; the first one when left out."),
]
Instruction = Annotated[
    str | None,
    Field(
        max_length=8192,
        description="Task instruction, joined to the text of each input as the model was trained.",
    ),
]


def _no_tools(tools: list[Any] | None) -> list[Any] | None:
    if tools:
        raise ValueError("tool calls are not supported; leave them out")
    return tools


Tools = Annotated[
    list[Any] | None,
    AfterValidator(_no_tools),
    Field(json_schema_extra={"maxItems": 0}, description="Tool calls are not supported."),
]


class Request(BaseModel):
    """A request body. Unknown fields are refused, so that no option is silently without effect."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, protected_namespaces=())


class Response(BaseModel):
    """A response body."""

    model_config = ConfigDict(populate_by_name=True, protected_namespaces=())


class ImageUrl(Request):
    """An image as a data URI, or as a URL of a host that the server may fetch from."""

    url: str
    detail: Literal["auto", "low", "high", "original"] | None = Field(
        None, description="Accepted; each model has one way of sizing its images."
    )


class MediaUrl(Request):
    """A video as a data URI, or as a URL of a host that the server may fetch from."""

    url: str


class FileData(Request):
    """A PDF document as a data URI or plain base64."""

    file_data: str
    filename: Annotated[str | None, Field(max_length=1024)] = None


class TextPart(Request):
    """A piece of text."""

    type: Literal["text", "input_text", "output_text"] = "text"
    text: str
    annotations: Ignored = None
    logprobs: Ignored = None


class ImagePart(Request):
    """An image of a chat message."""

    type: Literal["image_url"]
    image_url: ImageUrl | str


class VideoPart(Request):
    """A video of a chat message (the form of vLLM and Qwen)."""

    type: Literal["video_url"]
    video_url: MediaUrl | str


class FilePart(Request):
    """A PDF document of a chat message; each page becomes an image."""

    type: Literal["file"]
    file: FileData


Part = Annotated[TextPart | ImagePart | VideoPart | FilePart, Field(discriminator="type")]
Parts = Annotated[list[Part], Field(max_length=MAX_PARTS)]


class OpenAIErrorBody(Response):
    """The details of an error."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class OpenAIError(Response):
    """The error shape of OpenAI's API."""

    error: OpenAIErrorBody


class MessageError(Response):
    """The error shape of Cohere's API."""

    message: str


class DetailError(Response):
    """The error shape of Jina's and Voyage's APIs."""

    detail: str


class TextError(Response):
    """The error shape of Ollama's API and of the web page."""

    error: str
