"""Serves a model and an index to a browser on this computer. The web packages are optional, so
they are imported only here, when a page is wanted; knows nothing of what the page does.
"""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from visavis.errors import InputError

if TYPE_CHECKING:
    from visavis.api import Model
    from visavis.index import Index

HOST = "127.0.0.1"


def serve_page(
    model: Model,
    index: Index,
    *,
    port: int,
    examples: Sequence[str] = (),
    ready: Callable[[str], None],
) -> None:
    """Serve the page on 127.0.0.1 until Ctrl-C.

    Args:
        port: taken if free; otherwise a free one is chosen.
        examples: searches that the page proposes.
        ready: told the page's address once it can be opened.

    Raises:
        InputError: the packages of the extra `serve` are not installed.
    """
    require_web_packages()
    import uvicorn

    from visavis.serve.app import create_app

    listening = listen(port)
    app = create_app(model, index, examples=examples)
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1, server_header=False)
    )
    ready(f"http://{HOST}:{listening.getsockname()[1]}/")
    server.run(sockets=[listening])


def require_web_packages() -> None:
    """Raise an InputError that names the extra if the web packages are not installed."""
    packages = {
        "starlette": "starlette",
        "uvicorn": "uvicorn",
        "python_multipart": "python-multipart",
    }
    for module, package in packages.items():
        if importlib.util.find_spec(module) is None:
            raise InputError(
                f"the page needs the package {package}, which is not installed; run "
                "`pip install 'visavis[serve]'`, or leave the page out with --no-serve"
            )


def listen(port: int) -> socket.socket:
    """Return a socket that listens on 127.0.0.1, on `port` or, if that is taken, a free one."""
    for wanted in (port, 0):
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((HOST, wanted))
            listening.listen()
            return listening
        except (OSError, OverflowError):
            listening.close()
    raise InputError(f"no free port on {HOST}; close some programs that listen there")
