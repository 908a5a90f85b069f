"""The API's description, and requests that schemathesis makes of it: none may break the server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.fakes import tiny_model, write_pictures
from tests.serve.serving import client_of, serving
from visavis import Index
from visavis.serve.app import API


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("schema")
    with Index(folder / "test.idx", tiny_model()) as index:
        index.add(write_pictures(folder / "images", 3))
    settings = {
        "indexes": {"photos": folder / "test.idx"},
        "limits": {"new_tokens": 8, "request_seconds": 30},
    }
    with serving(settings) as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[httpx.Client]:
    with client_of(address) as client:
        yield client


def test_the_description_names_every_endpoint_and_field(client: httpx.Client) -> None:
    found = client.get("/openapi.json").json()
    for one in API:
        path = one.path.replace(":path", "").replace(":int", "")
        operation = found["paths"][path][one.method.lower()]
        assert operation["summary"], path
        assert {"200", "400", "429", "503"} <= operation["responses"].keys()
    names = [one["operationId"] for each in found["paths"].values() for one in each.values()]
    assert len(set(names)) == len(names)
    fields = found["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "max_completion_tokens", "response_format", "logprobs"} <= fields.keys()


def test_the_page_of_the_description_needs_nobody_else(client: httpx.Client) -> None:
    page = client.get("/docs")
    assert page.status_code == 200
    assert "http://" not in page.text and "https://" not in page.text
    assert "<script" not in page.text
    for path in ("/v1/chat/completions", "/api/embed", "/v2/rerank", "/v1/search"):
        assert path in page.text
    assert client.get("/static/docs.css").status_code == 200


@pytest.mark.slow
def test_what_schemathesis_sends(address: str) -> None:
    schemathesis: Any = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings

    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    counted: dict[int, int] = {}
    wanted = [
        schemathesis.checks.not_a_server_error,
        schemathesis.specs.openapi.checks.status_code_conformance,
        schemathesis.specs.openapi.checks.content_type_conformance,
        schemathesis.specs.openapi.checks.response_schema_conformance,
    ]
    modes = list(schemathesis.GenerationMode)

    def send_all(operation: Any, mode: Any) -> None:
        @settings(
            max_examples=40,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )
        @given(operation.as_strategy(generation_mode=mode))
        def send(case: Any) -> None:
            if mode is modes[0]:  # most random names are a 404 and no more
                known = {"index": "photos", "model": "tiny", "item": 1}
                for name in case.path_parameters or {}:
                    case.path_parameters[name] = known[name]
                if isinstance(case.body, dict):
                    case.body |= {one: known[one] for one in known if one in case.body}
            response = case.call(base_url=address, timeout=60)
            counted[response.status_code] = counted.get(response.status_code, 0) + 1
            case.validate_response(response, checks=wanted)

        send()

    for result in schema.get_all_operations():
        operation = result.ok()
        # There is no wrong GET without fields.
        for mode in modes if operation.body else modes[:1]:
            send_all(operation, mode)
    assert sum(counted.values()) > 1000, counted
    assert counted.get(200, 0) > 100, counted
    assert not any(status >= 500 for status in counted), counted
