"""The outermost layer of the server: what every request passes before anything else sees it.

    Host and Origin ──► API key ──► number of requests ──► endpoint
    (DNS rebinding,                                        │ response: security headers,
     cross-site requests)                                  ▼ request id, log line, metrics

A browser names the site a request comes from in `Origin`, `Sec-Fetch-Site` or `Referer`. A request
that names another site is refused unless that site is allowed; one that names none does not come
from a web page. `Cross-Origin-Resource-Policy` keeps other sites from showing images of this one,
`frame-ancestors` from framing it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import secrets
import time
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from visavis.serve.config import LOOPBACK, ServerConfig
from visavis.serve.errors import ApiError, body_of, dialect_of
from visavis.serve.metrics import Metrics

SECURITY_HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
        b"frame-ancestors 'none'; base-uri 'none'; form-action 'self'; object-src 'none'",
    ),
    (b"x-frame-options", b"DENY"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
)
OPEN_PATHS = frozenset({"/healthz", "/readyz"})  # for probes that have no key
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
log = logging.getLogger("visavis.serve.access")


class Guard:
    """ASGI middleware that refuses, counts and logs requests."""

    def __init__(self, app: ASGIApp, *, config: ServerConfig, metrics: Metrics) -> None:
        self.app, self.config, self.metrics = app, config, metrics
        self.hosts = {*LOOPBACK, config.host, *config.allow_hosts}
        self.origins = set(config.allow_origins)
        self.keys = [key.removeprefix("sha256:") for key in config.api_keys]
        self.in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        state = scope.setdefault("state", {})
        state["request_id"], state["model"] = request_id, ""
        origin = headers.get("origin", "")
        started, status = time.perf_counter(), 499  # what nginx logs for a client that left

        async def send_guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                added = [(b"x-request-id", request_id.encode())]
                added += [*SECURITY_HEADERS, *self._shared(origin)]
                message["headers"] = [*message.get("headers", []), *added]
            await send(message)

        self.in_flight += 1
        try:
            refused = self._refusal(scope, headers)
            if refused is not None:
                await send_error(scope, send_guarded, refused)
            elif scope["method"] == "OPTIONS" and origin in self.origins:
                await send_json(send_guarded, 204, b"", {})
            else:
                await self.app(scope, receive, send_guarded)
        finally:
            self.in_flight -= 1
            self._note(scope, status, time.perf_counter() - started)

    def _refusal(self, scope: Scope, headers: Headers) -> ApiError | None:
        host = headers.get("host", "")
        if _name(host) not in self.hosts:
            return ApiError(
                400,
                "the Host header does not name this server; add the name to allow_hosts "
                "(--allow-host) if it is yours",
                code="unknown_host",
            )
        if self._from_elsewhere(scope, headers, host):
            return ApiError(
                403,
                "requests from other web sites are refused; open the page of this server itself, "
                "or add the site to allow_origins (--allow-origin)",
                code="cross_site",
            )
        path = scope["path"]
        preflight = scope["method"] == "OPTIONS" and "origin" in headers
        if self.keys and path not in OPEN_PATHS and not preflight and not self._has_key(headers):
            return ApiError(
                401,
                "no valid API key; send one as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
            )
        if self.in_flight > self.config.limits.in_flight and path not in OPEN_PATHS:
            message = f"more than {self.config.limits.in_flight} requests at the same time"
            return ApiError(429, message, code="too_many_requests", retry_after=1)
        return None

    def _from_elsewhere(self, scope: Scope, headers: Headers, host: str) -> bool:
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if origin is not None:
            return origin not in self.origins and urlsplit(origin).netloc != host
        if site is not None and site not in ("same-origin", "none"):
            # Following a link from another page is the one thing it may do.
            navigates = headers.get("sec-fetch-mode") == "navigate"
            shown = headers.get("sec-fetch-dest", "document") == "document"
            return not (scope["method"] in ("GET", "HEAD") and navigates and shown)
        referer = headers.get("referer")
        if referer is not None and scope["method"] not in ("GET", "HEAD"):
            return urlsplit(referer).netloc != host
        return False

    def _has_key(self, headers: Headers) -> bool:
        bearer = headers.get("authorization", "")
        key = bearer[7:].strip() if bearer[:7].lower() == "bearer " else ""
        key = key or headers.get("x-api-key", "") or headers.get("api-key", "")
        found = hashlib.sha256(key.encode()).hexdigest()
        # All are compared, so that the time tells nothing about which one matched.
        return sum(hmac.compare_digest(found, known) for known in self.keys) > 0

    def _shared(self, origin: str) -> list[tuple[bytes, bytes]]:
        if origin not in self.origins:
            return [(b"cross-origin-resource-policy", b"same-origin")]
        return [
            (b"access-control-allow-origin", origin.encode()),
            (b"access-control-allow-methods", b"GET, POST, DELETE"),
            (b"access-control-allow-headers", b"authorization, content-type, x-api-key"),
            (b"access-control-max-age", b"600"),
            (b"vary", b"Origin"),
            (b"cross-origin-resource-policy", b"cross-origin"),
        ]

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        # The route's pattern and known methods, never what a client made up: labels stay few.
        route = scope["state"].get("route", "other")
        method = scope["method"] if scope["method"] in METHODS else "other"
        self.metrics.requests.labels(route, method, str(status)).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        log.info(
            "%s %s %d",
            method,
            route,
            status,
            extra={
                "request_id": scope["state"]["request_id"],
                "model": scope["state"]["model"],
                "status": status,
                "ms": round(seconds * 1000, 1),
            },
        )


async def send_error(scope: Scope, send: Send, error: ApiError) -> None:
    """Send an error in the shape of the API that the path belongs to."""
    dialect = dialect_of(scope["path"])
    body = json.dumps(body_of(error, dialect)).encode()
    # The page tells an unusable upload from other errors by its status.
    unusable = dialect == "page" and error.code == "invalid_image"
    await send_json(send, 415 if unusable else error.status, body, error.headers)


async def send_json(send: Send, status: int, body: bytes, headers: dict[str, str]) -> None:
    """Send a whole JSON response."""
    sent: list[tuple[bytes, bytes]] = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *((name.encode(), value.encode()) for name, value in headers.items()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": sent})
    await send({"type": "http.response.body", "body": body})


def _name(host: str) -> str:
    """Return the name or address in a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
