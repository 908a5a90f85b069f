"""llama.cpp (the xllamacpp wheel) as a test peer, served on 127.0.0.1: tokenises, generates, looks.

Skips the test when the wheel is not installed.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as pil


class LlamaCpp:
    """One loaded model."""

    def __init__(self, address: str) -> None:
        self.connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=120)

    def tokenize(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Return ids without BOS or EOS."""
        request = {"content": text, "parse_special": parse_special, "add_special": False}
        return self.post("/tokenize", request)["tokens"]

    def next_token(self, prompt: list[int] | dict[str, Any], number: int = 20) -> dict[int, float]:
        """Return the log-probabilities of the likeliest next tokens.

        Args:
            prompt: ids, or what `with_pictures` returns.
        """
        request = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": number}
        answer = self.post("/completion", request | {"cache_prompt": False})
        found = answer["completion_probabilities"][0]["top_logprobs"]
        assert len(found) == number
        return {token["id"]: token["logprob"] for token in found}

    def with_pictures(self, text: str, pictures: Sequence[pil.Image]) -> dict[str, Any]:
        """Return a prompt in which each `<image>` of a text is a picture."""
        marker = self.post("/props", None)["media_marker"]
        data = [base64.b64encode(png(picture)).decode() for picture in pictures]
        return {"prompt_string": text.replace("<image>", marker), "multimodal_data": data}

    def post(self, path: str, data: dict[str, Any] | None) -> Any:
        try:
            response = self._request(path, data)
        except (BrokenPipeError, ConnectionResetError, http.client.RemoteDisconnected):
            self.connection.close()  # the server closes idle connections
            response = self._request(path, data)
        body = json.loads(response.read())
        assert response.status == 200, body
        return body

    def _request(self, path: str, data: dict[str, Any] | None) -> http.client.HTTPResponse:
        headers = {"Content-Type": "application/json"}
        if data is None:
            self.connection.request("GET", path)
        else:
            self.connection.request("POST", path, json.dumps(data).encode(), headers)
        return self.connection.getresponse()


def png(picture: pil.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


@contextmanager
def llama_cpp(
    path: Path, mmproj: Path | None = None, *, context_length: int = 512, embedding: bool = False
) -> Iterator[LlamaCpp]:
    """Serve one GGUF file and its vision half, on any free port of this machine only."""
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
    parameters.embedding = embedding
    if mmproj is not None:
        parameters.mmproj.path = str(mmproj)
        parameters.mmproj_use_gpu = False
    server = xllamacpp.Server(parameters)
    peer = LlamaCpp(server.listening_address)
    try:
        yield peer
    finally:
        peer.connection.close()
        del server
