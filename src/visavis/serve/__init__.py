"""The server: chat, embeddings, reranking and search behind the APIs that clients speak.

The web packages are optional, so they are imported only when a server is wanted.
"""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from visavis.errors import InputError

if TYPE_CHECKING:
    from visavis.api import Model
    from visavis.index import Index
    from visavis.serve.config import ServerConfig

HOST = "127.0.0.1"
PACKAGES = {  # module -> package
    "starlette": "starlette",
    "uvicorn": "uvicorn",
    "python_multipart": "python-multipart",
    "prometheus_client": "prometheus-client",
}


def run_server(
    config: ServerConfig,
    *,
    ready: Callable[[str], None],
    models: Mapping[str, Model] | None = None,
    examples: Sequence[str] = (),
    other_port: bool = False,
) -> None:
    """Serve until SIGTERM or Ctrl-C; unfinished requests then have `drain_seconds`.

    Args:
        ready: told the address once the server listens.
        models: models that are loaded already, by their names in `config.models`.
        examples: searches that the page proposes.
        other_port: take a free port where the one in `config` is taken.

    Raises:
        InputError: the port is taken, or packages of the extra `serve` are not installed.
    """
    require_web_packages()
    from visavis.serve.run import run

    listening = listen(config.port, config.host, other=other_port)
    run(config, listening, ready=ready, models=models, examples=examples)


def serve_page(
    model: Model,
    index: Index,
    *,
    port: int,
    examples: Sequence[str] = (),
    ready: Callable[[str], None],
) -> None:
    """Serve the web page of an index, and all APIs, on 127.0.0.1 until Ctrl-C.

    Args:
        port: taken if free; otherwise a free one is chosen.
        examples: searches that the page proposes.
        ready: told the page's address once it can be opened.

    Raises:
        InputError: the packages of the extra `serve` are not installed.
    """
    require_web_packages()
    from visavis.serve.config import make_config

    name = model.name.replace(" ", "-")
    config = make_config({"models": {name: name}, "indexes": {"default": index.path}, "port": port})
    run_server(config, ready=ready, models={name: model}, examples=examples, other_port=True)


def require_web_packages() -> None:
    """Raise an InputError that names the extra if the web packages are not installed."""
    for module, package in PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            raise InputError(
                f"the server needs the package {package}, which is not installed; run "
                "`pip install 'visavis[serve]'`, or leave the page out with --no-serve"
            )


def listen(port: int, host: str = HOST, *, other: bool = True) -> socket.socket:
    """Return a socket that listens on a port, or if that is taken and `other` says so, a free one.

    Raises:
        InputError: the port is taken, or the host is none of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for wanted in (port, 0) if other else (port,):
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, wanted))
            listening.listen(1024)
            return listening
        except (OSError, OverflowError):
            listening.close()
    if other:
        raise InputError(f"no free port on {host}; close some programs that listen there")
    raise InputError(
        f"cannot listen on {host}, port {port}; it is taken by another program, needs more rights, "
        "or the address is none of this machine. Choose another --port"
    )
