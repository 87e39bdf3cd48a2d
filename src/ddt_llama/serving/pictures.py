"""/v1/images/generations and /v1/images/edits."""

import time
from collections.abc import Mapping
from typing import Any

import pydantic
from fastapi import APIRouter
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from torch import Tensor

from ddt_llama.generation.work import Program
from ddt_llama.serving import follow
from ddt_llama.serving.documented import answers
from ddt_llama.serving.errors import ApiError, of_validation
from ddt_llama.serving.jobs import Preview
from ddt_llama.serving.schema import (
    Drawing,
    Edit,
    EditJson,
    Generation,
    ImageEvent,
    ImagesResponse,
    ImageUsage,
    InputDetails,
    Picture,
)
from ddt_llama.serving.served import Served

FILES = ("image", "image[]")  # names of the file of a form, the second where clients send lists
MOST_PARTS = 64  # of a form


def router(served: Served) -> APIRouter:
    """Return the routes of one server."""
    routes = APIRouter()
    programs = served.model.programs

    @routes.post(
        "/v1/images/generations",
        responses=answers(ImagesResponse, stream=True),
        openapi_extra={"requestBody": _json_body("Generation")},
        summary="Draw pictures of a sentence",
        tags=["images"],
    )
    async def generations(request: Request) -> Response:
        given = await follow.body_of(request, Generation)
        count = _checked(served, given)
        seed, options = follow.chosen(served, given)
        program = programs.draw(given.prompt, count, seed, options)
        return await _answer(served, request, program, given, seed, "image_generation")

    @routes.post(
        "/v1/images/edits",
        responses=answers(ImagesResponse, stream=True),
        openapi_extra={"requestBody": _edit_body()},
        summary="Change a picture as a sentence says",
        tags=["images"],
    )
    async def edits(request: Request) -> Response:
        given, data = await _edit(request)
        count = _checked(served, given)
        seed, options = follow.chosen(served, given)
        image = await served.opener.open(data)
        program = programs.edit(image, given.prompt, count, seed, options)
        return await _answer(served, request, program, given, seed, "image_edit")

    return routes


def _checked(served: Served, given: Drawing) -> int:
    """Return how many pictures are wanted. Raises ApiError for what this server does not do."""
    follow.check_model(served, given.model)
    follow.check_text(served, given.prompt, "prompt")
    own = _size(served)
    if given.size not in (None, "auto", own):
        message = f"size: given {given.size}, allowed are auto and {own}"
        raise ApiError(400, message, code="invalid_value", param="size")
    if given.partial_images and not given.stream:
        message = "partial_images: there are none without a stream; give stream: true"
        raise ApiError(400, message, code="invalid_value", param="partial_images")
    return given.n or 1


async def _answer(
    served: Served,
    request: Request,
    program: Program[Tensor],
    given: Drawing,
    seed: int,
    kind: str,
) -> Response:
    count = given.n or 1
    follow.note(served, request, n=count, stream=bool(given.stream), prompt=given.prompt)
    usage = _usage(served, given, count)
    if not given.stream:
        images = await follow.pngs(await follow.finished(served, request, program))
        body = ImagesResponse(
            created=int(time.time()),
            data=[Picture(b64_json=image) for image in images],
            size=_size(served),
            usage=usage,
            seed=seed,
        )
        return JSONResponse(body.model_dump())

    def event(name: str, image: str, index: int, **more: Any) -> tuple[str, Mapping[str, Any]]:
        whole = ImageEvent(
            type=f"{kind}.{name}",
            b64_json=image,
            created_at=int(time.time()),
            index=index,
            seed=seed + index,
            size=_size(served),
            **more,
        )
        return whole.type, whole.model_dump(exclude_none=True)

    async def told(made: Preview | Tensor) -> list[tuple[str, Mapping[str, Any]]]:
        if isinstance(made, Preview):
            (image,) = await follow.pngs(made.image[None])
            return [event("partial_image", image, made.place, partial_image_index=made.index)]
        done = enumerate(await follow.pngs(made))
        one = _usage(served, given, 1)
        return [event("completed", image, index, usage=one) for index, image in done]

    return await follow.streamed(served, request, program, told, given.partial_images or 0)


async def _edit(request: Request) -> tuple[Edit, bytes]:
    """Return the fields of an edit and the picture, from a form or from JSON."""
    if not request.headers["content-type"].lower().startswith("multipart/"):
        given = await follow.body_of(request, EditJson)
        return given, follow.of_data_url(given.images[0].image_url)
    try:
        async with request.form(max_files=2, max_fields=MOST_PARTS) as form:
            return await _of_form(form)
    except HTTPException as error:
        message = f"the form cannot be read: {str(error.detail)[:100]}"
        raise ApiError(400, message, code="invalid_form") from None


async def _of_form(form: FormData) -> tuple[Edit, bytes]:
    fields: dict[str, str] = {}
    pictures: list[bytes] = []
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            if name not in FILES:
                message = f"unknown file {name[:100]!r}; allowed is image, one (masks are not)"
                raise ApiError(400, message, code="unknown_field", param=name[:100])
            pictures.append(await value.read())
        elif name in fields:
            message = f"{name[:100]}: given more than once"
            raise ApiError(400, message, code="invalid_value", param=name[:100])
        else:
            fields[name] = value
    try:
        given = Edit.model_validate_strings(fields)
    except pydantic.ValidationError as error:
        raise of_validation(error, [*Edit.model_fields, "image"]) from None
    if len(pictures) != 1:
        message = f"image: given {len(pictures)} files, allowed is one"
        raise ApiError(400, message, code="invalid_value", param="image")
    return given, pictures[0]


def _size(served: Served) -> str:
    side = served.model.tokenizer.image_size
    return f"{side}x{side}"


def _usage(served: Served, given: Drawing, count: int) -> ImageUsage:
    assert served.model.text is not None
    each = served.model.tokenizer.num_tokens
    text = len(served.model.text.encode(given.prompt))
    seen = each if isinstance(given, Edit) else 0
    return ImageUsage(
        input_tokens=text + seen,
        input_tokens_details=InputDetails(text_tokens=text, image_tokens=seen),
        output_tokens=count * each,
        total_tokens=text + seen + count * each,
    )


def _json_body(name: str) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{name}"}
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _edit_body() -> dict[str, Any]:
    """Describe both bodies of an edit."""
    body = _json_body("EditJson")
    fields = Edit.model_json_schema()
    fields["properties"]["image"] = {
        "type": "string",
        "format": "binary",
        "description": "PNG, JPEG, WebP, GIF or BMP.",
    }
    fields["required"] = ["prompt", "image"]
    body["content"]["multipart/form-data"] = {"schema": fields}
    return body
