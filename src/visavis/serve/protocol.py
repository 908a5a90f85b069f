"""HTTP/1.1 as uvicorn speaks it, with a time limit for headers and a bound on connections.

Without them a client that sends its headers a byte at a time, or opens thousands of connections,
holds memory and file descriptors for as long as it likes.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_HEADER_BYTES = 64 * 1024


def protocol_with(header_seconds: float, connections: int) -> type[H11Protocol]:
    """Return the protocol class with these limits."""

    class Protocol(H11Protocol):
        """Closes a connection whose headers are late, or that is one too many."""

        header_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > connections:
                self.send_400_response("Too many connections.")
            else:
                self._start()

        def data_received(self, data: bytes) -> None:
            if self.header_timer is None and self._between_requests():
                self._start()
            super().data_received(data)
            if not self._between_requests():
                self._stop()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        def _between_requests(self) -> bool:
            return self.cycle is None or self.cycle.response_complete

        def _start(self) -> None:
            self.header_timer = self.loop.call_later(header_seconds, self._late)

        def _stop(self) -> None:
            if self.header_timer is not None:
                self.header_timer.cancel()
                self.header_timer = None

        def _late(self) -> None:
            self.header_timer = None
            if self._between_requests() and not self.transport.is_closing():
                self.transport.close()

    return Protocol
