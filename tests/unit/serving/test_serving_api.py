"""The interface, by OpenAI's own client: each picture and answer is the model's own."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import PIL.Image
import pytest
from tiny_model import TOKENS, cut_answers_short, tiny_model
from tiny_server import Running, data_url, picture_of, png, running

from ddt_llama.generation import Model, Settings
from ddt_llama.serving.documented import BODIES
from ddt_llama.serving.schema import Chat, EditJson, Generation


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_answers_short(monkeypatch)


@pytest.fixture(scope="module")
def here() -> Iterator[Running]:
    with running() as server:
        yield server


@pytest.fixture(scope="module")
def twin() -> Model:
    """The same model, asked without a server."""
    return tiny_model(Settings(steps=2))


def same(shown: str | None, picture: PIL.Image.Image) -> bool:
    return picture_of(shown).tobytes() == picture.tobytes()


def test_it_names_its_model(here: Running) -> None:
    (only,) = here.client.models.list().data
    assert (only.id, only.object, only.owned_by) == ("tiny", "model", "ddt-llama")
    assert here.client.models.retrieve("tiny") == only
    with pytest.raises(openai.NotFoundError, match="allowed is 'tiny'") as told:
        here.client.models.retrieve("owner/other")
    assert told.value.code == "model_not_found"


def test_pictures_of_a_sentence(here: Running, twin: Model) -> None:
    made = here.client.images.generate(
        prompt="a red circle",
        model="tiny",
        n=2,
        size="16x16",
        quality="high",
        response_format="b64_json",
        user="somebody",
        extra_body={"seed": 7, "guidance_scale": 2.0, "steps": 3, "top_k": 9, "temperature": 0.5},
    )
    drawn = twin.draw(
        "a red circle", num=2, seed=7, guidance_scale=2.0, steps=3, top_k=9, temperature=0.5
    )
    assert made.data is not None
    assert made.usage is not None
    assert [same(one.b64_json, own) for one, own in zip(made.data, drawn, strict=True)] == [
        True
    ] * 2
    assert (made.size, made.output_format, made.background) == ("16x16", "png", "opaque")
    assert made.usage.output_tokens == 2 * TOKENS
    text = len(twin.text.encode("a red circle")) if twin.text else 0
    assert made.usage.input_tokens == text > 0


def test_a_seed_that_was_not_given_is_told(here: Running, twin: Model) -> None:
    bodies = [here.send("/v1/images/generations", {"prompt": "a ring"}).body for _ in range(2)]
    assert bodies[0]["seed"] != bodies[1]["seed"]
    for body in bodies:
        (own,) = twin.draw("a ring", seed=body["seed"])
        assert same(body["data"][0]["b64_json"], own)


def test_a_changed_picture_from_a_form_and_from_json(here: Running, twin: Model) -> None:
    own = twin.edit(png(90), "blue", num=2, seed=3, top_p=0.8, steps=1)
    fields: dict[str, Any] = {"seed": 3, "top_p": 0.8, "steps": 1}
    form = here.client.images.edit(image=png(90), prompt="blue", n=2, extra_body=fields)
    listed = here.client.images.edit(
        image=[("a.png", png(90), "image/png")], prompt="blue", n=2, extra_body=fields
    )
    body = {"prompt": "blue", "n": 2, "images": [{"image_url": data_url(png(90))}], **fields}
    plain = here.send("/v1/images/edits", body)
    assert plain.status == 200
    for data in (form.data, listed.data):
        assert data is not None
        assert [same(one.b64_json, picture) for one, picture in zip(data, own, strict=True)]
    shown = [one["b64_json"] for one in plain.body["data"]]
    assert all(same(one, picture) for one, picture in zip(shown, own, strict=True))
    assert plain.body["usage"]["input_tokens_details"]["image_tokens"] == TOKENS


@pytest.mark.parametrize("kind", ["image_generation", "image_edit"])
def test_a_stream_shows_partial_images_and_then_the_whole(
    here: Running, twin: Model, kind: str
) -> None:
    client, extra = here.client, {"seed": 4}
    if kind == "image_edit":
        own = twin.edit(png(), "a ring", num=2, seed=4)
        events: list[Any] = list(
            client.images.edit(
                image=png(),
                prompt="a ring",
                n=2,
                stream=True,
                partial_images=2,
                extra_body=extra,
            )
        )
    else:
        own = twin.draw("a ring", num=2, seed=4)
        events = list(
            client.images.generate(
                prompt="a ring", n=2, stream=True, partial_images=2, extra_body=extra
            )
        )
    partial, whole = events[:4], events[4:]
    assert [event.type for event in partial] == [f"{kind}.partial_image"] * 4
    assert sorted((event.index, event.partial_image_index) for event in partial) == [
        (index, number) for index in range(2) for number in range(2)
    ]
    assert all(picture_of(event.b64_json).size == (16, 16) for event in partial)
    assert [event.type for event in whole] == [f"{kind}.completed"] * 2
    assert [event.seed for event in whole] == [4, 5]
    assert all(same(event.b64_json, picture) for event, picture in zip(whole, own, strict=True))
    assert not any(same(event.b64_json, picture) for event in partial for picture in own)
    assert whole[0].usage.output_tokens == TOKENS


def test_what_fails_before_the_first_event_is_an_answer_of_its_own(here: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="shorten the prompt"):
        here.client.images.generate(prompt="a ring " * 300, stream=True)


def turn(text: str | None, *pictures: bytes) -> Any:
    shown = [{"type": "image_url", "image_url": {"url": data_url(one)}} for one in pictures]
    return {
        "role": "user",
        "content": [*([{"type": "text", "text": text}] if text else []), *shown],
    }


def test_chat_answers_questions_and_describes(here: Running, twin: Model) -> None:
    asked = here.client.chat.completions.create(
        model="tiny",
        messages=[{"role": "system", "content": "be brief"}, turn("what is it", png(30))],
        temperature=0,
    )
    (choice,) = asked.choices
    assert choice.message.content == twin.ask(png(30), "what is it")
    assert (choice.finish_reason, choice.message.role) == ("stop", "assistant")
    assert asked.object == "chat.completion"
    assert asked.usage is not None
    assert asked.usage.total_tokens == asked.usage.prompt_tokens + asked.usage.completion_tokens
    described = here.client.chat.completions.create(model="tiny", messages=[turn(None, png(30))])
    assert described.choices[0].message.content == twin.describe(png(30))


def test_an_answer_can_be_cut_short(here: Running, twin: Model) -> None:
    assert twin.text is not None
    ids = twin.text.encode(twin.ask(png(30), "what is it"))
    assert len(ids) > 3
    made = here.client.chat.completions.create(
        model="tiny", messages=[turn("what is it", png(30))], max_completion_tokens=3
    )
    assert made.choices[0].finish_reason == "length"
    assert made.choices[0].message.content == twin.text.decode(ids[:3])
    assert made.usage is not None
    assert made.usage.completion_tokens == 3


def test_chat_draws_and_edits_what_it_drew(here: Running, twin: Model) -> None:
    messages: list[Any] = [{"role": "user", "content": "a red circle"}]
    options: dict[str, Any] = {"model": "tiny", "seed": 5, "extra_body": {"modalities": ["image"]}}
    made = here.client.chat.completions.create(messages=messages, n=2, **options)
    shown = [
        choice.message.model_dump()["images"][0]["image_url"]["url"] for choice in made.choices
    ]
    drawn = twin.draw("a red circle", num=2, seed=5)
    assert all(same(url, own) for url, own in zip(shown, drawn, strict=True))
    messages += [made.choices[1].message.model_dump(), turn("make it a ring")]
    changed = here.client.chat.completions.create(messages=messages, **options)
    (own,) = twin.edit(drawn[1], "make it a ring", seed=5)
    (image,) = changed.choices[0].message.model_dump()["images"]
    assert same(image["image_url"]["url"], own)
    messages[-1] = turn("what is it")
    told = here.client.chat.completions.create(messages=messages, model="tiny")
    assert told.choices[0].message.content == twin.ask(drawn[1], "what is it")


def test_chat_streams_chunks(here: Running, twin: Model) -> None:
    chunks = list(
        here.client.chat.completions.create(
            model="tiny",
            messages=[turn("what is it", png(60))],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    *said, last = chunks
    assert said[0].choices[0].delta.role == "assistant"
    words = "".join(chunk.choices[0].delta.content or "" for chunk in said)
    assert words == twin.ask(png(60), "what is it")
    assert said[-1].choices[0].finish_reason == "stop"
    assert last.choices == []
    assert last.usage is not None
    drawn = here.client.chat.completions.create(
        model="tiny",
        messages=[turn("a ring")],
        stream=True,
        seed=1,
        extra_body={"modalities": ["text", "image"]},
    )
    deltas = [chunk.choices[0].delta.model_dump() for chunk in drawn]
    (url,) = [delta["images"][0]["image_url"]["url"] for delta in deltas if delta.get("images")]
    assert same(url, twin.draw("a ring", seed=1)[0])


IMAGES, EDITS, CHAT = "/v1/images/generations", "/v1/images/edits", "/v1/chat/completions"
ASKED = {"messages": [{"role": "user", "content": "a ring"}]}
PICTURE = {"images": [{"image_url": data_url(png())}]}
LINKED = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        (IMAGES, b"{", None, "not JSON"),
        (IMAGES, b"", None, "not JSON"),
        (IMAGES, b"[" * 9_000, None, "not JSON"),
        (IMAGES, b"[" * 100_000, None, "100000 commas and brackets; allowed are 10000"),
        (IMAGES, b"[]", None, "the body: Input should be an object"),
        (IMAGES, b'{"prompt": "\\ud800"}', None, "not JSON"),
        (IMAGES, {}, "prompt", "is missing"),
        (IMAGES, {"prompt": " \n"}, "prompt", "is empty; say in words"),
        (IMAGES, {"prompt": 5}, "prompt", "string"),
        (IMAGES, {"prompt": "a" * 4001}, "prompt", "given 4001 characters, allowed are 4000"),
        (IMAGES, {"prompt": "a ring", "n": 11}, "n", "less than or equal to 10"),
        (IMAGES, {"prompt": "a ring", "n": "2"}, "n", "integer"),
        (IMAGES, {"prompt": "a ring", "seed": -1}, "seed", "greater than or equal to 0"),
        (IMAGES, {"prompt": "a ring", "size": "9x9"}, "size", "allowed are auto and 16x16"),
        (IMAGES, {"prompt": "a ring", "response_format": "url"}, "response_format", "b64_json"),
        (IMAGES, {"prompt": "a ring", "steps": 65}, "steps", "given 65, allowed are 1 to 64"),
        (IMAGES, {"prompt": "a ring", "steps": 0}, "steps", "given 0, allowed are 1 to 64"),
        (IMAGES, {"prompt": "a ring", "top_k": 2, "top_p": 0.5}, "top_k", "both given"),
        (IMAGES, {"prompt": "a ring", "temperature": 0}, "temperature", "use top_k=1"),
        (IMAGES, {"prompt": "a ring", "guidance_scale": -1}, "guidance_scale", "greater than"),
        (IMAGES, b'{"prompt": "a ring", "guidance_scale": NaN}', "guidance_scale", "finite"),
        (IMAGES, {"prompt": "a ring", "seeds": 1}, "seeds", "allowed are seed, guidance_scale"),
        (IMAGES, {"prompt": "a ring", "partial_images": 1}, "partial_images", "stream: true"),
        (IMAGES, {"prompt": "a ring " * 300}, None, "reads at most 496 and then writes 16"),
        (EDITS, {"prompt": "blue"}, "images", "is missing"),
        (EDITS, {"prompt": "blue", **PICTURE, "mask": {}}, "mask", "unknown field 'mask'"),
        (EDITS, {"prompt": "blue", "images": PICTURE["images"] * 2}, "images", "at most 1"),
        (EDITS, {"prompt": "b", "images": [{"file_id": "x"}]}, "images.0.image_url", "is missing"),
        (
            EDITS,
            {"prompt": "b", "images": [{"image_url": "data:,x"}]},
            "image_url",
            "no URL is ever",
        ),
        (
            EDITS,
            {"prompt": "b", "images": [{"image_url": "data:a;base64,%%%"}]},
            "image_url",
            "no base64",
        ),
        (
            EDITS,
            {"prompt": "b", "images": [{"image_url": "data:image/png;base64,aGVsbG8="}]},
            "image",
            "not a picture",
        ),
        (
            EDITS,
            {"prompt": "b", "images": [{"image_url": "file:///etc/passwd"}]},
            "images.0.image_url",
            "no URL is ever opened; send the picture",
        ),
        (CHAT, {}, "messages", "is missing"),
        (CHAT, {"messages": []}, "messages", "at least 1"),
        (CHAT, ASKED, "messages", "speaks of pictures only"),
        (CHAT, {"messages": [turn(None)], "modalities": ["image"]}, "messages", "say in words"),
        (CHAT, {"messages": [turn("why", png())], "n": 2}, "n", "always the same"),
        (CHAT, {**ASKED, "modalities": ["audio"]}, "modalities.0", "'text' or 'image'"),
        (CHAT, {**ASKED, "logprobs": True}, "logprobs", "False"),
        (CHAT, {**ASKED, "stop": "."}, "stop", "unknown field 'stop'; allowed are"),
        (
            CHAT,
            {"messages": [{"role": "assistant", "content": "a ring"}]},
            "messages",
            "must be the user's",
        ),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            "messages.0.content",
            "expected tags",
        ),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages.0.content.0.text",
            "messages.0.content.0.text: is missing",
        ),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [LINKED]}]},
            "messages.0.content.0.image_url.url",
            "no URL is ever opened",
        ),
    ],
)
def test_a_mistake_is_one_line_that_says_what_is_allowed(
    here: Running, path: str, body: Any, param: str | None, message: str
) -> None:
    answer = here.send(path, body)
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"
    assert any(part in answer.error["message"] for part in message.split("|")), answer.error
    assert param is None or (answer.error["param"] or "").startswith(param)
    assert len(answer.error["message"]) < 500


def form(*parts: tuple[str, str | None, bytes]) -> tuple[bytes, dict[str, str]]:
    """Return a form and its header; parts are names, file names and contents."""
    lines = b""
    for name, file, content in parts:
        tail = "" if file is None else f'; filename="{file}"'
        lines += f'--x\r\nContent-Disposition: form-data; name="{name}"{tail}\r\n\r\n'.encode()
        lines += content + b"\r\n"
    return lines + b"--x--\r\n", {"Content-Type": "multipart/form-data; boundary=x"}


PROMPT = ("prompt", None, b"blue")
FILE = ("image", "a.png", png())


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([PROMPT], "image: given 0 files, allowed is one"),
        ([PROMPT, FILE, FILE], "image: given 2 files, allowed is one"),
        ([PROMPT, FILE, FILE, FILE], "Too many files"),
        ([PROMPT, ("mask", "a.png", png())], "unknown file 'mask'"),
        ([PROMPT, PROMPT, FILE], "prompt: given more than once"),
        ([FILE], "prompt: is missing"),
        ([PROMPT, FILE, ("n", None, b"many")], "n: Input should be a valid integer"),
        ([PROMPT, FILE, ("masks", None, b"1")], "unknown field 'masks'; allowed are"),
        ([PROMPT, ("image", None, b"/etc/passwd")], "unknown field 'image'"),
        ([PROMPT, ("image", "../../etc/passwd", b"root")], "not a picture"),
        ([(f"n{i}", None, b"1") for i in range(70)], "Too many fields"),
    ],
)
def test_a_form_that_is_wrong_is_refused(here: Running, parts: Any, message: str) -> None:
    body, headers = form(*parts)
    answer = here.send(EDITS, body, headers=headers)
    assert answer.status == 400
    assert message in answer.error["message"]


def test_a_broken_form_is_refused(here: Running) -> None:
    body, headers = form(PROMPT, FILE)
    for sent, told in (
        (body[: len(body) // 2], headers),
        (b"nothing", headers),
        (body, {"Content-Type": "multipart/form-data"}),
    ):
        assert here.send(EDITS, sent, headers=told).status == 400


def test_the_document_describes_every_address_and_its_examples_are_good(here: Running) -> None:
    document = here.send("/openapi.json").body
    assert "422" not in json.dumps(document)
    assert set(document["paths"]) == {
        IMAGES,
        EDITS,
        CHAT,
        "/v1/models",
        "/v1/models/{name}",
        "/healthz",
        "/readyz",
        "/metrics",
    }
    assert "securitySchemes" not in document["components"]
    schemas = document["components"]["schemas"]
    for body in BODIES:
        examples = schemas[body.__name__]["examples"]
        assert all(body.model_validate_json(json.dumps(example)) for example in examples)
    for example in (*schemas["Generation"]["examples"], *schemas["Chat"]["examples"]):
        path = CHAT if "messages" in example else IMAGES
        assert here.send(path, example).status == 200
    assert here.send(EDITS, schemas["EditJson"]["examples"][0]).status == 200
    refs = {part.split('"')[0] for part in json.dumps(document).split("#/components/schemas/")[1:]}
    assert refs <= set(schemas)
    assert {Generation.__name__, EditJson.__name__, Chat.__name__} <= set(schemas)
