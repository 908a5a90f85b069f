"""Hostile and broken requests, over raw sockets where a client would be too polite: each gets the
right status in the right shape, and the requests of others are unharmed."""

from __future__ import annotations

import io
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.fakes import picture, tiny_model
from tests.serve.serving import base64_of, client_of, data_uri, png, serving
from visavis.errors import OutOfMemoryError
from visavis.inputs import Prompt
from visavis.serve.run import Server

LIMITS = {
    "body_bytes": 4 * 2**20,
    "body_seconds": 1.0,
    "header_seconds": 1.0,
    "send_seconds": 2.0,
    "images": 8,
    "image_pixels": 1_000_000,
    "request_pixels": 3_000_000,
    "connections": 64,
}


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[str, Server]]:
    with serving({"limits": LIMITS}) as found:
        yield found


@pytest.fixture(scope="module")
def address(running: tuple[str, Server]) -> str:
    return running[0]


@pytest.fixture
def client(address: str) -> Iterator[httpx.Client]:
    """A client; after every test the server still answers it rightly."""
    with client_of(address) as client:
        yield client
        response = client.post("/v1/embeddings", json={"input": "a cat"})
        assert response.status_code == 200
        vector = response.json()["data"][0]["embedding"]
        assert vector == pytest.approx(tiny_model().embed(["a cat"])[0].tolist(), abs=1e-5)


def connected(address: str) -> socket.socket:
    host, _, port = address.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def everything(sock: socket.socket) -> bytes:
    found = b""
    while chunk := sock.recv(65536):
        found += chunk
    return found


def head(length: int, path: str = "/v1/embeddings", more: str = "") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\n{more}\r\n"
    ).encode()


PATHS = ["/v1/chat/completions", "/v1/responses", "/v1/embeddings", "/v2/embed", "/v1/rerank",
         "/v1/multimodalembeddings", "/v1/score", "/api/chat", "/api/generate", "/api/embed",
         "/api/embeddings", "/api/show", "/v1/search"]  # fmt: skip
BODIES = {
    "nothing": b"",
    "half an object": b'{"input": ["a',
    "a list": b"[]",
    "a number": b"3",
    "null": b"null",
    "not UTF-8": b'{"input": "\xff\xfe"}',
    "a lone surrogate": b'{"input": "\\ud800", "model": "tiny"}',
    "NaN": b'{"input": "a", "temperature": NaN}',
    "infinity": b'{"temperature": 1e999, "dimensions": -Infinity}',
    "deep lists": b'{"input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "a huge number": b'{"dimensions": ' + b"9" * 100_000 + b"}",
    "wrong types": b'{"model": 3, "input": {"a": []}, "messages": 4, "query": [], "texts": {}}',
    "unknown keys": b'{"__class__": "x", "model": "tiny"}',
    "many unknown keys": json.dumps({f"k{n}": n for n in range(20_000)}).encode(),
    "more keys than are counted": json.dumps({f"k{n}": n for n in range(200_000)}).encode(),
    "a NUL": b'{"model": "a\\u0000b", "input": "x"}',
    "a path as model": b'{"model": "../../etc/passwd", "input": "x", "messages": []}',
}


SLOW_BODIES = ("many unknown keys", "more keys than are counted")


@pytest.mark.parametrize(
    "name",
    [pytest.param(one, marks=pytest.mark.slow) if one in SLOW_BODIES else one for one in BODIES],
)
def test_malformed_bodies(client: httpx.Client, name: str) -> None:
    for path in PATHS:
        response = client.post(path, content=BODIES[name])
        assert response.status_code in (400, 404), (path, response.text)
        found = response.json()
        text = found.get("message") or found.get("detail") or found["error"]
        assert "Traceback" not in response.text and "/" + "src/" not in response.text
        assert text


@pytest.mark.parametrize(
    "body",
    [
        {"input": [{"image": data_uri(picture(1))}] * 10_000},
        {"input": ["x"] * 2049},
        {"messages": [{"role": "user", "content": "x"}] * 1025},
        {"input": "x", "dimensions": 0},
        {"input": "x", "dimensions": 2**40},
        {"input": "x", "model": "m" * 300},
        {"input": "x" * 3_000_000},
    ],
)
def test_too_many_of_anything(client: httpx.Client, body: dict[str, Any]) -> None:
    assert client.post("/v1/embeddings", json=body).status_code in (400, 413)


def _png_of_size(width: int, height: int) -> bytes:
    """Return a PNG whose header claims a size, and whose data is a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def _bmp_of_zeros() -> bytes:
    encoded = io.BytesIO()
    Image.new("L", (1200, 1100)).save(encoded, "PNG")
    return encoded.getvalue()


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
FILES = {
    "empty": (b"", 400),
    "noise": (b"\x00\x01\x02" * 50, 400),
    "SVG": (SVG, 400),
    "HTML": (b"<!doctype html><html></html>", 400),
    "truncated": (png(picture(1))[:60], 400),
    "cut in its data": (png(picture(1))[:-40], 400),
    "bomb": (_png_of_size(60_000, 60_000), 400),
    "large size, no data": (_png_of_size(900, 900), 400),
    "more pixels than this server takes": (_bmp_of_zeros(), 413),
    "PDF as image": (b"%PDF-1.7\n" + b"0" * 100, 400),
    "GIF and script": (b"GIF89a/*<script>*/=1;" + b"\x00" * 20, 400),
}


@pytest.mark.parametrize("name", FILES)
def test_hostile_images(client: httpx.Client, name: str) -> None:
    data, status = FILES[name]
    uri = f"data:image/png;base64,{base64_of(data)}"
    part = {"type": "image_url", "image_url": {"url": uri}}
    chat = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 2}
    for path, body in (
        ("/v1/chat/completions", chat),
        ("/v1/embeddings", {"input": [{"image": uri}]}),
        ("/v2/embed", {"images": [uri]}),
        ("/v1/rerank", {"query": "x", "documents": ["y", {"image": uri}]}),
        ("/api/embed", {"model": "tiny", "images": [base64_of(data)]}),
        ("/api/chat", {"model": "tiny", "stream": False, "messages": [
            {"role": "user", "content": "x", "images": [base64_of(data)]}]}),
    ):  # fmt: skip
        response = client.post(path, json=body)
        assert response.status_code == status, (path, response.text)


def test_hostile_videos_and_documents(client: httpx.Client) -> None:
    pytest.importorskip("av")
    pytest.importorskip("pypdfium2")
    files = [
        ("video_url", "url", "video/mp4", b"\x00\x00\x00\x18ftypmp42" + b"\x00" * 64),
        ("video_url", "url", "video/mp4", b"not a video"),
        ("file", "file_data", "application/pdf", b"%PDF-1.4\nbroken"),
        ("file", "file_data", "application/pdf", b"no PDF"),
        ("file", "file_data", "application/pdf", _locked_pdf()),
    ]
    for kind, field, media, data in files:
        part = {"type": kind, kind: {field: f"data:{media};base64,{base64_of(data)}"}}
        body = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 2}
        response = client.post("/v1/chat/completions", json=body)
        assert response.status_code == 400, (kind, response.text)


def _locked_pdf() -> bytes:
    """Return a document that asks for a password."""
    return (
        b"%PDF-1.6\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n"
        b"2 0 obj<</Type/Pages/Kids[]/Count 0>>endobj\n"
        b"3 0 obj<</Filter/Standard/V 2/R 3/Length 128/P -44/O("
        + b"o" * 32 + b")/U(" + b"u" * 32 + b")>>endobj\n"
        b"trailer<</Root 1 0 R/Encrypt 3 0 R/ID[(a)(a)]>>\n%%EOF"
    )  # fmt: skip


def test_pixels_of_all_images_of_a_request_are_bounded(client: httpx.Client) -> None:
    image = Image.new("L", (999, 999))
    for count, status in ((3, 200), (4, 413)):
        body = {"input": [{"image": data_uri(image)}] * count}
        assert client.post("/v1/embeddings", json=body).status_code == status
    many = [{"type": "image_url", "image_url": data_uri(picture(1))}] * 9
    body = {"messages": [{"role": "user", "content": many}]}
    assert client.post("/v1/embeddings", json=body).status_code == 413


def test_a_body_that_is_too_large(client: httpx.Client, address: str) -> None:
    body = b'{"input": "' + b"x" * int(LIMITS["body_bytes"]) + b'"}'
    assert client.post("/v1/embeddings", content=body).status_code == 413
    chunks = iter([body[start : start + 65536] for start in range(0, len(body), 65536)])
    assert client.post("/v1/embeddings", content=chunks).status_code == 413  # no Content-Length
    for length in ("-1", "1e9", "99999999999999999999999", "0x10"):
        with closing(connected(address)) as sock:
            request = head(0).replace(b"Content-Length: 0", f"Content-Length: {length}".encode())
            sock.sendall(request)
            assert everything(sock)[9:12] in (b"400", b"413"), length


def test_slow_headers_and_slow_bodies_are_cut_off(client: httpx.Client, address: str) -> None:
    slow: list[socket.socket] = []
    for sent in (b"", b"POST /v1/embeddings HTTP/1.1\r\nHost: 127.0.0.1\r\nX-A: "):
        sock = connected(address)
        sock.sendall(sent)
        slow.append(sock)
    body = connected(address)
    body.sendall(head(1000) + b'{"inp')
    kept = connected(address)  # a second request on a connection that was kept open
    kept.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    first = b""
    while not first.endswith(b"}}"):  # the head and the body may come apart
        first += kept.recv(65536)
    assert first.startswith(b"HTTP/1.1 200")
    kept.sendall(b"GET /healthz HTTP/1.1\r\nHo")
    started = time.monotonic()
    while time.monotonic() - started < 0.5:  # a byte now and then does not help
        for sock in slow[1:]:
            sock.sendall(b"a")
        time.sleep(0.1)
    assert everything(body).startswith(b"HTTP/1.1 408")
    for sock in [*slow, kept]:
        assert everything(sock) == b""
        sock.close()
    body.close()


def test_a_flood_of_headers(client: httpx.Client, address: str) -> None:
    with closing(connected(address)) as sock:
        lines = b"".join(b"X-%d: %s\r\n" % (n, b"a" * 100) for n in range(2000))
        try:
            sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n" + lines + b"\r\n")
            assert everything(sock)[9:12] == b"400"
        except ConnectionError:
            pass  # closed before all was sent


@pytest.mark.slow
def test_too_many_connections_are_refused_and_others_served(address: str) -> None:
    with client_of(address) as client:
        client.get("/healthz")  # its connection is open
        many = [connected(address) for _ in range(80)]
        refused = 0
        for sock in many:
            sock.settimeout(0.02)
            try:
                refused += sock.recv(100).startswith(b"HTTP/1.1 400")
            except OSError:
                continue
        assert client.get("/healthz").status_code == 200
        assert 10 <= refused <= 30
        for sock in many:
            sock.close()


@pytest.mark.parametrize(
    "request_",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/embeddings HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n"
        b"Content-Length: 3\r\n\r\nzzz\r\n",
        b"POST /v1/embeddings HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"ffffffffffffffffffff\r\n",
        b"GET /%00/%ff/..%2f..%2fetc HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n",
        b"GET /static/..%2f..%2fapp.py HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n",
        b"GET /v1/models HTTP/1.0\r\n\r\n",
    ],
)
def test_requests_that_are_not_http(client: httpx.Client, address: str, request_: bytes) -> None:
    with closing(connected(address)) as sock:
        sock.sendall(request_)
        sock.shutdown(socket.SHUT_WR)
        found = everything(sock)
    assert found == b"" or found[9:12] in (b"400", b"404", b"413"), found[:200]


def idle(server: Server) -> bool:
    """Return whether the model is done with everything and holds nothing."""
    served = server.service.pool.entries["tiny"].served
    assert served is not None
    engine: Any = served.scheduler.engine
    if server.service.pool.entries["tiny"].users:
        return False
    return served.scheduler.idle and not engine.active and not engine.waiting


def until_idle(server: Server) -> None:
    deadline = time.monotonic() + 20
    while not idle(server) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert idle(server)


LONG = {"messages": [{"role": "user", "content": "Go"}], "max_tokens": 450}
REFUSED = {"messages": [{"role": "user", "content": "long " * 300}], "max_tokens": 4}


@pytest.mark.parametrize(
    "after",
    [0.0, 0.01, *(pytest.param(one, marks=pytest.mark.slow) for one in (0.002, 0.05, 0.2))],
)
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {**LONG, "stream": True}),
        ("/v1/chat/completions", LONG),
        ("/v1/chat/completions", REFUSED),
        ("/v1/chat/completions", {**LONG, "n": 4}),
        ("/v1/embeddings", {"input": [f"text {n}" for n in range(2000)]}),
        ("/api/chat", {"model": "tiny", "messages": LONG["messages"]}),
    ],
)
def test_clients_that_leave_at_any_moment(
    client: httpx.Client, running: tuple[str, Server], path: str, body: Any, after: float
) -> None:
    address, server = running
    encoded = json.dumps(body).encode()
    for abrupt in (False, True):
        sock = connected(address)
        sock.sendall(head(len(encoded), path) + encoded)
        time.sleep(after)
        if abrupt:  # a reset instead of a farewell
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
    until_idle(server)


def test_a_client_that_closes_its_half_gets_no_more(
    client: httpx.Client, running: tuple[str, Server]
) -> None:
    address, server = running
    encoded = json.dumps({**LONG, "stream": True}).encode()
    with closing(connected(address)) as sock:
        sock.sendall(head(len(encoded), "/v1/chat/completions") + encoded)
        sock.shutdown(socket.SHUT_WR)
        everything(sock)
    until_idle(server)


@pytest.mark.slow
def test_others_are_answered_rightly_while_many_misbehave(
    running: tuple[str, Server],
) -> None:
    address, server = running
    stop = threading.Event()

    def misbehave(number: int) -> None:
        encoded = json.dumps({**(REFUSED if number % 2 else LONG), "stream": True}).encode()
        while not stop.is_set():
            try:
                with closing(connected(address)) as sock:
                    sock.sendall(head(len(encoded), "/v1/chat/completions") + encoded)
                    time.sleep(0.01 * number)
            except OSError:
                continue

    threads = [threading.Thread(target=misbehave, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    expected = tiny_model().chat("Come", max_new_tokens=24).text
    vectors = tiny_model().embed(["a cat", "two dogs"])
    try:
        with client_of(address) as client:
            for _ in range(15):
                body: dict[str, Any] = {
                    "messages": [{"role": "user", "content": "Come"}],
                    "max_tokens": 24,
                }
                answer = client.post("/v1/chat/completions", json=body).json()
                assert answer["choices"][0]["message"]["content"] == expected
                found = client.post("/v1/embeddings", json={"input": ["a cat", "two dogs"]}).json()
                for one, vector in zip(found["data"], vectors, strict=True):
                    assert one["embedding"] == pytest.approx(vector.tolist(), abs=1e-5)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    until_idle(server)


@pytest.mark.slow
def test_a_client_that_does_not_read_is_let_go(
    client: httpx.Client, running: tuple[str, Server]
) -> None:
    """Its stream fills the buffers of both sides; then it has `send_seconds`."""
    address, server = running
    before = len(server.server_state.connections)
    encoded = json.dumps({"input": ["x" * 8] * 2048}).encode()
    with closing(connected(address)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        # One after the other on one connection, until no buffer takes any more.
        sock.sendall((head(len(encoded)) + encoded) * 16)
        deadline = time.monotonic() + 30
        while len(server.server_state.connections) > before and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(server.server_state.connections) <= before
    until_idle(server)


def test_a_request_that_takes_too_long_is_stopped() -> None:
    with (
        serving({"limits": {"request_seconds": 0.3}}) as (address, server),
        client_of(address) as client,
    ):
        body = {**LONG, "n": 16}
        response = client.post("/v1/chat/completions", json=body)
        if response.status_code != 200:  # a fast machine may be done by then
            assert response.status_code == 504
            assert response.json()["error"]["code"] == "timeout"
        until_idle(server)


def test_out_of_memory_in_one_request(running: tuple[str, Server]) -> None:
    address, server = running
    served = server.service.pool.entries["tiny"].served
    assert served is not None
    embed = served.scheduler.embed
    huge = served.model.prepare(Prompt.of("huge")).token_ids

    def short_of_memory(inputs: Any) -> Any:
        if any(one.token_ids == huge for one in inputs):
            raise OutOfMemoryError("memory ran out at /some/path")
        return embed(inputs)

    served.scheduler.embed = short_of_memory
    try:
        with client_of(address) as client:
            response = client.post("/v1/embeddings", json={"input": "huge"})
            assert response.status_code == 413
            assert response.json()["error"]["code"] == "out_of_memory"
            assert "/some/path" not in response.text
            assert client.post("/v1/embeddings", json={"input": "small"}).status_code == 200
    finally:
        served.scheduler.embed = embed


def test_an_unexpected_error_has_no_trace_in_it(running: tuple[str, Server]) -> None:
    address, server = running
    served = server.service.pool.entries["tiny"].served
    assert served is not None
    embed = served.scheduler.embed

    def broken(inputs: Any) -> Any:
        raise KeyError("/some/path")

    served.scheduler.embed = broken
    try:
        with client_of(address) as client:
            response = client.post("/api/embed", json={"model": "tiny", "input": "x"})
            assert response.status_code == 500
            assert response.json() == {
                "error": "internal error (KeyError); see the log of the server"
            }
    finally:
        served.scheduler.embed = embed
