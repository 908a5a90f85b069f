"""HTTP/1.1 as uvicorn speaks it, with time limits for clients that send or read too slowly, and a
bound on connections.

Without them a client that sends its headers a byte at a time, does not read its response, or opens
thousands of connections holds memory and file descriptors without end.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_HEADER_BYTES = 64 * 1024


def protocol_with(  # a class with short methods
    header_seconds: float, send_seconds: float, connections: int
) -> type[H11Protocol]:
    """Return the protocol class with these limits; see `visavis.serve.config.Limits`."""

    class Protocol(H11Protocol):
        """Closes a connection that is late, unread, or one too many."""

        header_timer: asyncio.TimerHandle | None = None
        read_timer: asyncio.TimerHandle | None = None

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
            self._stop_reading()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            """Note that the client reads more slowly than the response is made."""
            super().pause_writing()
            self._watch_reading(None)

        def resume_writing(self) -> None:
            """Note that the client has read most of what was waiting for it."""
            self._stop_reading()
            super().resume_writing()

        def _watch_reading(self, unread: int | None) -> None:
            """Drop the connection once nothing has been read for `send_seconds`."""
            left = self.transport.get_write_buffer_size()
            if unread is not None and left >= unread:
                self.transport.abort()
            else:
                self.read_timer = self.loop.call_later(send_seconds, self._watch_reading, left)

        def _stop_reading(self) -> None:
            if self.read_timer is not None:
                self.read_timer.cancel()
                self.read_timer = None

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
