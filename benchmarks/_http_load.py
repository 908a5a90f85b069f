"""Clients that cost little: HTTP/1.1 over plain sockets of one event loop, a request at a time.

A client library would take more time than a small model; what is measured is the server. Knows no
engine and no model.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass
class Answer:
    """One response: its status, body, seconds from the request to the last byte, and what was
    sent."""

    status: int
    body: bytes
    seconds: float
    sent: Any
    retry_after: float = 0.0


class Connection:
    """One kept-alive connection."""

    def __init__(self, address: str) -> None:
        host, _, port = address.removeprefix("http://").partition(":")
        self.host, self.port = host, int(port)
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def post(self, path: str, data: Any) -> Answer:
        """Send a JSON body; return the response."""
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection(
                self.host, self.port, limit=2**26
            )
        assert self.reader is not None
        body = json.dumps(data).encode()
        started = time.perf_counter()
        self.writer.write(
            f"POST {path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        lines = head.split("\r\n")
        fields = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
        if "content-length" in fields:
            found = await self.reader.readexactly(int(fields["content-length"]))
        else:
            found = b"".join([chunk async for chunk in self._chunks()])
        answer = Answer(int(lines[0].split()[1]), found, time.perf_counter() - started, data)
        answer.retry_after = float(fields.get("retry-after", 0))
        if fields.get("connection") == "close":
            self.close()
        return answer

    async def _chunks(self) -> AsyncIterator[bytes]:
        assert self.reader is not None
        while size := int((await self.reader.readline()).split(b";")[0], 16):
            yield (await self.reader.readexactly(size + 2))[:-2]
        await self.reader.readline()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        self.reader = self.writer = None


def requests_at_once(
    address: str,
    clients: int,
    requests: Iterator[tuple[str, Any]],
    check: Callable[[Answer], None],
) -> float:
    """Let clients send all requests, each one at a time; return the seconds it took."""

    async def client(connection: Connection) -> None:
        for path, data in requests:
            check(await connection.post(path, data))

    async def run() -> float:
        connections = [Connection(address) for _ in range(clients)]
        started = time.perf_counter()
        await asyncio.gather(*map(client, connections))
        seconds = time.perf_counter() - started
        for connection in connections:
            connection.close()
        return seconds

    return asyncio.run(run())
