"""The door of the server: who may come in, with how much, and a line of log for each.

Outermost of all: a request that is refused here has had no byte of its body parsed. It reads the
whole body, up to the limit, and gives every request an id and a deadline.
"""

import asyncio
import base64
import binascii
import logging
import re
import time
import uuid
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ddt_llama.serving.errors import ApiError, refusal, too_many
from ddt_llama.serving.jobs import Closed, Late
from ddt_llama.serving.served import LOOPBACK, Served

OPEN = ("/healthz", "/readyz")  # for who asks whether the server lives; they tell nothing else
JSON, FORM = "application/json", "multipart/form-data"
# Kinds of bodies by address; the addresses are what metrics tell apart.
BODIES: Mapping[str, tuple[str, ...]] = {
    "/v1/images/generations": (JSON,),
    "/v1/images/edits": (JSON, FORM),
    "/v1/chat/completions": (JSON,),
}
KNOWN = (*BODIES, "/v1/models", "/metrics", "/openapi.json", *OPEN)
IDS = re.compile(r"[A-Za-z0-9._-]{1,64}")
DISCARDED = 64 << 20  # bytes of a refused body that are read, so that the client reads the refusal
DISCARDING = 10.0  # seconds that reading them may take
SLACK = 1.0  # seconds behind the deadline: who waits for the worker is told before
log = logging.getLogger(__name__)


class Guard:
    """An ASGI middleware in front of the application."""

    def __init__(self, app: ASGIApp, served: Served) -> None:
        """Stand before `app`."""
        self.app, self.served = app, served
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or refuse it; count and log it either way."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, headers = time.monotonic(), Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if IDS.fullmatch(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state |= {"request_id": request_id, "deadline": begun + self.served.limits.deadline}
        state["notes"] = {}
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._pass(scope, headers, receive, answer)
        except Exception as error:
            told = refusal(error, request_id)
            if told.status == 500:
                log.error("request failed", exc_info=error, extra={"fields": {"id": request_id}})
            if not status:
                await told.response()(scope, receive, answer)
        finally:
            self._note(scope, status, time.monotonic() - begun)

    async def _pass(self, scope: Scope, headers: Headers, receive: Receive, answer: Send) -> None:
        try:
            self._check(scope, headers)
        except (ApiError, Closed):
            await _discard(receive)
            raise
        if scope["method"] == "POST":
            await self._post(scope, headers, receive, answer)
        else:  # uvicorn leaves the body of an answer to HEAD out
            seen = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
            await self.app(seen, receive, answer)

    async def _post(self, scope: Scope, headers: Headers, receive: Receive, answer: Send) -> None:
        """Let a request with a body in, for as long as one may take.

        Raises Late where that is over before the answer is sent: pictures may wait to be opened,
        and clients read slowly.
        """
        self._under_way += 1
        begun, limit = time.monotonic(), asyncio.timeout(self.served.limits.deadline + SLACK)
        try:
            async with limit:
                body = await self._read(scope, headers, receive)
                await self.app(scope, again(body, receive), answer)
        except TimeoutError:
            if limit.expired():
                raise Late.after(time.monotonic() - begun) from None
            raise
        finally:
            self._under_way -= 1

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Raise ApiError for a request that is not to be read."""
        path, served = scope["path"], self.served
        if path in OPEN:
            return
        if served.keys:
            _check_key(served, path, headers.get("authorization", ""))
        elif served.loopback:
            _check_local(headers)
        if served.draining:
            raise Closed("the server is shutting down")
        kinds = BODIES.get(path)
        if scope["method"] == "POST" and kinds is not None:
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind not in kinds:
                message = f"Content-Type is {kind[:60]!r}; allowed is {' or '.join(kinds)}"
                raise ApiError(415, message, code="unsupported_media_type")
        most = served.limits.max_queue + served.limits.rows
        if scope["method"] == "POST" and self._under_way >= most:
            raise too_many(served.worker.expected_wait())

    async def _read(self, scope: Scope, headers: Headers, receive: Receive) -> bytes:
        """Return the whole body. Raises ApiError where it is too large or comes too slowly."""
        most = round(self.served.limits.max_body * 1e6)
        too_large = ApiError(
            413, f"the body is larger than {most} bytes, the limit here", code="body_too_large"
        )
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > most:
            await _discard(receive)
            raise too_large
        parts: list[bytes] = []
        size = 0
        while True:
            left = scope["state"]["deadline"] - time.monotonic()
            try:
                message = await asyncio.wait_for(receive(), max(left, 0))
            except TimeoutError:
                message = "the body did not arrive in time"
                raise ApiError(408, message, code="body_too_slow") from None
            if message["type"] == "http.disconnect":
                raise ApiError(499, "the client went away", code="client_gone")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > most:
                await _discard(receive)
                raise too_large
            if not message.get("more_body", False):
                return b"".join(parts)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        path = scope["path"] if scope["path"] in KNOWN else "other"
        if path == "other" and self.served.page and status != 404:
            path = "page"
        self.served.metrics.requests.labels(path, str(status)).inc()
        self.served.metrics.seconds.labels(path).observe(seconds)
        state = scope["state"]
        fields = {
            "id": state["request_id"],
            "method": scope["method"][:10],
            "path": path,
            "status": status,
            "seconds": round(seconds, 4),
            **state["notes"],
        }
        quiet = path in OPEN or path == "/metrics"
        quiet = quiet or (path == "page" and scope["method"] == "GET" and status == 200)
        log.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"fields": fields})


def _check_key(served: Served, path: str, given: str) -> None:
    """Refuse who has no key; of the page it is the password that browsers ask for."""
    scheme, _, key = given.partition(" ")
    page = served.page and not path.startswith("/v1/") and path not in KNOWN
    if scheme.lower() == "basic" and page:
        try:
            key = base64.b64decode(key, validate=True).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            key = ""
    elif scheme.lower() != "bearer":
        key = ""
    if not served.admits(key.strip()):
        raise ApiError(
            401,
            "no valid API key was given; send it as 'Authorization: Bearer KEY'",
            code="invalid_api_key",
            headers={
                "WWW-Authenticate": 'Basic realm="the key is the password"' if page else "Bearer"
            },
        )


def _check_local(headers: Headers) -> None:
    """Refuse what a page in a browser on this machine sends, whatever name it calls us by."""
    called = [f"//{headers.get('host', '')}", *headers.getlist("origin")]
    try:
        names = [urlsplit(one).hostname for one in called]
    except ValueError:  # a broken bracket
        names = [None]
    if not all(name in LOOPBACK for name in names):
        raise ApiError(
            403,
            "this server speaks to its own machine only; call it by 127.0.0.1 or localhost, "
            "or start it with an API key",
            code="not_local",
        )


def again(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives a body that was read, then what comes after it."""
    left = [body]

    async def given() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return given


async def _discard(receive: Receive) -> None:
    """Read what is left of a body, within limits: who is cut off while sending reads nothing."""
    size, end = 0, time.monotonic() + DISCARDING
    while size < DISCARDED and time.monotonic() < end:
        try:
            message = await asyncio.wait_for(receive(), 1.0)
        except TimeoutError:
            return
        size += len(message.get("body", b""))
        if not message.get("more_body", False):
            return
