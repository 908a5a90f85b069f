"""Errors of a request: their status, and their shape in each API.

    exception ──► as_api_error ──► ApiError ──► body_of(error, dialect)

The message of an `InputError` is about what the client sent and is passed on. The messages of
other exceptions may hold paths of this machine: they go to the log, and the client is told what
kind of thing failed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from pydantic import ValidationError

from visavis.errors import ImageError, InputError, OutOfMemoryError, VisavisError

Dialect: TypeAlias = Literal["openai", "cohere", "jina", "ollama", "page"]
MAX_SHOWN = 5  # errors of one request body that a message lists
MAX_EXAMINED = 500  # errors that are sorted by field
MAX_MESSAGE = 2000  # characters
log = logging.getLogger(__name__)

_BRANCHES = frozenset(
    {"str", "int", "float", "bool", "text", "input_text", "output_text", "image_url", "video_url"}
    | {"file", "input_image", "input_file"}
)
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        message: told to the client; holds no path of this machine.
        code: a short name of the error for programs.
        param: the field of the request it is about.
        retry_after: seconds after which the same request may succeed.
        closes: whether the connection ends with it, because the rest of the body is not read.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
        closes: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.message = status, message[:MAX_MESSAGE]
        self.code, self.param, self.retry_after = code, param, retry_after
        self.closes = closes

    @property
    def headers(self) -> dict[str, str]:
        found = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return {**found, "connection": "close"} if self.closes else found


def as_api_error(error: BaseException) -> ApiError:
    """Return the error that a client receives for an exception; log the details withheld."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValidationError):
        return _invalid(error)
    if isinstance(error, InputError):
        code = "invalid_image" if isinstance(error, ImageError) else "invalid_value"
        return ApiError(400, str(error), code=code)
    if isinstance(error, (OutOfMemoryError, MemoryError)):
        log.error("out of memory in one request: %s", error)
        return ApiError(
            413,
            "this request needs more memory than is free; send fewer or smaller images, fewer "
            "inputs or a shorter prompt",
            code="out_of_memory",
        )
    if isinstance(error, VisavisError):
        log.error("a request failed: %s", error)
        message = "the model or the index failed; see the log of the server"
        return ApiError(503, message, code="unavailable")
    log.error("a request failed", exc_info=error)
    name = type(error).__name__
    message = f"internal error ({name}); see the log of the server"
    return ApiError(500, message, code="internal_error")


def dialect_of(path: str) -> Dialect:
    """Return the API that a path belongs to."""
    if path.startswith("/v2/"):
        return "cohere"
    if path in ("/v1/rerank", "/v1/multimodalembeddings"):
        return "jina"
    if path == "/" or path.startswith("/page/"):
        return "page"
    return "ollama" if path.startswith("/api/") else "openai"


def body_of(error: ApiError, dialect: Dialect) -> dict[str, Any]:
    """Return the JSON body of an error in an API's shape."""
    if dialect == "cohere":
        return {"message": error.message}
    if dialect == "jina":
        return {"detail": error.message}
    if dialect in ("ollama", "page"):
        return {"error": error.message}
    default = "invalid_request_error" if error.status < 500 else "server_error"
    kind = _TYPES.get(error.status, default)
    shown = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    return {"error": shown}


def _invalid(error: ValidationError) -> ApiError:
    """Return an error that names the fields that are wrong, each once.

    Pydantic reports every branch of a union. Of each field, the branch is told whose errors lie
    deepest in the value, then furthest along it: the one that was probably meant.
    """
    found = error.errors(include_url=False, include_input=False, include_context=False)
    fields: dict[str, dict[str, list[Any]]] = {}
    for one in found[:MAX_EXAMINED]:
        location = one["loc"]
        field = str(location[0]) if location else ""
        branch = next((step for step in location[1:] if _is_branch(step)), "")
        fields.setdefault(field, {}).setdefault(str(branch), []).append(one)
    told: dict[str, list[str]] = {}
    for branches in fields.values():
        furthest = max(map(_reach, branches.values()))
        for errors in branches.values():
            if _reach(errors) == furthest:
                for one in errors:
                    texts = told.setdefault(_path(one["loc"]), [])
                    texts += [_said(one)] if _said(one) not in texts else []
    lines = [
        f"{where}: {' or '.join(texts)}" if where else texts[0] for where, texts in told.items()
    ]
    others = len(lines) - MAX_SHOWN + max(0, len(found) - MAX_EXAMINED)
    more = f" (and {others} more)" if len(lines) > MAX_SHOWN else ""
    param = next(iter(told), None) or None
    return ApiError(400, "; ".join(lines[:MAX_SHOWN]) + more, code="invalid_value", param=param)


def _reach(errors: Sequence[Any]) -> tuple[int, int]:
    """Return how deep and how far along a value the first error of a branch lies."""
    steps = [step for step in errors[0]["loc"] if not _is_branch(step)]
    return len(steps), max((step for step in steps if isinstance(step, int)), default=-1)


def _said(detail: Any) -> str:
    if detail["type"] == "extra_forbidden":
        return "unknown field"
    if detail["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return "expected an object"
    return str(detail["msg"]).removeprefix("Value error, ").replace("Input should be", "expected")


def _is_branch(step: str | int) -> bool:
    """Return whether a step of a place is a branch of a union, not a field or number."""
    if isinstance(step, int):
        return False
    return step in _BRANCHES or step[:1].isupper() or not step.isidentifier()


def _path(location: Sequence[str | int]) -> str:
    """Return "messages[0].content" for the names and numbers of a place in the body."""
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not _is_branch(step):
            path += f".{step}" if path else step
    return path[:200]
