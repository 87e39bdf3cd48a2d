"""Documents: every task of the language model, rendered to ids and a loss mask in one place.

A document is what is given and what is to be written, each a row of texts and images. `render` is
the only function that lays one out, for training and for prompts, so a mask bug has one home.
Source: the sequence layouts of DDT-LLaMA (stages 1 and 2) and the four kinds of Selftok's stage 1.
"""

from collections import abc
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from itertools import chain
from typing import Literal, NamedTuple, get_args

from ddt_llama.config import UserError
from ddt_llama.language.text import TextTokenizer
from ddt_llama.language.vocabulary import Vocabulary

Kind = Literal[
    "text_to_image",
    "image_to_text",
    "image_only",
    "text_only",
    "draw",
    "edit",
    "ask",
    "describe",
    "plan",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
PRETRAINING: tuple[Kind, ...] = KINDS[:4]
DESCRIBE = "Describe the picture."
PLAN = "Plan a picture:"
LAYOUT = ("USER:", "ASSISTANT:")  # what stands before a request and before its answer
IGNORED = -100  # the label that torch's and transformers' cross-entropy leave out


@dataclass(frozen=True)
class Text:
    """A piece of text."""

    text: str


@dataclass(frozen=True)
class Image:
    """An image as the codes of the image tokenizer, in the order the language model reads them."""

    codes: tuple[int, ...]


Part = Text | Image


@dataclass(frozen=True)
class Document:
    """What is given and what is to be written.

    `answer` None makes it a prompt: the model is to write the answer, an image where
    `writes_image`, else text. `further` turns follow the first, each a request and its answer; the
    last answer may be None instead.
    """

    kind: Kind
    given: tuple[Part, ...]
    answer: Part | None
    further: tuple[tuple[tuple[Part, ...], Part | None], ...] = ()

    @property
    def is_prompt(self) -> bool:
        """Say whether the model is to write what comes next."""
        return (self.further[-1][1] if self.further else self.answer) is None

    @property
    def writes_image(self) -> bool:
        """Say whether the answer is (or is to be) an image."""
        return self.kind in ("text_to_image", "image_only", "draw", "edit")


class Sequence(NamedTuple):
    """Ids of one document, and which of them the loss counts as targets."""

    ids: list[int]
    supervised: list[bool]
    kind: Kind


def text_to_image(caption: str, codes: abc.Sequence[int] | None) -> Document:
    """Stage 1: a caption, then its image."""
    return Document("text_to_image", (Text(caption),), _image(codes))


def image_to_text(codes: abc.Sequence[int], caption: str | None) -> Document:
    """Stage 1: an image, then its caption."""
    return Document("image_to_text", (Image(tuple(codes)),), _text(caption))


def image_only(codes: abc.Sequence[int] | None) -> Document:
    """Stage 1: an image without any text; also what guidance contrasts `text_to_image` with."""
    return Document("image_only", (), _image(codes))


def text_only(text: str | None) -> Document:
    """Stage 1: text alone."""
    return Document("text_only", (), _text(text))


def draw(prompt: str, codes: abc.Sequence[int] | None) -> Document:
    """Stage 2: a request, answered by an image."""
    return Document("draw", (Text(prompt),), _image(codes))


def edit(source: abc.Sequence[int], instruction: str, target: abc.Sequence[int] | None) -> Document:
    """Stage 2: an instruction and an image, answered by the changed image.

    The instruction comes first: then each code of the answer stands equally far from the code of
    the source at its place, whatever the length of the instruction, and copying is easy to learn.
    """
    return Document("edit", (Text(instruction), Image(tuple(source))), _image(target))


def ask(
    codes: abc.Sequence[int],
    question: str,
    answer: str | None,
    further: abc.Sequence[tuple[str, str | None]] = (),
) -> Document:
    """Stage 2: an image and a question, answered by text; `further` questions with answers."""
    given = (Image(tuple(codes)), Text(question))
    return Document("ask", given, _text(answer), _questions(further))


def conclusion(answer: str) -> str:
    """Return what an answer says behind its thought ("two rings, a star: yes" says "yes")."""
    return answer.rpartition(": ")[2].strip()


def describe(codes: abc.Sequence[int], caption: str | None) -> Document:
    """Stage 2: an image and the request to describe it, answered by its caption."""
    return Document("describe", (Image(tuple(codes)), Text(DESCRIBE)), _text(caption))


def plan(
    prompt: str,
    description: str | None,
    further: abc.Sequence[tuple[str, str | None]] = (),
) -> Document:
    """Stage 2: a request for a picture, answered by a complete description of one that fits it.

    `further` questions with answers are about the picture described, which nobody has drawn.
    """
    given = (Text(PLAN), Text(prompt))
    return Document("plan", given, _text(description), _questions(further))


def to_change(description: str, instruction: str) -> str:
    """Word the request of a `plan` for an edit: what is there, and what is to be changed.

    Its answer says in the words of the description what to do: "add A", "remove B", "change B to
    C".
    """
    return f"{description}; {instruction}"


def change_all(description: str, target: str) -> str:
    """Word the plan of an edit after which another description holds."""
    return f"change {description} to {target}"


def changed(description: str, change: str) -> str:
    """Return a list of phrases, the last about the background, after the change planned for it.

    What is removed or changed is the first phrase that is told so, or else the likest, or the
    whole (`change_all`); a change that is not worded as `to_change` says changes nothing.
    """
    everything = change_all(description, "")
    if change.startswith(everything):
        return change.removeprefix(everything)
    parts = description.split(", ")
    verb, _, rest = change.partition(" ")
    before, _, after = rest.partition(" to ")
    words = [SequenceMatcher(None, part.split(), before.split()) for part in parts]
    likest = max(range(len(parts)), key=lambda place: words[place].ratio())
    if verb == "add":
        parts.insert(len(parts) - 1, rest)
    elif verb == "remove":
        del parts[likest]
    elif verb == "change" and after:
        parts[likest] = after
    return ", ".join(parts)


def with_result(instruction: str, description: str) -> str:
    """Word the instruction of an `edit` whose result was planned."""
    return f"{instruction}; {description}"


def source(document: Document) -> tuple[int, ...] | None:
    """Return the codes that an edit starts from; None for documents of other kinds."""
    if document.kind != "edit":
        return None
    return next(part.codes for part in document.given if isinstance(part, Image))


def without_text(document: Document) -> Document:
    """Drop the texts that are given and keep the images: the unconditional twin for guidance.

    Training drops the text of about one document in ten this way; at inference the twin of the
    prompt is the second row of classifier-free guidance.
    """
    given = tuple(part for part in document.given if isinstance(part, Image))
    return replace(document, given=given)


def render(
    document: Document,
    vocabulary: Vocabulary,
    text: TextTokenizer,
    *,
    max_length: int | None = None,
    max_text: int | None = None,
) -> Sequence:
    """Lay a document out as ids, and mark the targets of the loss.

    Marks: B bos, E eos, [ begin_image, ] end_image; # the codes of an image; = those of an edited
    image, where the mark `same` stands for each code that the source has at the same place, so that
    what an edit leaves alone need not be learned by heart. Each text is encoded on its own. `^`
    stands under what is supervised, `|` shows where the prompt (answer None) ends.

        text_to_image   B caption [|# ] E                   stage 1: all but B
                          ^       ^ ^ ^ ^
        image_to_text   B [ # ]|caption E
                          ^ ^ ^ ^       ^
        image_only      B [|# ] E
                          ^ ^ ^ ^
        text_only       B|text E
                          ^    ^
        draw            B USER: prompt ASSISTANT: [|# ] E   stage 2: the answer only
                                                  ^ ^ ^ ^
        edit            B USER: instruction [ # ] ASSISTANT: [|= ] E
                                                             ^ ^ ^ ^
        ask, describe   B USER: [ # ] question ASSISTANT:|answer E
                                                          ^      ^
        plan            B USER: Plan a picture: prompt ASSISTANT:|description E
                                                                  ^           ^
        further turns   ... USER: question ASSISTANT: answer E
                                                      ^      ^

    So the ids of a prompt followed by the ids of its answer are the ids of the whole document.
    `max_text` keeps the first so many ids of every text (captions of any length in training).
    `max_length` bounds the whole, the answer image still to be written included; further turns that
    do not fit are left out.
    Raises UserError for an image of another length, a code out of range, or a document too long.
    """
    ids = [vocabulary.bos]
    supervised = [False]
    stage_1 = document.kind in PRETRAINING
    for given, answer in ((document.given, document.answer), *document.further):
        request = [_part_ids(part, vocabulary, text, max_text) for part in given]
        if not stage_1:
            request = [text.encode(LAYOUT[0]), *request, text.encode(LAYOUT[1])]
        answered = _answer_ids(document, answer, vocabulary, text, max_text)
        turn = [*chain(*request), *answered]
        if len(ids) > 1 and max_length is not None and len(ids) + len(turn) > max_length:
            break
        ids += turn
        supervised += [stage_1] * (len(ids) - len(supervised) - len(answered))
        supervised += [True] * len(answered)
    if max_length is not None:
        _check_length(document, len(ids), vocabulary, max_length)
    return Sequence(ids, supervised, document.kind)


def _image(codes: abc.Sequence[int] | None) -> Image | None:
    return None if codes is None else Image(tuple(codes))


def _text(text: str | None) -> Text | None:
    return None if text is None else Text(text)


def _questions(
    pairs: abc.Sequence[tuple[str, str | None]],
) -> tuple[tuple[tuple[Part, ...], Part | None], ...]:
    return tuple(((Text(asked),), _text(answered)) for asked, answered in pairs)


def _part_ids(
    part: Part, vocabulary: Vocabulary, text: TextTokenizer, max_text: int | None
) -> list[int]:
    if isinstance(part, Text):
        return text.encode(part.text)[:max_text]
    return _image_ids(part.codes, vocabulary)


def _image_ids(
    codes: abc.Sequence[int], vocabulary: Vocabulary, source: abc.Sequence[int] | None = None
) -> list[int]:
    if len(codes) != vocabulary.num_tokens:
        raise UserError(
            f"image of {len(codes)} codes: allowed are exactly {vocabulary.num_tokens}; "
            "encode it with the tokenizer this language model was trained with"
        )
    ids = vocabulary.ids_of(codes)
    if source is not None:
        pairs = zip(ids, codes, source, strict=True)
        ids = [vocabulary.same if code == there else index for index, code, there in pairs]
    return [vocabulary.begin_image, *ids, vocabulary.end_image]


def _answer_ids(
    document: Document,
    answer: Part | None,
    vocabulary: Vocabulary,
    text: TextTokenizer,
    max_text: int | None,
) -> list[int]:
    if answer is None:
        return [vocabulary.begin_image] if document.writes_image else []
    if isinstance(answer, Image):
        return [*_image_ids(answer.codes, vocabulary, source(document)), vocabulary.eos]
    return [*_part_ids(answer, vocabulary, text, max_text), vocabulary.eos]


def _check_length(document: Document, length: int, vocabulary: Vocabulary, limit: int) -> None:
    prompt = document.is_prompt
    to_come = vocabulary.num_tokens + 2 if prompt and document.writes_image else int(prompt)
    if length + to_come > limit:
        raise UserError(
            f"text too long: given {length} tokens and {to_come} still to be written, "
            f"allowed are {limit} in all; shorten the text"
        )
