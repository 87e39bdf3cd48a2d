"""Between a request and its job: bodies checked, answers awaited, clients that go away noticed."""

import asyncio
import base64
import binascii
import io
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

import pydantic
from jaxtyping import Float
from starlette.requests import Request
from starlette.responses import StreamingResponse
from torch import Tensor

from ddt_llama.config import UserError
from ddt_llama.data.images import to_pil
from ddt_llama.generation.settings import Options
from ddt_llama.generation.work import Program, R
from ddt_llama.serving.errors import ApiError, ClientGone, of_validation, refusal
from ddt_llama.serving.jobs import Job, Late, Preview
from ddt_llama.serving.schema import Chance
from ddt_llama.serving.served import Served

B = TypeVar("B", bound=pydantic.BaseModel)
T = TypeVar("T")
SEEDS = 2**31  # random ones: short enough to be written down
MOST_MARKS = 10_000  # of a body of JSON: checking costs time and memory for each value in it


async def body_of(request: Request, kind: type[B]) -> B:
    """Return the JSON body. Raises ApiError for what is no such body."""
    body = await request.body()
    marks = sum(map(body.count, (b",", b"[", b"{")))
    if marks > MOST_MARKS:
        message = f"the body has {marks} commas and brackets; allowed are {MOST_MARKS}: send less"
        raise ApiError(400, message, code="too_many_values")
    try:
        return kind.model_validate_json(body)
    except pydantic.ValidationError as error:
        raise of_validation(error, list(kind.model_fields)) from None


def check_model(served: Served, name: str | None) -> None:
    """Raise ApiError for a model that is not the one here."""
    if name not in (None, served.model.name):
        message = f"there is no model {name[:100]!r} here; allowed is {served.model.name!r}"
        raise ApiError(404, message, code="model_not_found", param="model")


def check_text(served: Served, text: str, param: str) -> None:
    """Raise ApiError for a text that is too long."""
    most = served.limits.max_prompt
    if len(text) > most:
        message = f"{param}: given {len(text)} characters, allowed are {most}"
        raise ApiError(400, message, code="string_above_max_length", param=param)


def chosen(served: Served, given: Chance) -> tuple[int, Options]:
    """Return seed and options of a drawing. Raises ApiError for impossible ones."""
    least, most = 0 if served.model.tokenizer.renders else 1, served.limits.max_steps
    if given.steps is not None and not least <= given.steps <= most:
        message = f"steps: given {given.steps}, allowed are {least} to {most}"
        raise ApiError(400, message, code="invalid_value", param="steps")
    options: Options = {
        "guidance_scale": given.guidance_scale,
        "temperature": given.temperature,
        "top_k": given.top_k,
        "top_p": given.top_p,
        "steps": given.steps,
    }
    try:
        served.model.settings.changed(options)
    except UserError as error:
        named = next((name for name in options if str(error).startswith(name)), None)
        raise ApiError(400, str(error), code="invalid_value", param=named) from None
    return secrets.randbelow(SEEDS) if given.seed is None else given.seed, options


def of_data_url(url: str) -> bytes:
    """Return the bytes of a data: URL. Raises ApiError for every other one: none is ever opened."""
    head, comma, body = url.partition(",")
    if not head.startswith("data:") or not head.endswith(";base64") or not comma:
        message = "image_url: no URL is ever opened; send the picture as data:image/png;base64,..."
        raise ApiError(400, message, code="invalid_image_url", param="image_url")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        message = "image_url: what stands behind the comma is no base64"
        raise ApiError(400, message, code="invalid_base64", param="image_url") from None


async def pngs(images: Float[Tensor, "b 3 h w"]) -> list[str]:
    """Return pictures in [-1, 1] as PNG, in base64."""

    def written() -> list[str]:
        texts = []
        for picture in to_pil(images):
            content = io.BytesIO()
            picture.save(content, format="PNG")
            texts.append(base64.b64encode(content.getvalue()).decode())
        return texts

    return await asyncio.to_thread(written)


async def finished(served: Served, request: Request, program: Program[R]) -> R:
    """Have a program carried out; where the client goes away first, it is given up.

    Raises what the program raises, and ClientGone.
    """
    job = served.worker.submit(program, deadline=request.state.deadline)
    try:
        return await _awaited(request, job, asyncio.wrap_future(job.future))
    finally:
        job.cancel()


Event = Preview | Future[Any]
Told = Callable[[Preview | Any], Awaitable[list[tuple[str, Mapping[str, Any]]]]]


async def streamed(
    served: Served, request: Request, program: Program[Any], told: Told, previews: int = 0
) -> StreamingResponse:
    """Answer with server-sent events: what `told` makes of each preview and of the result.

    The answer begins with the first of them, so that what fails before is an answer of its own.
    Raises what the program raises until then, and ClientGone.
    """
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[Event] = asyncio.Queue()

    def put(event: Event) -> None:
        loop.call_soon_threadsafe(events.put_nowait, event)

    job = served.worker.submit(
        program, deadline=request.state.deadline, previews=previews, show=put
    )
    job.future.add_done_callback(put)
    try:
        first = await _awaited(request, job, asyncio.ensure_future(events.get()))
        begin = await told(_result(first))
    except BaseException:
        job.cancel()
        raise

    async def sent() -> AsyncIterator[bytes]:
        event, parts = first, begin
        try:
            while True:
                for name, part in parts:
                    yield _sse(name, json.dumps(part))
                if isinstance(event, Future):
                    break
                event = await _awaited(request, job, asyncio.ensure_future(events.get()))
                parts = await told(_result(event))
            yield b"data: [DONE]\n\n"
        except Exception as error:
            body = refusal(error, request.state.request_id).body
            yield _sse("error", json.dumps({"type": "error", "error": body}))
        finally:
            job.cancel()

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(sent(), media_type="text/event-stream", headers=headers)


def _result(event: Event) -> Any:
    return event.result() if isinstance(event, Future) else event


def _sse(name: str, data: str) -> bytes:
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {data}\n\n".encode()


async def _awaited(request: Request, job: Job[Any], wanted: "asyncio.Future[T]") -> T:
    """Wait for what a job gives, also where the worker is held up by something else.

    Raises ClientGone where the client goes away first, and Late at the deadline.
    """
    gone = asyncio.ensure_future(request.receive())  # after the body only a disconnect comes
    left = job.deadline - time.monotonic()
    try:
        await asyncio.wait({wanted, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if wanted.done():
            return wanted.result()
        if gone.done():
            raise ClientGone
        job.give_up_late()
        raise job.future.exception() or Late.after(time.monotonic() - job.arrived)
    finally:
        gone.cancel()
        wanted.cancel()


def note(served: Served, request: Request, **fields: Any) -> None:
    """Add fields to the request's line of log; a prompt only where the server was told to."""
    if not served.log_prompts:
        fields.pop("prompt", None)
    request.state.notes.update(fields)
