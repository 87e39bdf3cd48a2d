"""Put the page on the application, behind a door that lets few of Gradio's addresses through.

Gradio brings some seventy addresses (a proxy, a downloader, an API of its own); the page needs a
dozen, and no request to them may name a file or a URL that the page did not make itself.
"""

import asyncio
import json
import os
import re
import tempfile
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.routing import Match, Mount
from starlette.types import ASGIApp, Receive, Scope, Send

from ddt_llama.serving.errors import ApiError
from ddt_llama.serving.guard import again
from ddt_llama.serving.served import Served

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported, and later

import gradio

from ddt_llama.serving.page import layout
from ddt_llama.serving.page.pictures import Files

# What a browser that shows the page asks for; whatever else Gradio offers is not there.
ALLOWED = re.compile(
    r"/|/(theme\.css|favicon\.ico|manifest\.json)|/(assets|static|svelte)/.+"
    r"|/gradio_api/(queue/(join|data)|upload|upload_progress|startup-events"
    r"|heartbeat/.+|file=.+)"
)
HEARTBEAT, FILE, UPLOAD = "/gradio_api/heartbeat/", "/gradio_api/file=", "/gradio_api/upload"
NAMING = ("/gradio_api/queue/join",)  # where bodies name files
KEPT = 3600  # seconds that a picture which somebody has sent or drawn lies in the folder
MOST_KEPT = 32  # times the limit of a body: what lies there at most before no more is taken
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"same-origin"),
    (b"x-content-type-options", b"nosniff"),
)


def add_page(app: FastAPI, served: Served) -> None:
    """Add the page at "/", with a folder for its pictures that is gone when the server ends."""
    folder = tempfile.TemporaryDirectory(prefix="ddt-page-")
    place = Path(folder.name).resolve()
    os.environ["GRADIO_TEMP_DIR"] = str(place)
    files = Files(place, served.model.tokenizer.image_size)
    asyncio.run(_mount(app, served, files))
    mounted = app.router.routes.pop()
    assert isinstance(mounted, Mount)
    app.router.routes.append(Page(Door(mounted.app, served, files)))
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        with folder:
            forgetting = asyncio.create_task(_forget(files))
            async with inner(app) as state:
                yield state
            forgetting.cancel()

    app.router.lifespan_context = lifespan


async def _mount(app: FastAPI, served: Served, files: Files) -> None:
    """Let Gradio serve the page, without whatever it offers beside.

    In a loop, as it would make loops of its own, which nobody closes.
    """
    blocks, limits = layout.page(served, files), served.limits
    blocks.queue(max_size=limits.max_queue + limits.rows, default_concurrency_limit=None)
    gradio.mount_gradio_app(
        app,
        blocks,
        path="/",
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=round(limits.max_body * 1e6),
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=layout.theme(),
        css=layout.CSS,
        js=layout.NAMES,
    )


async def _forget(files: Files) -> None:
    """Remove, until the end of the server, what nobody looks at any more."""
    while True:
        await asyncio.sleep(KEPT / 4)
        await asyncio.to_thread(files.forget, KEPT)


class Page(Mount):
    """A mount at "/" that leaves to the interface what is the interface's, mistakes included."""

    def __init__(self, app: ASGIApp) -> None:
        """Mount it."""
        super().__init__("/", app)

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Match the addresses of the page only."""
        if scope["type"] != "http" or not ALLOWED.fullmatch(scope["path"]):
            return Match.NONE, {}
        return super().matches(scope)


class Door:
    """Before Gradio: names of files and addresses checked, streams ended with the server."""

    def __init__(self, app: ASGIApp, served: Served, files: Files) -> None:
        """Stand before `app`, whose pictures are `files`."""
        self.app, self.served, self.files = app, served, files

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or raise ApiError."""
        path = scope["path"]
        self._check(path, Headers(scope=scope))
        if path == "/":  # Gradio would make the page as a file says that was left by somebody
            scope = {**scope, "query_string": b""}
        if path in NAMING and scope["method"] == "POST":
            receive = await self._checked(scope, receive)

        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *HEADERS]
            await send(message)

        if path.startswith(HEARTBEAT):
            await self._until_the_end(self.app(scope, receive, answer))
        else:
            await self.app(scope, receive, answer)

    async def _until_the_end(self, answer: Awaitable[None]) -> None:
        """Answer until the server shuts down, which would wait while a page is open somewhere."""
        beating = asyncio.ensure_future(answer)
        while not (beating.done() or self.served.draining):
            await asyncio.wait({beating}, timeout=0.5)
        beating.cancel()
        await asyncio.wait({beating})  # it ends its answer
        if not beating.cancelled():
            beating.result()

    def _check(self, path: str, headers: Headers) -> None:
        """Raise ApiError for what is no business of a visitor of the page."""
        if not _of_this_site(headers):
            raise ApiError(403, "this page is for its own site only", code="not_same_site")
        if path.startswith(FILE):
            self._check_file(path.removeprefix(FILE))
        if path == UPLOAD and self.files.size() > MOST_KEPT * self.served.limits.max_body * 1e6:
            message = "too many pictures lie here; come again later"
            raise ApiError(429, message, code="storage_full", headers={"Retry-After": "60"})

    def _check_file(self, name: str) -> None:
        if not Path(os.path.abspath(name)).is_relative_to(self.files.folder):
            raise ApiError(404, "there is nothing at this address", code="not_found")

    async def _checked(self, scope: Scope, receive: Receive) -> Receive:
        """Return a `receive` of a body whose files are all the page's own."""
        body = await Request(scope, receive).body()
        try:
            names = list(_files(json.loads(body)))
        except (ValueError, RecursionError):
            raise ApiError(400, "the body is not JSON", code="invalid_json") from None
        for name in names:
            self._check_file(name)
        return again(body, receive)


def _of_this_site(headers: Headers) -> bool:
    """Return whether no other site sends this; browsers add a password to what those send, too."""
    if "origin" not in headers:  # what changes something always has one
        return True
    try:
        return urlsplit(headers["origin"]).netloc == headers.get("host", "")
    except ValueError:  # a broken bracket
        return False


def _files(value: Any) -> Iterator[str]:
    """Give all that Gradio may take for the name of a file: `path` and `url`, at any depth."""
    if isinstance(value, list):
        for one in value:
            yield from _files(one)
    elif isinstance(value, dict):
        for key, one in value.items():
            if key == "url" and isinstance(one, str) and one.startswith("data:"):
                continue  # what browsers send of an SVG; nothing opens it
            if isinstance(one, str) and key in ("path", "url"):
                yield unquote(one).partition(FILE)[2] or one
            else:
                yield from _files(one)
