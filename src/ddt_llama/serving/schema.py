"""What clients send and get, field by field: OpenAI's names, and our own beside them.

Requests are checked by these classes, answers are made of them, and the OpenAPI document is drawn
from both, so that the three cannot part.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ddt_llama.generation.settings import MAX_GUIDANCE, SEED_LIMIT

MAX_IMAGES = 10  # a request
WORDS, DATA_URL = r"\S", "^data:"
PATTERNS = {  # what a text that does not fit them is told
    WORDS: "is empty; say in words what is wanted",
    DATA_URL: "no URL is ever opened; send the picture as data:image/png;base64,...",
}
A_PNG = (  # 16 x 16, red
    "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAIAAACQkWg2AAAAFklEQVR42mP4z8BAEmIY1TCqYfhqAACQ"
    "+f8B8u7oVwAAAABJRU5ErkJggg=="
)
Ignored = Annotated[
    str | None, Field(default=None, max_length=512, description="Taken, and of no effect.")
]


class Given(BaseModel):
    """A body: no other fields, no other types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Chance(Given):
    """Our own fields, beside OpenAI's; None takes what the model's release says."""

    seed: int | None = Field(
        None,
        ge=0,
        lt=SEED_LIMIT - MAX_IMAGES,
        description="The same seed draws the same picture; picture i of n is that of seed + i. "
        "Left out: a random one, which the answer names.",
    )
    guidance_scale: float | None = Field(
        None, ge=0, le=MAX_GUIDANCE, description="1 is the plain model, 3 follows words closely."
    )
    steps: int | None = Field(
        None,
        ge=0,
        description="Denoising steps; the server has a limit. 0 is the renderer, if there is one.",
    )
    temperature: float | None = Field(
        None, ge=0, description="Below 1 safer, above 1 more varied pictures. Not of text."
    )
    top_k: int | None = Field(
        None, ge=1, le=10**9, description="Choose among so many codes. Not beside top_p."
    )
    top_p: float | None = Field(
        None, gt=0, le=1, description="Choose among the likeliest codes of this joint probability."
    )


class Drawing(Chance):
    """What drawing and editing have in common."""

    prompt: str = Field(pattern=WORDS, description="What to draw, or what to change.")
    model: str | None = Field(None, description="The name that /v1/models lists, or nothing.")
    n: int | None = Field(None, ge=1, le=MAX_IMAGES, description="How many pictures; 1.")
    size: str | None = Field(
        None, max_length=20, description="auto, or the model's own, such as 64x64."
    )
    response_format: Literal["b64_json"] | None = Field(
        None, description="Pictures are in the answer itself; no URLs are made."
    )
    output_format: Literal["png"] | None = None
    background: Literal["auto", "opaque"] | None = None
    stream: bool | None = Field(None, description="Send server-sent events.")
    partial_images: int | None = Field(
        None, ge=0, le=3, description="Of each picture, with stream: true."
    )
    quality: Ignored
    user: Ignored
    safety_identifier: Ignored
    output_compression: int | None = Field(
        None, ge=0, le=100, description="Taken, and of no effect: PNG loses nothing."
    )


class Generation(Drawing):
    """A picture of a sentence."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompt": "a red circle above a blue square", "n": 2, "seed": 1},
                {"prompt": "two green stars", "stream": True, "partial_images": 2},
            ]
        }
    )
    moderation: Ignored
    style: Ignored


class Edit(Drawing):
    """A changed picture: the fields beside it in a form."""

    input_fidelity: Ignored


class Reference(Given):
    """A picture in a JSON body."""

    image_url: str = Field(
        pattern=DATA_URL, description="data:image/png;base64,... No other URL is ever opened."
    )


class EditJson(Edit):
    """A changed picture, as JSON."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "prompt": "paint the circle green",
                    "images": [{"image_url": f"data:image/png;base64,{A_PNG}"}],
                }
            ]
        }
    )
    images: list[Reference] = Field(min_length=1, max_length=1)


class TextPart(Given):
    """Words in a message."""

    type: Literal["text"]
    text: str


class ImageUrl(Given):
    """A picture in a message."""

    url: str = Field(
        pattern=DATA_URL, description="data:image/png;base64,... No other URL is ever opened."
    )
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Given):
    """A picture in a message."""

    type: Literal["image_url"]
    image_url: ImageUrl
    index: int | None = Field(None, description="As in answers, which may be sent back.")


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Given):
    """One turn; assistant's turns may be sent back as they were received."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None
    images: list[ImagePart] | None = Field(None, description="Of assistant's turns: its pictures.")
    name: Ignored
    refusal: None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: list[Any] | None = Field(None, max_length=0)


class StreamOptions(Given):
    """What a stream says beside the answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(None, description="Taken, and of no effect.")


class Chat(Chance):
    """A conversation; what is answered is its last user's turn, about its last picture."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "messages": [
                        {
                            "role": "user",
                            "content": [
                                {"type": "text", "text": "what colour is the circle?"},
                                {
                                    "type": "image_url",
                                    "image_url": {"url": f"data:image/png;base64,{A_PNG}"},
                                },
                            ],
                        }
                    ]
                },
                {
                    "messages": [{"role": "user", "content": "a red circle"}],
                    "modalities": ["image"],
                    "seed": 1,
                },
            ]
        }
    )
    messages: list[Message] = Field(min_length=1, max_length=1000)
    model: str | None = Field(None, description="The name that /v1/models lists, or nothing.")
    modalities: list[Literal["text", "image"]] | None = Field(
        None, min_length=1, max_length=2, description='With "image" a picture is drawn or edited.'
    )
    n: int | None = Field(None, ge=1, le=MAX_IMAGES, description="More than 1 of pictures only.")
    stream: bool | None = Field(None, description="Send server-sent events.")
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, description="Cuts an answer in words short.")
    max_completion_tokens: int | None = Field(None, ge=1, description="The same, by its new name.")
    user: Ignored
    safety_identifier: Ignored
    service_tier: Ignored
    prompt_cache_key: Ignored
    metadata: dict[str, str] | None = Field(None, description="Taken, and of no effect.")
    store: Literal[False] | None = None
    logprobs: Literal[False] | None = None
    presence_penalty: float | None = Field(None, ge=0, le=0)
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    tools: list[Any] | None = Field(None, max_length=0)


class ErrorFields(BaseModel):
    """What went wrong, in one line."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Error(BaseModel):
    """The body of every answer that is none."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "error": {
                        "message": "size: given 512x512, allowed are auto and 64x64",
                        "type": "invalid_request_error",
                        "param": "size",
                        "code": "invalid_value",
                    }
                }
            ]
        }
    )
    error: ErrorFields


class InputDetails(BaseModel):
    """Tokens of what was given."""

    text_tokens: int
    image_tokens: int


class ImageUsage(BaseModel):
    """Tokens of what was given and of the pictures returned; plans and tries are not counted."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    total_tokens: int


class Picture(BaseModel):
    """A PNG, in base64."""

    b64_json: str


class ImagesResponse(BaseModel):
    """Pictures; `seed` is that of the first, of the next one it is one more."""

    created: int
    data: list[Picture]
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png"] = "png"
    size: str
    quality: Literal["high"] = "high"
    usage: ImageUsage
    seed: int


class ImageEvent(BaseModel):
    """A part of a stream: a picture not finished yet (partial_image_index), or finished (usage)."""

    type: str
    b64_json: str
    created_at: int
    index: int = Field(description="Which of the n pictures.")
    seed: int
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png"] = "png"
    size: str
    quality: Literal["high"] = "high"
    partial_image_index: int | None = None
    usage: ImageUsage | None = None


class AnswerImage(BaseModel):
    """A picture in an answer."""

    index: int
    type: Literal["image_url"] = "image_url"
    image_url: dict[Literal["url"], str]


class Answer(BaseModel):
    """Assistant's turn: words, or pictures as data: URLs."""

    role: Literal["assistant"] = "assistant"
    content: str | None = None
    refusal: None = None
    images: list[AnswerImage] | None = None


class Choice(BaseModel):
    """One answer of `n`."""

    index: int
    message: Answer
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class ChatUsage(BaseModel):
    """Tokens of what was read and of what is returned; plans and tries are not counted."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """An answer to a conversation."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: ChatUsage
    seed: int | None = None


class Entry(BaseModel):
    """A model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["ddt-llama"] = "ddt-llama"


class Entries(BaseModel):
    """The models served: one."""

    object: Literal["list"] = "list"
    data: list[Entry]


class Health(BaseModel):
    """Whether the server is there."""

    status: Literal["ok"] = "ok"
