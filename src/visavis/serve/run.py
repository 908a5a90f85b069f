"""Runs the application with uvicorn: limits of connections, logs, and an end that loses nothing."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import uvicorn

from visavis.serve.app import create_app
from visavis.serve.config import ServerConfig
from visavis.serve.protocol import MAX_HEADER_BYTES, protocol_with

if TYPE_CHECKING:
    from visavis.api import Model

KEEP_ALIVE_SECONDS = 75
_FIELDS = ("request_id", "model", "status", "ms")


class Server(uvicorn.Server):
    """uvicorn's server; while it drains, new requests are answered with status 503."""

    def __init__(self, config: uvicorn.Config, service: Any) -> None:
        super().__init__(config)
        self.service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let unfinished requests finish, within the drain time, then close."""
        self.service.draining = True
        await super().shutdown(sockets)


def make_server(config: ServerConfig, **more: Any) -> Server:
    """Return a server of the application that `create_app(config, …)` makes."""
    app = create_app(config, **more)
    limits = config.limits
    settings = uvicorn.Config(
        app,
        http=protocol_with(limits.header_seconds, limits.send_seconds, limits.connections),
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=max(1, round(config.drain_seconds)),
        # Proxies' headers say what a client likes: the address of the connection counts.
        proxy_headers=False,
    )
    return Server(settings, app.state.service)


def run(
    config: ServerConfig,
    listening: socket.socket,
    *,
    ready: Callable[[str], None],
    models: Mapping[str, Model] | None = None,
    examples: Sequence[str] = (),
) -> None:
    """Serve on a socket until SIGTERM or Ctrl-C; see `visavis.serve.run_server`."""
    set_up_logs(config.log_format)
    server = make_server(config, models=models, examples=examples)
    host, port = listening.getsockname()[:2]
    ready(f"http://{f'[{host}]' if ':' in host else host}:{port}/")
    asyncio.run(server.serve(sockets=[listening]))


def set_up_logs(form: str) -> None:
    """Send the server's log to stderr, as text or one JSON object a line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    for name in ("visavis", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO if name == "visavis" else logging.WARNING)


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as a line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in _FIELDS if hasattr(record, name)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class TextLines(logging.Formatter):
    """Time, level, message, and of requests their time and id."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as a line; what clients sent cannot start a new one."""
        line = super().format(record)
        if hasattr(record, "request_id"):
            line = line.replace("\n", " ").replace("\r", " ")
            return f"{line} {record.ms} ms {record.request_id}"  # type: ignore[attr-defined]
        return line
