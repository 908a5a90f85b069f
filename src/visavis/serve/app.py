"""The application: every API over one service, behind one guard.

Guard ──► route ──► EndpointApp ──► dialect ──► Service ──► models, indexes

/v1/…, /v2/…, /api/…     the APIs, one file each in dialects/
/openapi.json, /docs     their description
/, /page/…, /static/…    the web page, where there is an index
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

import visavis
from visavis.serve.config import ServerConfig
from visavis.serve.dialects import embeddings, ollama, openai, page, rerank, responses, search
from visavis.serve.errors import ApiError, body_of, dialect_of
from visavis.serve.guard import Guard
from visavis.serve.http import Endpoint, EndpointApp
from visavis.serve.metrics import Metrics
from visavis.serve.models import ModelPool
from visavis.serve.openapi import document
from visavis.serve.openapi import page as docs_page
from visavis.serve.service import Service

if TYPE_CHECKING:
    from visavis.api import Model

API: list[Endpoint] = [
    *openai.ENDPOINTS,
    *responses.ENDPOINTS,
    *embeddings.ENDPOINTS,
    *rerank.ENDPOINTS,
    *ollama.ENDPOINTS,
    *search.ENDPOINTS,
]
IDLE_CHECK_SECONDS = 1.0


def create_app(
    config: ServerConfig,
    *,
    load: Callable[..., Model] | None = None,
    models: Mapping[str, Model] | None = None,
    examples: Sequence[str] = (),
) -> Starlette:
    """Return the application. Its `state.service` is what the endpoints work with.

    Args:
        load: returns the model behind a name or path; None: `visavis.load`.
        models: models that are loaded already, by their names in `config.models`.
        examples: searches that the page proposes.
    """
    metrics = Metrics()
    pool = ModelPool(config, metrics, load or visavis.load, dict(models or {}))
    service = Service(config, pool, metrics)
    service.examples = examples
    described = document(API, keyed=bool(config.api_keys))
    shown = docs_page(described)

    async def openapi(request: Request) -> Response:
        return JSONResponse(described)

    async def docs(request: Request) -> Response:
        return HTMLResponse(shown)

    async def to_docs(request: Request) -> Response:
        return RedirectResponse("/docs")

    endpoints = [*API, *(page.ENDPOINTS if config.indexes else [])]
    routes: list[Any] = [
        Route(one.path, EndpointApp(one, service), methods=[one.method]) for one in endpoints
    ]
    routes += [
        Route("/openapi.json", openapi),
        Route("/docs", docs),
        Mount("/static", StaticFiles(directory=page.WEB_FOLDER)),
    ]
    if not config.indexes:
        routes.append(Route("/", to_docs))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        unloading = asyncio.create_task(_unload_idle(service))
        try:
            yield
        finally:
            unloading.cancel()
            await asyncio.get_running_loop().run_in_executor(None, service.close)

    app = Starlette(
        routes=routes,
        middleware=[Middleware(Guard, config=config, metrics=metrics)],
        exception_handlers={HTTPException: _http_error},
        lifespan=lifespan,
    )
    app.state.service = service
    return app


async def _unload_idle(service: Service) -> None:
    while True:
        await asyncio.sleep(IDLE_CHECK_SECONDS)
        await service.pool.unload_idle()


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer what no endpoint answers, in the shape of the API that the path belongs to."""
    assert isinstance(error, HTTPException)
    told = {
        404: f"there is no {request.url.path[:200]!r}; the endpoints are listed at /docs",
        405: f"{request.method[:20]} is not a method of {request.url.path[:200]!r}",
    }
    message = told.get(error.status_code, str(error.detail))
    body = body_of(ApiError(error.status_code, message), dialect_of(request.url.path))
    return JSONResponse(body, status_code=error.status_code, headers=dict(error.headers or {}))
