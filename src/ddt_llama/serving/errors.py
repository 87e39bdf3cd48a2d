"""Errors as OpenAI's interface shows them: {"error": {"message", "type", "param", "code"}}.

Whatever goes wrong, a client reads one line; what is in a fault of ours stays in the server.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import pydantic
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from ddt_llama.config import UserError
from ddt_llama.data.images import BrokenImage
from ddt_llama.serving.jobs import Closed, Late, QueueFull
from ddt_llama.serving.schema import PATTERNS

MISTAKE, FAULT = "invalid_request_error", "server_error"


class ApiError(Exception):
    """One refusal: a status and the four fields of an error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = MISTAKE,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Keep it; `kind` is the field "type"."""
        super().__init__(message)
        self.status, self.code, self.headers = status, code, dict(headers or {})
        self.body = {"message": message, "type": kind, "param": param, "code": code}

    def response(self) -> JSONResponse:
        """Return what the client is sent."""
        return JSONResponse({"error": self.body}, self.status, self.headers)


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


def refusal(error: BaseException, request_id: str) -> ApiError:
    """Return what a client is told of an error."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BrokenImage):
        return ApiError(400, _line(error), code="invalid_image", param="image")
    if isinstance(error, UserError):
        return ApiError(400, _line(error), code="invalid_value")
    if isinstance(error, QueueFull):
        return too_many(error.seconds)
    if isinstance(error, Late):
        # Who asks again asks for the same work in vain: clients of OpenAI's look at this header.
        again = {"x-should-retry": "false"}
        return ApiError(504, str(error), kind=FAULT, code="deadline_exceeded", headers=again)
    if isinstance(error, Closed):
        return ApiError(503, str(error), kind=FAULT, code="shutting_down")
    if isinstance(error, ClientGone):
        return ApiError(499, "the client went away", code="client_gone")
    if isinstance(error, HTTPException):
        return _of_routing(error)
    return ApiError(500, f"this failed; its id is {request_id}", kind=FAULT, code="internal_error")


def too_many(seconds: int) -> ApiError:
    """Return the refusal of a request that finds the queue full."""
    message = f"too many requests are waiting; come again in {seconds} s"
    again = {"Retry-After": str(seconds)}
    return ApiError(429, message, kind="rate_limit_error", code="queue_full", headers=again)


def of_validation(error: pydantic.ValidationError, allowed: Sequence[str]) -> ApiError:
    """Return the first thing wrong with a body; `allowed` are the names of its fields."""
    found = error.errors(include_url=False, include_input=False)
    first = max(found, key=lambda one: len(one["loc"]))  # of a union: the branch that went furthest
    # Without the names of the branches, which are no fields: "list[...]".
    named = [part for part in map(str, first["loc"]) if "[" not in part]
    # Nor of a part's kind, which stands before the field of that name.
    place = ".".join(part for part, _ in groupby(named)) or None
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {_short(first['msg'])}", code="invalid_json")
    if first["type"] == "extra_forbidden":
        name, inside = first["loc"][-1], ".".join(map(str, first["loc"][:-1]))
        where = f" in {inside}" if inside else f"; allowed are {', '.join(allowed)}"
        message = f"unknown field {_short(repr(name))}{where}"
        return ApiError(400, message, code="unknown_field", param=_short(place or ""))
    told = "is missing; give it" if first["type"] == "missing" else _short(first["msg"])
    told = PATTERNS.get(first.get("ctx", {}).get("pattern", ""), told)
    param = place and _short(place)
    return ApiError(400, f"{param or 'the body'}: {told}", code="invalid_value", param=param)


def _of_routing(error: HTTPException) -> ApiError:
    if error.status_code == 404:
        return ApiError(404, "there is nothing at this address", code="not_found")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another one")
        message = f"this method is not allowed here; allowed is {allowed}"
        return ApiError(405, message, code="method_not_allowed", headers=error.headers)
    return ApiError(error.status_code, _short(str(error.detail)), headers=error.headers)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _short(text: Any) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= 200 else f"{line[:197]}..."
