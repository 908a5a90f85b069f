"""A real server on a loopback socket, in a thread of the test."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx
from PIL import Image

from tests.fakes import tiny_model
from visavis import Model
from visavis.serve import listen
from visavis.serve.config import make_config
from visavis.serve.run import Server, make_server


@contextmanager
def serving(
    settings: Mapping[str, Any] | None = None,
    *,
    models: Mapping[str, Model] | None = None,
    **more: Any,
) -> Iterator[tuple[str, Server]]:
    """Yield the address of a running server and the server; one tiny model unless others are."""
    models = {"tiny": tiny_model()} if models is None else models
    config = make_config({"models": {name: name for name in models}, **(settings or {})})
    server = make_server(config, models=models, **more)
    listening = listen(0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.005)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", server
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def client_of(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
        yield client


def png(image: Image.Image) -> bytes:
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return encoded.getvalue()


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def data_uri(image: Image.Image) -> str:
    return f"data:image/png;base64,{base64_of(png(image))}"
