"""What the server refuses: other sites, unknown hosts, wrong keys, private addresses."""

from __future__ import annotations

import http.server
import ipaddress
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.fakes import picture, write_pictures
from tests.serve.serving import client_of, png, serving
from visavis import Index
from visavis.errors import InputError
from visavis.serve import listen
from visavis.serve.config import hash_key, make_config, read_config
from visavis.serve.fetch import Fetcher, is_public

QUESTION = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    settings = {"allow_origins": ["https://friend.example"], "allow_hosts": ["visavis.test"]}
    with serving(settings) as (address, _), client_of(address) as client:
        yield client


def test_every_response_has_the_security_headers(client: httpx.Client) -> None:
    for response in (client.get("/healthz"), client.get("/nowhere"), client.get("/docs"),
                     client.post("/v1/chat/completions", content=b"{"),
                     client.get("/static/page.js"),
                     client.get("/healthz", headers={"host": "evil.example"})):  # fmt: skip
        headers = response.headers
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["cross-origin-opener-policy"] == "same-origin"
        assert headers["x-frame-options"] == "DENY"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["x-request-id"]
        assert "server" not in headers
        assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),  # not a browser
        ({"origin": "OWN"}, 200),
        ({"sec-fetch-site": "same-origin"}, 200),
        ({"sec-fetch-site": "none"}, 200),
        ({"referer": "OWN/page"}, 200),
        ({"origin": "https://friend.example"}, 200),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": ""}, 403),
        ({"origin": "http://127.0.0.1"}, 403),  # another port is another site
        ({"sec-fetch-site": "cross-site"}, 403),  # no Origin at all
        ({"sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 403),
        ({"referer": "https://evil.example/page"}, 403),
        ({"referer": "https://evil.example/OWN"}, 403),
    ],
)
def test_a_post_from_another_site_is_refused(
    client: httpx.Client, headers: dict[str, str], status: int
) -> None:
    own = str(client.base_url).rstrip("/")
    headers = {name: value.replace("OWN", own) for name, value in headers.items()}
    response = client.post("/v1/chat/completions", json=QUESTION, headers=headers)
    assert response.status_code == status, response.text


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "image"},
         403),
        ({"sec-fetch-site": "same-site", "sec-fetch-mode": "cors"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate",
          "sec-fetch-dest": "iframe"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate",
          "sec-fetch-dest": "document"}, 200),  # a link that somebody follows
        ({"sec-fetch-site": "same-origin", "sec-fetch-mode": "no-cors"}, 200),
    ],
)  # fmt: skip
def test_another_site_cannot_probe_what_is_here(
    client: httpx.Client, headers: dict[str, str], status: int
) -> None:
    assert client.get("/v1/models", headers=headers).status_code == status


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200), ("localhost:9999", 200), ("[::1]:80", 200), ("visavis.test", 200),
        ("evil.example", 400), ("127.0.0.1.evil.example", 400), ("evil.example:8484", 400),
        ("", 400), ("localhost.evil.example:80", 400),
    ],
)  # fmt: skip
def test_only_its_own_names_are_answered(client: httpx.Client, host: str, status: int) -> None:
    assert client.get("/healthz", headers={"host": host}).status_code == status


def test_cors_is_for_allowed_sites_only(client: httpx.Client) -> None:
    asked = {"access-control-request-method": "POST"}
    friend = {"origin": "https://friend.example"}
    preflight = client.options("/v1/chat/completions", headers={**asked, **friend})
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == "https://friend.example"
    answer = client.post("/v1/chat/completions", json=QUESTION, headers=friend)
    assert answer.headers["access-control-allow-origin"] == "https://friend.example"
    evil = client.options("/v1/models", headers={**asked, "origin": "https://evil.example"})
    assert evil.status_code == 403
    assert "access-control-allow-origin" not in evil.headers


def test_api_keys() -> None:
    settings = {"api_keys": [hash_key("first"), hash_key("second")]}
    with serving(settings) as (address, _), client_of(address) as client:
        for headers, status in (
            ({}, 401),
            ({"authorization": "Bearer wrong"}, 401),
            ({"authorization": f"Bearer {hash_key('first')}"}, 401),
            ({"authorization": "Bearer"}, 401),
            ({"authorization": "Basic first"}, 401),
            ({"authorization": "Bearer first"}, 200),
            ({"authorization": "bearer second"}, 200),
            ({"x-api-key": "second"}, 200),
            ({"api-key": "first"}, 200),
        ):
            response = client.get("/v1/models", headers=headers)
            assert response.status_code == status, headers
            assert client.post(
                "/api/show", json={"model": "tiny"}, headers=headers
            ).status_code == (status)
        assert client.get("/v1/models").json()["error"]["code"] == "invalid_api_key"
        assert client.get("/api/tags").json().keys() == {"error"}
        assert client.get("/healthz").status_code == 200
        assert "first" not in client.get("/openapi.json").text
        assert client.get("/metrics").status_code == 401


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"models": {"a": "nano"}, "host": "0.0.0.0"}, "no API key"),
        ({"models": {"a": "nano"}, "host": "0.0.0.0", "api_keys": ["plain"]}, "64 hex digits"),
        ({"models": {}}, "models"),
        ({"models": {"a b": "nano"}}, "other characters"),
        ({"models": {"a": "nano"}, "prot": 1}, "prot: unknown setting"),
        ({"models": {"a": "nano"}, "limits": {"images": 0}}, "limits.images"),
    ],
)
def test_a_configuration_that_is_wrong_says_so(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        make_config(settings)


def test_a_configuration_file(tmp_path: Any) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("models: {a: nano}\nlimits: {images: 3}\n", encoding="utf-8")
    assert make_config(read_config(file)).limits.images == 3
    file.write_text("- a\n", encoding="utf-8")
    with pytest.raises(InputError, match="not a mapping"):
        read_config(file)
    with pytest.raises(InputError, match="cannot be read"):
        read_config(tmp_path / "absent.yaml")


def test_a_taken_port_is_an_error() -> None:
    taken = listen(0)
    with pytest.raises(InputError, match="another --port"):
        listen(taken.getsockname()[1], other=False)
    taken.close()


# --- URLs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.9.1", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254",
        "0.0.0.0", "100.64.0.1", "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fc00::1",
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::",
        "2001:0:4136:e378:8000:63bf:3fff:fdd2", "ff02::1", "198.18.0.1", "240.0.0.1",
    ],
)  # fmt: skip
def test_private_addresses_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses_are(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


class Site(http.server.BaseHTTPRequestHandler):
    """A web site with an image, redirects, and more than anybody wants."""

    def do_GET(self) -> None:
        if self.path.startswith("/image"):
            self._send(200, png(picture(1)))
        elif self.path.startswith("/large"):
            self._send(200, bytes(2**20))
        elif self.path.startswith("/to"):
            self.send_response(302)
            self.send_header("location", self.path.partition("=")[2])
            self.end_headers()
        else:
            self._send(404, b"")

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def site() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_allowed_url_is_fetched() -> None:
    with site() as port:
        open_to_all = Fetcher(["localhost"], max_bytes=2**19, permitted=lambda address: True)
        assert open_to_all.fetch(f"http://localhost:{port}/image") == png(picture(1))
        assert open_to_all.fetch(f"http://localhost:{port}/to=/image") == png(picture(1))
        for path, told in (
            ("/large", "more than"),
            ("/absent", "status 404"),
            ("/to=/to=/to=/to=/to=/image", "redirects"),
            (f"/to=http://127.0.0.1:{port}/image", "may not be fetched from 127.0.0.1"),
            ("/to=file:///etc/passwd", "not http"),
        ):
            with pytest.raises(InputError, match=told):
                open_to_all.fetch(f"http://localhost:{port}{path}")


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "2130706433", "0x7f000001", "0177.0.0.1", "[::ffff:7f00:1]",
             "[::1]", "127.1"]
)  # fmt: skip
def test_an_allowed_host_with_a_private_address_is_not_connected_to(host: str) -> None:
    with site() as port:
        fetcher = Fetcher([host.strip("[]")], max_bytes=2**19)
        with pytest.raises(InputError, match=r"no public address|could not be fetched"):
            fetcher.fetch(f"http://{host}:{port}/image")


@pytest.mark.parametrize(
    "url",
    [
        "http://user@friend.example/x", "http://friend.example@evil.example/x", "ftp://friend.example",
        "http://evil.example/friend.example", "http://friend.example:99999/x", "http:///x",
        "http://friend.example\\@evil.example/", "http://friend.example.evil.example/",
        "gopher://friend.example/", "http://friend.example:0/", "http://friend.example/\r\nHost: x",
        "http://friend.example/a b",
    ],
)  # fmt: skip
def test_urls_that_are_not_what_they_seem(url: str) -> None:
    def never(address: Any) -> bool:
        raise AssertionError("nothing may be connected to")

    with pytest.raises(InputError):
        Fetcher(["friend.example"], max_bytes=2**19, permitted=never).fetch(url)


def test_no_path_of_this_machine_in_any_answer(tmp_path: Any) -> None:
    write_pictures(tmp_path / "secret-folder", 1)
    from tests.fakes import tiny_model

    with Index(tmp_path / "test.idx", tiny_model()) as index:
        index.add(tmp_path / "secret-folder")
    models = {"broken": str(tmp_path / "secret-folder")}
    settings = {"models": models, "indexes": {"photos": tmp_path / "test.idx"}}
    with serving(settings, models={}) as (address, _), client_of(address) as client:
        for response in (
            client.post("/v1/chat/completions", json=QUESTION),
            client.post("/api/embed", json={"model": "broken", "input": "x"}),
            client.post("/v1/search", json={"text": "x"}),
            client.get("/v1/indexes"),
            client.get("/readyz"),
            client.get("/api/tags"),
        ):
            assert "secret-folder" not in response.text
            assert response.status_code in (200, 503)
        assert client.post("/v1/chat/completions", json=QUESTION).status_code == 503
