"""llama.cpp (the xllamacpp wheel) as a test peer, served on 127.0.0.1: tokenises and generates.

Skips the test when the wheel is not installed.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


class LlamaCpp:
    """One loaded model."""

    def __init__(self, address: str) -> None:
        self.connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=120)

    def tokenize(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Return ids without BOS or EOS."""
        request = {"content": text, "parse_special": parse_special, "add_special": False}
        return self.post("/tokenize", request)["tokens"]

    def post(self, path: str, data: dict[str, Any]) -> dict[str, Any]:
        try:
            response = self._request(path, data)
        except (BrokenPipeError, ConnectionResetError, http.client.RemoteDisconnected):
            self.connection.close()  # the server closes idle connections
            response = self._request(path, data)
        body = json.loads(response.read())
        assert response.status == 200, body
        return body

    def _request(self, path: str, data: dict[str, Any]) -> http.client.HTTPResponse:
        headers = {"Content-Type": "application/json"}
        self.connection.request("POST", path, json.dumps(data).encode(), headers)
        return self.connection.getresponse()


@contextmanager
def llama_cpp(path: Path, *, context_length: int = 512) -> Iterator[LlamaCpp]:
    """Serve one GGUF file, on any free port of this machine only."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="needs the xllamacpp wheel (visavis[dev])")
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = 0
    parameters.n_ctx = context_length
    parameters.n_parallel = 1
    parameters.warmup = False
    parameters.cpuparams.n_threads = 1
    parameters.cpuparams_batch.n_threads = 1
    parameters.verbosity = 0
    server = xllamacpp.Server(parameters)
    peer = LlamaCpp(server.listening_address)
    try:
        yield peer
    finally:
        peer.connection.close()
        del server
