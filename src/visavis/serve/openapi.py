"""The OpenAPI document of the server, generated from its endpoints, and a page that shows it."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import visavis
from visavis.serve.http import Endpoint

# Statuses that an endpoint with a body may have, besides 200.
_ERRORS = {
    "400": "The request is malformed or holds something that cannot be used.",
    "401": "No valid API key.",
    "403": "The request comes from another web site.",
    "404": "No such model, index or item.",
    "408": "The body took too long to arrive.",
    "413": "The request is larger than the server's limits, or than the free memory.",
    "429": "Too many requests wait; see the Retry-After header.",
    "500": "Internal error.",
    "503": "The model cannot be loaded, or the server is stopping.",
    "504": "The request took too long.",
}
_PLAIN: dict[type, dict[str, Any]] = {  # responses that are not JSON
    str: {"text/plain": {"schema": {"type": "string"}}},
    bytes: {"image/jpeg": {"schema": {"type": "string", "format": "binary"}}},
}
_PARAMETER = re.compile(r"{(\w+)(?::(\w+))?}")


def document(endpoints: Sequence[Endpoint], *, keyed: bool) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of some endpoints.

    Args:
        keyed: whether the server asks for API keys.
    """
    models: dict[tuple[type[BaseModel], Any], None] = {}
    for one in endpoints:
        if one.request is not None:
            models[one.request, "validation"] = None
        if one.response not in _PLAIN:
            models[one.response, "serialization"] = None
        models[one.error, "serialization"] = None
    names, definitions = models_json_schema(
        list(models), ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, Any] = {}
    for one in endpoints:
        path = _PARAMETER.sub(r"{\1}", one.path)
        paths.setdefault(path, {})[one.method.lower()] = _operation(one, names)
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "visavis",
            "version": visavis.__version__,
            "description": "Chat, embeddings, reranking and search of vision-language models.",
        },
        "paths": paths,
        "components": {"schemas": definitions.get("$defs", {})},
    }
    if keyed:
        scheme = {"type": "http", "scheme": "bearer"}
        found["components"]["securitySchemes"] = {"key": scheme}
        found["security"] = [{"key": []}]
    return found


def _operation(one: Endpoint, names: dict[Any, Any]) -> dict[str, Any]:
    content: dict[str, Any] = _PLAIN.get(one.response) or {
        "application/json": {"schema": names[one.response, "serialization"]}
    }
    if one.streams:
        content[one.streams] = {}  # OpenAPI 3.1 cannot describe the form of events
    error = {"application/json": {"schema": names[one.error, "serialization"]}}
    operation: dict[str, Any] = {
        "summary": one.summary,
        "tags": [one.tag],
        "operationId": re.sub(r"\W+", "_", f"{one.method}{one.path}").strip("_").lower(),
        "responses": {
            "200": {"description": "Success.", "content": content},
            **{status: {"description": text, "content": error} for status, text in _ERRORS.items()},
        },
    }
    parameters = [
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": {"type": "integer", "minimum": 0} if kind == "int" else {"type": "string"},
        }
        for name, kind in _PARAMETER.findall(one.path)
    ]
    if parameters:
        operation["parameters"] = parameters
    if one.request is not None:
        body = {"application/json": {"schema": names[one.request, "validation"]}}
        operation["requestBody"] = {"required": True, "content": body}
    return operation


def page(found: dict[str, Any]) -> str:
    """Return a web page that lists the endpoints of an OpenAPI document and their fields."""
    schemas = found["components"]["schemas"]
    sections: dict[str, list[str]] = {}
    for path, methods in found["paths"].items():
        for method, operation in methods.items():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json")
            fields = _fields(body["schema"], schemas) if body else ""
            sections.setdefault(operation["tags"][0], []).append(
                f"<h3><code>{method.upper()} {html.escape(path)}</code></h3>"
                f"<p>{html.escape(operation['summary'])}</p>{fields}"
            )
    parts = "".join(f"<h2>{tag}</h2>{''.join(texts)}" for tag, texts in sections.items())
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        '<link rel="stylesheet" href="/static/docs.css"><title>visavis API</title>'
        f"<main><h1>visavis {found['info']['version']} API</h1><p>The whole description, for "
        f'programs: <a href="/openapi.json">openapi.json</a>.</p>{parts}</main></html>'
    )


def _fields(schema: dict[str, Any], schemas: dict[str, Any]) -> str:
    found = schemas[schema["$ref"].rpartition("/")[2]]
    required = found.get("required", [])
    rows = "".join(
        f"<tr><td><code>{html.escape(name)}</code>{' (required)' if name in required else ''}</td>"
        f"<td>{html.escape(_type(one))}</td><td>{html.escape(one.get('description', ''))}</td></tr>"
        for name, one in found["properties"].items()
    )
    return f"<table><tr><th>field</th><th>type</th><th></th></tr>{rows}</table>"


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type(one) for one in schema["anyOf"]))
    if "enum" in schema:
        return " or ".join(map(repr, schema["enum"]))
    if "const" in schema:
        return repr(schema["const"])
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return str(schema.get("type", "any"))
