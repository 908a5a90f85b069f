"""Additions to jinja that chat templates expect: the tag `generation`, and functions."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context

GENERATION_MARKS = "generation_marks"  # template variable: two texts, written around each block


def to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """Return JSON without escaping, unlike jinja's own filter `tojson`."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def raise_exception(message: str) -> NoReturn:
    """Refuse the messages, from within a template."""
    raise TemplateError(message)


class Generation(Extension):
    """`{% generation %}…{% endgeneration %}` around the answers in a chat template.

    A block has its own scope, as in transformers.
    """

    tags = {"generation"}  # noqa: RUF012 - jinja2's own attribute

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("mark", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def mark(self, context: Context, caller: Any) -> str:
        """Return the rendered block between the marks of the template variable."""
        opening, closing = context.get(GENERATION_MARKS, ("", ""))
        return f"{opening}{caller()}{closing}"
