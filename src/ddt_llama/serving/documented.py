"""The OpenAPI document: what routes cannot say of themselves."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from ddt_llama.serving.schema import Chat, EditJson, Error, Generation

BODIES: Sequence[type[BaseModel]] = (Generation, EditJson, Chat)
STATUSES: Mapping[int, str] = {
    400: "A mistake in the request; `param` names the field.",
    401: "No valid API key, where the server asks for one.",
    403: "Not from this machine, where the server speaks to its own only.",
    404: "No such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is of another kind.",
    429: "Too many requests wait; `Retry-After` says in how many seconds to come again.",
    500: "A fault of the server's; its log has more, under the id in `x-request-id`.",
    503: "The server is shutting down.",
    504: "Not done before the deadline.",
}
EVENT = {
    "type": "object",
    "description": "One event; `data` is JSON, of the last event of all [DONE].",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
ASKING = (401, 403, 500)  # what every address but those of health may answer


def answers(kind: type[BaseModel], *, stream: bool = False, asks: bool = True) -> dict[Any, Any]:
    """Return FastAPI's `responses` of a route that answers with `kind`, or refuses."""
    found: dict[Any, Any] = {200: {"model": kind}}
    if stream:
        found[200]["content"] = {"text/event-stream": {"schema": EVENT}}
    for status, told in STATUSES.items():
        if asks or status in ASKING:
            found[status] = {"model": Error, "description": told}
    return found


def document(app: FastAPI, asks_for_a_key: bool) -> dict[str, Any]:
    """Return the OpenAPI document of an application."""
    if app.openapi_schema is None:
        made = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        for operation in (one for path in made["paths"].values() for one in path.values()):
            operation["responses"].pop("422", None)  # of FastAPI's own checks; here it is 400
        schemas = made.setdefault("components", {}).setdefault("schemas", {})
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        for body in BODIES:
            described = body.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(described.pop("$defs", {}))
            schemas[body.__name__] = described
        if asks_for_a_key:
            bearer = {"type": "http", "scheme": "bearer"}
            made["components"]["securitySchemes"] = {"key": bearer}
            made["security"] = [{"key": []}]
            for path in ("/healthz", "/readyz"):
                made["paths"][path]["get"]["security"] = []
        app.openapi_schema = made
    return app.openapi_schema
