"""The ASGI application: /v1/chat/completions, /v1/models, /health and /metrics.

`make_app(service)` returns it; another ASGI application may mount it.
"""

import contextlib
import http
import urllib.parse
from collections.abc import AsyncIterator, Callable

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from internvl3_jax.io.terminal import short_name
from internvl3_jax.serve import metrics
from internvl3_jax.serve.chat_endpoint import ChatCall
from internvl3_jax.serve.errors import ApiError
from internvl3_jax.serve.service import Service
from internvl3_jax.serve.web import Page, add_page


def make_app(
    service: Service, on_failure: Callable[[], None] = lambda: None, page: Page | None = None
) -> FastAPI:
    """Returns the application.

    Args:
      service: whose engine is started when the application starts, and stopped at its end.
      on_failure: called by the event loop after the engine has failed.
      page: for people with a browser; None: there is none.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start(on_failure)
        yield

    def check_host(request: Request) -> None:
        _check_host(request, service)

    def check_key(request: Request) -> None:
        service.check_key(request.headers.get("authorization"))

    # No page of its own: FastAPI's would load scripts from elsewhere.
    app = FastAPI(
        title="internvl3_jax",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        dependencies=[Depends(check_host)],
    )
    v1 = APIRouter(prefix="/v1", dependencies=[Depends(check_key)])

    @v1.post("/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await ChatCall(service, request).respond()

    @v1.get("/models")
    async def models() -> dict:
        return {"object": "list", "data": [_model(service, name) for name in service.models]}

    @v1.get("/models/{name:path}")
    async def model(name: str) -> dict:
        service.adapter_of(name)
        return _model(service, name)

    @app.get("/health")
    async def health() -> dict:
        service.check_health()
        return {"status": "ok"}

    @app.get("/metrics")
    async def all_metrics() -> Response:
        return Response(service.metrics.text(), media_type=metrics.CONTENT_TYPE)

    if page is not None:
        add_page(app, v1, service, page)
    app.include_router(v1)
    app.add_exception_handler(ApiError, _respond)
    app.add_exception_handler(HTTPException, _respond_http)
    return app


def _check_host(request: Request, service: Service) -> None:
    """Refuses a name that a web page of another site has given this address (DNS rebinding)."""
    given = request.headers.get("host", "")
    try:
        host = urllib.parse.urlsplit(f"//{given}").hostname
    except ValueError:
        host = None
    if service.hosts and host not in service.hosts:
        raise ApiError(
            f"the host {short_name(given)} is not this server's; there are "
            f"{', '.join(service.hosts)}. Start it with --host, or with an API key",
            403,
            code="host_not_allowed",
        )


def _model(service: Service, name: str) -> dict:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "internvl3_jax",
        "parent": None if name == service.name else service.name,
        "max_model_len": service.engine.max_length,
    }


async def _respond(request: Request, error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def _respond_http(request: Request, error: HTTPException) -> Response:
    path = short_name(request.url.path)
    if error.status_code == 404:
        text = f"there is no {path}; there are /v1/chat/completions, /v1/models, /health, /metrics"
    elif error.status_code == 405:
        text = f"{path} does not take {short_name(request.method)}; see the header Allow"
    else:
        text = f"{error.detail or http.HTTPStatus(error.status_code).phrase}"
    refusal = ApiError(text, error.status_code, headers=error.headers)
    return await _respond(request, refusal)
