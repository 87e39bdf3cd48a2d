"""/v1/chat/completions: words about pictures, and pictures of words.

Of a conversation the model takes the last user's turn, and the last picture anywhere in it, so that
a picture it has drawn can be edited and asked about. With "image" in `modalities` it draws, or
edits where there is a picture; without, it answers a question about the picture, or describes it
where nothing is asked. Pictures come back as OpenRouter sends them: `message.images`.
"""

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from torch import Tensor

from ddt_llama.generation.work import Program
from ddt_llama.serving import follow
from ddt_llama.serving.documented import answers
from ddt_llama.serving.errors import ApiError
from ddt_llama.serving.schema import (
    Answer,
    AnswerImage,
    Chat,
    ChatUsage,
    Choice,
    Completion,
    Message,
    TextPart,
)
from ddt_llama.serving.served import Served


@dataclass(frozen=True)
class Asked:
    """What is asked of the model."""

    text: str
    image: bytes | None
    draws: bool


def router(served: Served) -> APIRouter:
    """Return the routes of one server."""
    routes = APIRouter()
    schema = {"$ref": "#/components/schemas/Chat"}
    body = {"required": True, "content": {"application/json": {"schema": schema}}}

    @routes.post(
        "/v1/chat/completions",
        responses=answers(Completion, stream=True),
        openapi_extra={"requestBody": body},
        summary="Ask about a picture, describe, draw or edit one",
        tags=["chat"],
    )
    async def completions(request: Request) -> Response:
        given = await follow.body_of(request, Chat)
        follow.check_model(served, given.model)
        asked = _asked(given)
        follow.check_text(served, asked.text, "messages")
        if not asked.draws and (given.n or 1) > 1:
            message = "n: an answer in words is the likeliest one, always the same; allowed is 1"
            raise ApiError(400, message, code="invalid_value", param="n")
        return await _Conversation(served, request, given, asked).answer()

    return routes


def _asked(given: Chat) -> Asked:
    """Return the last turn's words and the last picture of a conversation."""
    if given.messages[-1].role != "user":
        message = "messages: the last one must be the user's"
        raise ApiError(400, message, code="invalid_value", param="messages")
    text = " ".join(_texts(given.messages[-1])).strip()
    pictures = [url for message in given.messages for url in _pictures(message)]
    draws = "image" in (given.modalities or ())
    if draws and not text:
        message = "messages: say in words what to draw, or what to change"
        raise ApiError(400, message, code="invalid_value", param="messages")
    if not draws and not pictures:
        message = (
            "messages: this model speaks of pictures only; send one as an image_url part, or give "
            'modalities: ["image"] to have one drawn'
        )
        raise ApiError(400, message, code="no_picture", param="messages")
    return Asked(text, follow.of_data_url(pictures[-1]) if pictures else None, draws)


def _texts(message: Message) -> list[str]:
    if isinstance(message.content, str):
        return [message.content]
    return [part.text for part in message.content or () if isinstance(part, TextPart)]


def _pictures(message: Message) -> list[str]:
    parts = [] if isinstance(message.content, str) else [*(message.content or ())]
    shown = [*parts, *(message.images or ())]
    return [part.image_url.url for part in shown if not isinstance(part, TextPart)]


class _Conversation:
    """One request on its way to its answer."""

    def __init__(self, served: Served, request: Request, given: Chat, asked: Asked) -> None:
        self.served, self.request, self.given, self.asked = served, request, given, asked
        self.count = given.n or 1
        self.seed: int | None = None
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

    async def answer(self) -> Response:
        """Return the completion, whole or as chunks."""
        given, asked = self.given, self.asked
        kind = "ask" if asked.text else "describe"
        if asked.draws:
            kind = "draw" if asked.image is None else "edit"
        streams = bool(given.stream)
        follow.note(
            self.served, self.request, kind=kind, n=self.count, stream=streams, prompt=asked.text
        )
        program = await self._program(kind)
        if streams:
            return await follow.streamed(self.served, self.request, program, self._chunks)
        made = await follow.finished(self.served, self.request, program)
        body = await self._completion(made)
        return JSONResponse(body.model_dump())

    async def _program(self, kind: str) -> Program[Any]:
        can, text = self.served.model.programs, self.asked.text
        image = None
        if self.asked.image is not None:
            image = await self.served.opener.open(self.asked.image)
        if kind in ("draw", "edit"):
            self.seed, options = follow.chosen(self.served, self.given)
            if image is None:
                return can.draw(text, self.count, self.seed, options)
            return can.edit(image, text, self.count, self.seed, options)
        assert image is not None
        return can.ask(image, text) if kind == "ask" else can.describe(image)

    async def _completion(self, made: Tensor | list[str]) -> Completion:
        text = self.served.model.text
        assert text is not None
        each = self.served.model.tokenizer.num_tokens
        read = len(text.encode(self.asked.text)) + (each if self.asked.image is not None else 0)
        if isinstance(made, Tensor):
            choices = [
                Choice(index=index, message=_shown(image), finish_reason="stop")
                for index, image in enumerate(await follow.pngs(made))
            ]
            written = each * self.count
        else:
            ids = text.encode(made[0])
            most = self.given.max_completion_tokens or self.given.max_tokens or len(ids)
            cut = len(ids) > most
            words = text.decode(ids[:most]) if cut else made[0]
            reason = "length" if cut else "stop"
            choices = [Choice(index=0, message=Answer(content=words), finish_reason=reason)]
            written = min(len(ids), most)
        return Completion(
            id=self.id,
            created=self.created,
            model=self.served.model.name,
            choices=choices,
            usage=ChatUsage(
                prompt_tokens=read, completion_tokens=written, total_tokens=read + written
            ),
            seed=self.seed,
        )

    async def _chunks(self, made: Any) -> list[tuple[str, Mapping[str, Any]]]:
        """Return the chunks of the whole answer: its beginning, its content, its end."""
        whole = await self._completion(made)
        parts: list[dict[str, Any]] = []
        for choice in whole.choices:
            delta = choice.message.model_dump(exclude_none=True)
            for said, reason in (
                ({"role": delta.pop("role"), "content": ""}, None),
                (delta, None),
                ({}, choice.finish_reason),
            ):
                one = {"index": choice.index, "delta": said, "finish_reason": reason}
                parts.append({"choices": [{**one, "logprobs": None}]})
        if self.given.stream_options and self.given.stream_options.include_usage:
            parts.append({"choices": [], "usage": whole.usage.model_dump()})
        same = {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": whole.model,
            "seed": self.seed,
        }
        return [("", {**same, **part}) for part in parts]


def _shown(image: str) -> Answer:
    url: Any = {"url": f"data:image/png;base64,{image}"}
    return Answer(images=[AnswerImage(index=0, image_url=url)])
