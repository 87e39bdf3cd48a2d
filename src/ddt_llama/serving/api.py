"""The application: the routes, the guard before them, errors as OpenAI's, the document.

Every address of the interface lies under /v1, or is one of /healthz, /readyz, /metrics and
/openapi.json; a page for people may stand beside it, at "/".
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ddt_llama import __version__
from ddt_llama.serving import chat, pictures
from ddt_llama.serving.documented import answers, document
from ddt_llama.serving.errors import FAULT, ApiError, refusal
from ddt_llama.serving.follow import check_model
from ddt_llama.serving.guard import Guard
from ddt_llama.serving.jobs import Closed
from ddt_llama.serving.schema import Entries, Entry, Error, Health
from ddt_llama.serving.served import Served

ABOUT = """Draw, edit, ask and describe with one model, by OpenAI's names of fields. Our own fields:
seed, guidance_scale, steps, temperature, top_k, top_p. Errors are objects with message, type, param
and code. No URL and no file of a request is ever opened: pictures are sent."""
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


def application(served: Served) -> FastAPI:
    """Return the application of a model that is being served; its end is the model's end."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        served.close()

    app = FastAPI(
        title="ddt-llama",
        version=__version__,
        description=ABOUT,
        lifespan=lifespan,
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    app.openapi = lambda: document(app, bool(served.keys))

    async def refused(request: Request, error: Exception) -> Response:
        return refusal(error, request.state.request_id).response()

    app.add_exception_handler(HTTPException, refused)
    app.add_middleware(Guard, served=served)  # answers all other errors, too
    app.include_router(pictures.router(served))
    app.include_router(chat.router(served))
    _add_models(app, served)
    _add_health(app, served)
    if served.page:
        from ddt_llama.serving.page.mount import add_page

        add_page(app, served)
    return app


def _add_models(app: FastAPI, served: Served) -> None:
    entry = Entry(id=served.model.name, created=served.created)

    @app.get("/v1/models", responses=answers(Entries, asks=False), tags=["models"])
    async def models() -> Response:
        """Name the model."""
        return JSONResponse(Entries(data=[entry]).model_dump())

    known: dict[Any, Any] = {**answers(Entry, asks=False), 404: {"model": Error}}

    @app.get("/v1/models/{name:path}", responses=known, tags=["models"])
    async def model(name: str) -> Response:
        """Describe the model."""
        check_model(served, name)
        return JSONResponse(entry.model_dump())


def _add_health(app: FastAPI, served: Served) -> None:
    known: dict[Any, Any] = {200: {"model": Health}, 503: {"model": Error}}

    @app.get("/healthz", responses=known, tags=["health"])
    async def healthz() -> Response:
        """Say that the process is alive, and its model."""
        if not (served.worker.alive or served.draining):
            message = "the model's thread has ended; its log says why: start the server again"
            raise ApiError(503, message, kind=FAULT, code="model_ended")
        return JSONResponse(Health().model_dump())

    @app.get("/readyz", responses=known, tags=["health"])
    async def readyz() -> Response:
        """Say whether requests are taken."""
        if served.draining or not served.worker.ready:
            raise Closed("no requests are taken any more")
        return JSONResponse(Health().model_dump())

    text: dict[Any, Any] = {200: {"content": {PROMETHEUS: {"schema": {"type": "string"}}}}}

    @app.get("/metrics", responses=text, tags=["health"])
    async def metrics() -> Response:
        """Return figures for Prometheus."""
        return Response(served.metrics.text(), headers={"Content-Type": PROMETHEUS})
