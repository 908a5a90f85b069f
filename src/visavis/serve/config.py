"""Settings of the server: what it serves, where it listens, what one request may cost."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from visavis.errors import InputError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_KEY_HASH = re.compile(r"sha256:[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
Side = Literal["query", "document"]
Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Limits(_Settings):
    """Limits on the cost of one request and of all requests together.

    Args:
        body_bytes: of a request body.
        images: images, videos and pages of a document of one chat request or one embedded input.
        text_chars: characters of one prompt or embedded input, counted before it is tokenized.
        image_pixels: of one image, read from its header before it is decoded.
        request_pixels: of all images of a request.
        new_tokens: of an answer; also what an answer has at most when the request names nothing.
        request_seconds: from the last byte of a request to the last byte of its response.
        body_seconds: from a request's headers to the last byte of its body.
        header_seconds: from the first byte of a request to the end of its headers.
        send_seconds: how long a client may leave a piece of the response unread.
        connections: open at the same time.
        in_flight: requests that are read or worked on; more get status 429.
        waiting_chats: answers that wait for their turn, of one model; more get status 429.
        waiting_items: inputs that wait for their embedding, of one model; more get status 429.
    """

    body_bytes: Positive = 64 * 2**20
    images: Positive = 64
    text_chars: Positive = 2_000_000
    image_pixels: Positive = 64_000_000
    request_pixels: Positive = 1_000_000_000
    new_tokens: Positive = 4096
    request_seconds: Seconds = 600
    body_seconds: Seconds = 60
    header_seconds: Seconds = 10
    send_seconds: Seconds = 60
    connections: Positive = 1024
    in_flight: Positive = 512
    waiting_chats: Positive = 128
    waiting_items: Positive = 8192


class ServerConfig(_Settings):
    """Everything that `visavis serve` can be told, also as a YAML file (`--config`).

    Args:
        models: by name, a bundled name, folder, .gguf file or hub id; the first one answers
            requests that name none.
        load: options of `visavis.load` for all models, such as precision.
        instructions: what inputs of each side are embedded with where a request gives no
            instruction of its own: `query` and `document`.
        indexes: by name, index files or addresses of PostgreSQL databases; searched with the first
            model.
        host: address to listen on; another one than loopback needs `api_keys`.
        api_keys: `sha256:` and the hex digest of each accepted key; empty: none is asked for.
        allow_hosts: names of this server that the Host header may have, besides its address.
        allow_origins: web sites whose scripts may call the server (CORS).
        allow_urls: hosts that images may be fetched from; empty: no URL is fetched.
        allow_folders: folders that may be added to the first index from the web page; empty: none.
        max_sequences: answers of one model that grow at the same time.
        unload_after: seconds without a request after which a model's memory is freed; None: never.
        drain_seconds: how long requests may take to finish after SIGTERM.
        log_format: of the log on stderr.
    """

    models: dict[str, str] = Field(min_length=1)
    load: dict[str, Any] = {}
    instructions: dict[Side, str] = {}
    indexes: dict[str, str | Path] = {}
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8484
    api_keys: tuple[str, ...] = ()
    allow_hosts: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    allow_urls: tuple[str, ...] = ()
    allow_folders: tuple[Path, ...] = ()
    max_sequences: Positive = 16
    unload_after: Seconds | None = None
    drain_seconds: Seconds = 30
    log_format: Literal["text", "json"] = "text"
    limits: Limits = Limits()

    @field_validator("models", "indexes")
    @classmethod
    def _names(cls, named: dict[str, Any]) -> dict[str, Any]:
        for name in named:
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"the name {name[:80]!r} holds other characters than letters, digits, '.', "
                    "'_', '/' and '-', or more than 128"
                )
        return named

    @field_validator("api_keys")
    @classmethod
    def _hashed(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        for number, key in enumerate(keys, 1):
            if not _KEY_HASH.fullmatch(key):
                raise ValueError(
                    f"key {number} is not 'sha256:' and 64 hex digits; hash a key with "
                    "`printf %s KEY | sha256sum`"
                )
        return keys

    @model_validator(mode="after")
    def _private_or_keyed(self) -> ServerConfig:
        if self.host not in LOOPBACK and not self.api_keys:
            raise ValueError(
                f"host is {self.host}, which other machines can reach, and no API key is set; set "
                "the environment variable VISAVIS_API_KEY or api_keys, or listen on 127.0.0.1"
            )
        return self


def hash_key(key: str) -> str:
    """Return the hash of a key, as stored in `ServerConfig.api_keys`."""
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


def make_config(settings: Mapping[str, Any]) -> ServerConfig:
    """Return a checked configuration.

    Raises:
        InputError: a setting is unknown, missing or out of range; the message names it.
    """
    try:
        return ServerConfig.model_validate(dict(settings))
    except ValidationError as error:
        details = [
            f"{'.'.join(map(str, one['loc'])) or 'settings'}: "
            + ("unknown setting" if one["type"] == "extra_forbidden" else one["msg"])
            for one in error.errors(include_url=False, include_input=False)
        ]
        raise InputError(
            f"the server cannot start: {'; '.join(details).replace('Value error, ', '')}"
        ) from None


def read_config(path: Path) -> dict[str, Any]:
    """Return the settings of a YAML file.

    Raises:
        InputError: it cannot be read or holds no settings.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"the configuration {path} cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise InputError(f"the configuration {path} is not a mapping of settings to values")
    return settings
