"""Chat templates rendered by jinja, in a sandbox and in a child process with limits.

A template is a program of whoever wrote the checkpoint. The sandbox keeps it from files and
attributes; the limits of `bounded.call` keep it from endless loops and endless memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Environment, Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from visavis.errors import CheckpointError, InputError
from visavis.processing import bounded
from visavis.processing.jinja_extensions import Generation, raise_exception, to_json

MAX_SOURCE = 1 << 20  # characters of a template
MAX_ADDED = 1 << 24  # characters of a rendered text beyond those of the messages
SECONDS, MEMORY = 5.0, 256 << 20  # of one rendering
# What running a template can raise: its own refusals, and mistakes of its author.
_FAILURES = (
    TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
)


def check_syntax(source: str) -> None:
    """Check that a source is jinja; nothing of it is run or computed.

    Raises:
        CheckpointError: it is too long, nested too deeply, or not jinja.
    """
    if len(source) > MAX_SOURCE:
        raise CheckpointError(
            f"the checkpoint's chat template has {len(source)} characters, expected at most "
            f"{MAX_SOURCE}; the file is damaged or is no chat template"
        )
    try:
        _environment().parse(source)
    except RecursionError:
        raise CheckpointError(
            "the checkpoint's chat template is nested too deeply to be read; it is no usable chat "
            "template: copy it from the model's source again"
        ) from None


def render_bounded(source: str, values: Mapping[str, Any]) -> str:
    """Return the text of a template with values, which are JSON.

    Raises:
        TemplateFailureError: the template refuses the values, or needs too much time or memory.
    """
    try:
        refused, text = bounded.call(
            "visavis.processing.jinja_sandbox:render",
            source,
            dict(values),
            seconds=SECONDS,
            memory=MEMORY,
        )
    except bounded.BoundExceededError as error:
        raise TemplateFailureError(f"rendering it was stopped: {error}") from None
    if refused is not None:
        raise TemplateFailureError(refused)
    return text.decode("utf-8", "surrogatepass")


class TemplateFailureError(InputError):
    """A template refuses its values, or needs too much time or memory."""


def render(data: bytes, source: str, values: dict[str, Any]) -> tuple[str | None, bytes]:
    """Return why a template refuses values, or None, and the rendered text; runs in the child."""
    try:
        text = _compiled(source).render(values)
    except _FAILURES as error:
        return str(error)[:1000] or type(error).__name__, b""
    most = MAX_ADDED + len(json.dumps(values))
    if len(text) > most:
        return f"it writes {len(text)} characters, expected at most {most}", b""
    return None, text.encode("utf-8", "surrogatepass")


@lru_cache(maxsize=8)
def _compiled(source: str) -> Template:
    return _environment().from_string(source)


def _environment() -> Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
