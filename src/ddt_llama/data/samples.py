"""Make samples of rows: captioned pictures, edits, questions.

Between `records` (fields as they were stored) and `sources` (which decodes and skips). What a field
must be called to be found is written here, in one place.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Literal, TypeVar

from jaxtyping import Float, Int
from torch import Tensor

from ddt_llama.data.images import BrokenImage
from ddt_llama.data.records import Record, Stored

CAPTION_FIELDS = ("txt", "caption", "text", "prompt", "description")
INSTRUCTION_FIELDS = ("txt", "instruction", "edit_prompt", "edit", "prompt", "text")
QUESTION_LINE = re.compile(r"Q:\s*(.+?)\s*A:\s*(.+)")

Kind = Literal["image", "edit", "question"]
S = TypeVar("S")
Pictures = Sequence[Stored]
Image = Float[Tensor, "3 h w"] | Int[Tensor, " k"]  # pixels in [-1, 1], or the codes of a tokenizer
Tensors = Sequence[Tensor]


@dataclass(frozen=True)
class Sample:
    """A picture with its caption, where there is one.

    `key` is the name that the data give, `row` the place in them, which alone is unique.
    """

    image: Image
    caption: str | None
    key: str
    row: int = 0


@dataclass(frozen=True)
class EditSample:
    """A picture, an instruction and the picture that it asks for."""

    source: Image
    instruction: str
    target: Image
    key: str
    source_caption: str | None = None
    target_caption: str | None = None
    row: int = 0


@dataclass(frozen=True)
class QuestionSample:
    """A picture with all its (question, answer) pairs."""

    image: Image
    pairs: tuple[tuple[str, str], ...]
    key: str
    row: int = 0


@dataclass(frozen=True)
class Form(Generic[S]):
    """How a record becomes a sample.

    `parse` gives its pictures and what its texts are, `make` puts key, row, decoded pictures and
    texts together, `texts` lists the texts, `columns` are the texts as a record keeps them (and
    `parse` finds them again); `roles` say what the pictures are.
    """

    parse: Callable[[Record], tuple[Pictures, Any]]
    make: Callable[[str, int, Tensors, Any], S]
    texts: Callable[[Any], list[str]]
    columns: Callable[[Any], dict[str, Any]]
    roles: tuple[str, ...] = ("image",)


def form_of(kind: Kind, caption_column: str | None) -> Form[Any]:
    """Return how rows become samples of `kind`."""
    return {
        "image": Form(
            partial(_parse_image, caption_column),
            lambda key, row, images, caption: Sample(images[0], caption, key, row),
            lambda caption: [] if caption is None else [caption],
            lambda caption: {"caption": caption},
        ),
        "edit": Form(
            _parse_edit,
            lambda key, row, images, texts: EditSample(
                images[0], texts[0], images[1], key, *texts[1:], row=row
            ),
            lambda texts: [texts[0]],
            lambda texts: dict(
                zip(("instruction", "src_caption", "tgt_caption"), texts, strict=True)
            ),
            ("source", "target"),
        ),
        "question": Form(
            _parse_question,
            lambda key, row, images, pairs: QuestionSample(images[0], pairs, key, row),
            lambda pairs: [text for pair in pairs for text in pair],
            lambda pairs: {"qa": [list(pair) for pair in pairs]},
        ),
    }[kind]


def kind_of(record: Record) -> Kind:
    """Return what this row offers beyond a plain picture."""
    if "source" in record.pictures:
        return "edit"
    return "question" if _pairs(record.fields) else "image"


def _parse_image(caption_column: str | None, record: Record) -> tuple[Pictures, str | None]:
    fields = record.fields
    for role in ("image", "target"):
        if role in record.pictures:
            break
    else:
        raise BrokenImage(record.key, "no picture in this row")
    picture = record.pictures[role]
    if caption_column is not None:
        return [picture], _text(fields.get(caption_column))
    if role == "target":
        return [picture], _text(fields.get("tgt_caption"))
    if _pairs(fields):
        return [picture], None
    return [picture], _first_text(fields, CAPTION_FIELDS)


def _parse_edit(record: Record) -> tuple[Pictures, tuple[str, str | None, str | None]]:
    missing = [role for role in ("source", "target") if role not in record.pictures]
    if missing:
        raise BrokenImage(record.key, f"no {missing[0]} picture")
    fields = record.fields
    instruction = _first_text(fields, INSTRUCTION_FIELDS)
    if instruction is None:
        raise BrokenImage(record.key, "no instruction")
    captions = (_text(fields.get("src_caption")), _text(fields.get("tgt_caption")))
    return [record.pictures["source"], record.pictures["target"]], (instruction, *captions)


def _parse_question(record: Record) -> tuple[Pictures, tuple[tuple[str, str], ...]]:
    pairs = _pairs(record.fields)
    if "image" not in record.pictures or not pairs:
        raise BrokenImage(record.key, "no picture with questions and answers")
    return [record.pictures["image"]], pairs


def _pairs(fields: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Read questions from columns (question, answer), a list (qa), or lines "Q: ... A: ..."."""
    question, answer = _text(fields.get("question")), _text(fields.get("answer"))
    if question and answer:
        return ((question, answer),)
    listed = fields.get("qa")
    if isinstance(listed, list):
        both = [[_text(part) for part in pair] for pair in listed if isinstance(pair, list)]
        return tuple((pair[0], pair[1]) for pair in both if len(pair) == 2 and pair[0] and pair[1])
    text = fields.get("txt")
    if not isinstance(text, str):
        return ()
    found = [QUESTION_LINE.fullmatch(line.strip()) for line in text.strip().splitlines()]
    return tuple((one[1].strip(), one[2].strip()) for one in found if one)


def _first_text(fields: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((text for name in names if (text := _text(fields.get(name)))), None)


def _text(value: Any) -> str | None:
    """Return a text without outer blanks; of several captions (a list) the first."""
    if isinstance(value, list | tuple) and value:
        value = value[0]
    return (value.strip() or None) if isinstance(value, str) else None
