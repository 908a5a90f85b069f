"""OpenAI's Responses API, without tools and without stored conversations."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from visavis.serve.schemas.base import (
    MAX_MESSAGES,
    MAX_PARTS,
    Ignored,
    ModelName,
    Request,
    Response,
    TextPart,
    Tools,
)
from visavis.serve.schemas.openai import Count, Temperature


class InputImage(Request):
    """An image as a data URI, or as a URL of a host that the server may fetch from."""

    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto", "low", "high", "original"] | None = None
    prompt_cache_breakpoint: Ignored = None


class InputFile(Request):
    """A PDF document as a data URI or plain base64."""

    type: Literal["input_file"]
    file_data: str
    filename: Annotated[str | None, Field(max_length=1024)] = None


InputPart = Annotated[TextPart | InputImage | InputFile, Field(discriminator="type")]


class InputMessage(Request):
    """One message of a conversation."""

    type: Literal["message"] | None = None
    id: Ignored = None
    status: Ignored = None
    phase: Ignored = None
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[InputPart], Field(max_length=MAX_PARTS)]


class TextFormat(Request):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(max_length=256)] = "answer"
    description: Ignored = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: Ignored = None


class TextConfig(Request):
    """Settings of the answer's text."""

    format: TextFormat | None = None
    verbosity: Ignored = None


class ResponsesRequest(Request):
    """Body of `POST /v1/responses`."""

    model: ModelName = None
    input: str | Annotated[list[InputMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: Count = None
    temperature: Temperature = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    text: TextConfig | None = None
    stream: bool | None = None
    background: Literal[False] | None = None
    previous_response_id: None = Field(None, description="Nothing is stored; send all messages.")
    conversation: None = None
    tools: Tools = None
    tool_choice: Literal["none", "auto"] | None = None
    truncation: Literal["disabled"] | None = None
    # Without effect here.
    include: Ignored = None
    stream_options: Ignored = None
    store: Ignored = None
    metadata: Ignored = None
    parallel_tool_calls: Ignored = None
    reasoning: Ignored = None
    user: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    service_tier: Ignored = None


class OutputText(Response):
    """The answer's text."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class OutputMessage(Response):
    """The answer."""

    type: Literal["message"] = "message"
    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class InputTokensDetails(Response):
    """How many input tokens were found in the prefix cache."""

    cached_tokens: int = 0


class OutputTokensDetails(Response):
    """Always 0: no model here reasons apart."""

    reasoning_tokens: int = 0


class ResponsesUsage(Response):
    """Tokens of a request; image tokens count as input tokens."""

    input_tokens: int
    input_tokens_details: InputTokensDetails = InputTokensDetails()
    output_tokens: int
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()
    total_tokens: int


class IncompleteDetails(Response):
    """Why an answer ended early."""

    reason: Literal["max_output_tokens"]


class ResponsesResponse(Response):
    """Response of `POST /v1/responses`."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    model: str
    output: list[OutputMessage]
    usage: ResponsesUsage | None = None
    error: dict[str, str] | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] = {}
    parallel_tool_calls: bool = False
    temperature: float | None = None
    top_p: float | None = None
    tool_choice: Literal["none"] = "none"
    tools: list[Any] = []
