"""Ollama's chat, generate, embed and model endpoints."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from visavis.serve.schemas.base import (
    MAX_BATCH,
    MAX_MESSAGES,
    MAX_PARTS,
    Ignored,
    Instruction,
    Request,
    Response,
    Tools,
)
from visavis.serve.schemas.openai import Seed, Temperature, TokenLogprob

Name = Annotated[str, Field(max_length=256)]
KeepAlive = Annotated[
    float | str | None,
    Field(description="How long the model stays loaded: seconds, or '5m'; negative: for good."),
]
Base64 = Annotated[str, Field(description="base64 of an image file.")]


class Options(Request):
    """Generation settings. Settings of how Ollama runs a model have no effect here."""

    num_predict: Annotated[int | None, Field(ge=-2, le=2**31)] = None
    temperature: Temperature = None
    top_k: Annotated[int | None, Field(ge=0, le=2**31)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    repeat_penalty: Annotated[float | None, Field(gt=0, le=100)] = None
    seed: Seed = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    presence_penalty: Annotated[float | None, Field(ge=0, le=0, description="Only 0.")] = None
    frequency_penalty: Annotated[float | None, Field(ge=0, le=0, description="Only 0.")] = None
    mirostat: Literal[0] | None = None
    typical_p: Annotated[float | None, Field(ge=1, le=1)] = None
    tfs_z: Annotated[float | None, Field(ge=1, le=1)] = None
    # How a model is run.
    num_ctx: Ignored = None
    num_keep: Ignored = None
    num_batch: Ignored = None
    num_gpu: Ignored = None
    main_gpu: Ignored = None
    num_thread: Ignored = None
    numa: Ignored = None
    low_vram: Ignored = None
    f16_kv: Ignored = None
    logits_all: Ignored = None
    vocab_only: Ignored = None
    use_mmap: Ignored = None
    use_mlock: Ignored = None
    embedding_only: Ignored = None
    repeat_last_n: Ignored = None
    mirostat_tau: Ignored = None
    mirostat_eta: Ignored = None
    penalize_newline: Ignored = None


class OllamaMessage(Request):
    """One message; images belong to it and come before its text."""

    role: Literal["system", "user", "assistant"]
    content: str | None = ""
    images: Annotated[list[Base64] | None, Field(max_length=MAX_PARTS)] = None
    thinking: Ignored = None
    tool_calls: Tools = None
    tool_name: None = None


Format = Literal["", "json"] | dict[str, Any] | None


class _Generates(Request):
    model: Name
    stream: bool | None = None
    format: Annotated[
        Format, Field(description="'json' or a JSON schema that the answer keeps to.")
    ] = None
    options: Options | None = None
    keep_alive: KeepAlive = None
    think: Literal[False] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None


class OllamaChatRequest(_Generates):
    """Body of `POST /api/chat`; without messages the model is only loaded."""

    messages: Annotated[list[OllamaMessage] | None, Field(max_length=MAX_MESSAGES)] = None
    tools: Tools = None


class GenerateRequest(_Generates):
    """Body of `POST /api/generate`; without a prompt the model is only loaded."""

    prompt: str | None = None
    system: str | None = None
    images: Annotated[list[Base64] | None, Field(max_length=MAX_PARTS)] = None
    suffix: Literal[""] | None = None
    template: Literal[""] | None = None
    context: Annotated[list[int] | None, Field(max_length=0)] = None
    raw: Literal[False] | None = None
    width: None = None
    height: None = None
    steps: None = None


class OllamaMessageOut(Response):
    """The answer, or a piece of it."""

    role: Literal["assistant"] = "assistant"
    content: str


class _Finished(Response):
    model: str
    created_at: str
    done: bool
    done_reason: Literal["stop", "length", "load", "unload"] | None = None
    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None
    logprobs: list[TokenLogprob] | None = None


class OllamaChatResponse(_Finished):
    """The answer, or one line of its stream; durations in nanoseconds."""

    message: OllamaMessageOut


class GenerateResponse(_Finished):
    """The answer, or one line of its stream; durations in nanoseconds."""

    response: str


class OllamaInput(Request):
    """One input of text, an image, or both."""

    text: str | None = None
    image: Base64 | None = None

    @model_validator(mode="after")
    def _something(self) -> OllamaInput:
        if self.text is None and self.image is None:
            raise ValueError("expected 'text', 'image' or both")
        return self


class EmbedRequest(Request):
    """Body of `POST /api/embed`. `images` adds one vector for each image after those of `input`;
    `inputs` gives one vector for each pair of text and image."""

    model: Name
    input: str | Annotated[list[str], Field(max_length=MAX_BATCH)] | None = None
    images: Annotated[list[Base64] | None, Field(max_length=MAX_BATCH)] = None
    inputs: Annotated[list[OllamaInput] | None, Field(max_length=MAX_BATCH)] = None
    truncate: bool | None = Field(
        None, description="Nothing is truncated: an input that is too long is an error."
    )
    dimensions: Annotated[int | None, Field(ge=1, le=2**31)] = None
    options: Options | None = None
    keep_alive: KeepAlive = None
    instruction: Instruction = None


class EmbedResponse(Response):
    """Response of `POST /api/embed`: unit vectors."""

    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class OldEmbedRequest(Request):
    """Body of `POST /api/embeddings`, the older form of `/api/embed`."""

    model: Name
    prompt: str | None = None
    options: Options | None = None
    keep_alive: KeepAlive = None


class OldEmbedResponse(Response):
    """Response of `POST /api/embeddings`."""

    embedding: list[float]


class ShowRequest(Request):
    """Body of `POST /api/show`."""

    model: Name | None = None
    name: Name | None = None
    verbose: Ignored = None
    system: Ignored = None
    template: Ignored = None
    options: Ignored = None

    @model_validator(mode="after")
    def _one_of(self) -> ShowRequest:
        if (self.model is None) == (self.name is None):
            raise ValueError("expected 'model'")
        return self


class Details(Response):
    """The format, family and size of a model."""

    parent_model: str = ""
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class ShowResponse(Response):
    """Response of `POST /api/show`."""

    modelfile: str = ""
    parameters: str = ""
    template: str = ""
    details: Details
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class Tag(Response):
    """A served model."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: Details


class TagsResponse(Response):
    """Response of `GET /api/tags`."""

    models: list[Tag]


class Running(Tag):
    """A loaded model."""

    modified_at: str = ""
    expires_at: str
    size_vram: int
    context_length: int


class RunningResponse(Response):
    """Response of `GET /api/ps`."""

    models: list[Running]


class VersionResponse(Response):
    """Response of `GET /api/version`."""

    version: str
