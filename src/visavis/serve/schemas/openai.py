"""OpenAI's chat completions and list of models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from visavis.serve.schemas.base import (
    MAX_MESSAGES,
    Ignored,
    ModelName,
    Parts,
    Request,
    Response,
    Tools,
)

Temperature = Annotated[
    float | None, Field(ge=0, le=100, description="0, the default, picks the likeliest token.")
]
Seed = Annotated[int | None, Field(ge=-(2**63), le=2**63 - 1)]
Count = Annotated[int | None, Field(ge=1, le=2**31)]


class ChatMessage(Request):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Parts | None = None
    name: Ignored = None
    refusal: Ignored = None
    annotations: Ignored = None
    audio: None = None
    tool_calls: Tools = None
    function_call: None = None


class JsonSchema(Request):
    """A JSON schema that the answer keeps to."""

    name: Annotated[str, Field(max_length=256)] = "answer"
    description: Ignored = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: Ignored = None


class ResponseFormat(Request):
    """The form of the answer. `json_schema` and `json_object` need the extra `grammar`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(Request):
    """Options on the content of a stream besides the text."""

    include_usage: bool | None = False
    include_obfuscation: Ignored = None
    continuous_usage_stats: Literal[False] | None = None


class ChatRequest(Request):
    """Body of `POST /v1/chat/completions`."""

    model: ModelName = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Count = None
    max_completion_tokens: Count = None
    temperature: Temperature = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=-1, le=2**31)] = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    repetition_penalty: Annotated[float | None, Field(gt=0, le=100)] = None
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Seed = None
    n: Annotated[int | None, Field(ge=1, le=16)] = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    response_format: ResponseFormat | None = None
    # Refused unless they ask for nothing.
    presence_penalty: Annotated[float | None, Field(ge=0, le=0, description="Only 0.")] = None
    frequency_penalty: Annotated[float | None, Field(ge=0, le=0, description="Only 0.")] = None
    tools: Tools = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: Tools = None
    function_call: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    # Without effect here.
    parallel_tool_calls: Ignored = None
    user: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    reasoning_effort: Ignored = None
    verbosity: Ignored = None

    @field_validator("stop")
    @classmethod
    def _not_too_long(cls, stop: str | list[str] | None) -> str | list[str] | None:
        for text in [stop] if isinstance(stop, str) else stop or []:
            if len(text) > 1024:
                raise ValueError("a stop text has more than 1024 characters")
        return stop


class TokenDetails(Response):
    """How many prompt tokens were found in the prefix cache."""

    cached_tokens: int = 0


class Usage(Response):
    """Tokens of a request; image tokens count as prompt tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: TokenDetails = TokenDetails()


class TopLogprob(Response):
    """A token that could have come, and its log probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the answer, its log probability and the likeliest tokens in its place."""

    top_logprobs: list[TopLogprob] = []


class Logprobs(Response):
    """Log probabilities of the answer's tokens, before temperature and cuts."""

    content: list[TokenLogprob]
    refusal: None = None


class AnswerMessage(Response):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(Response):
    """One of the `n` answers."""

    index: int
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: Logprobs | None = None


class ChatResponse(Response):
    """Response of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Delta(Response):
    """The new part of an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(Response):
    """The new part of one of the `n` answers."""

    index: int
    delta: Delta
    finish_reason: Literal["stop", "length"] | None = None
    logprobs: Logprobs | None = None


class ChatChunk(Response):
    """One server-sent event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class ModelCard(Response):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "visavis"


class ModelList(Response):
    """Response of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
