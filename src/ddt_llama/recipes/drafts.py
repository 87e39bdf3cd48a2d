"""What language models train on: drafts (pictures and texts), before pictures become codes.

A source gives drafts of one kind from one data set by index; `mixture` puts them into the order of
training. Pictures stay scenes or tensors here, so that a whole batch is rendered and encoded at
once.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any

from torch import Tensor

from ddt_llama import distributed
from ddt_llama.config import UserError
from ddt_llama.data.samples import EditSample, QuestionSample
from ddt_llama.data.samples import Kind as DataKind
from ddt_llama.data.sources import ImageSource, Reading, detect_kind, open_source
from ddt_llama.data.stream import Indexed, Stream
from ddt_llama.language import Document, documents
from ddt_llama.language.documents import Kind
from ddt_llama.recipes.data import ENDLESS, SHAPES, DataConfig, shapes_source
from ddt_llama.shapes.captions import (
    caption_and_plan,
    description,
    plan_of_edit,
    related_pairs,
)
from ddt_llama.shapes.edits import EditKind, edit
from ddt_llama.shapes.questions import QuestionKind, question
from ddt_llama.shapes.scene import Scene
from ddt_llama.shapes.world import ShapesSource, Task

Codes = Sequence[int]
# Kinds in which every object is the model's to place.
PLACED: tuple[Kind, ...] = ("text_to_image", "image_only", "draw", "plan")
# Edits that redraw objects where they stand are learned last: three of five are of these.
HARD_EDITS: tuple[EditKind, ...] = ("recolour", "resize", "background")
QUESTIONS = 8  # at most, about one picture: what comes before them is the dear part
# With `in_words` most of what questions teach is learned from plans, whose pictures nobody has to
# encode or read.
QUESTIONS_BESIDE_PLANS = 3
QUESTIONS_OF_A_PLAN = 8
COPIED = 0.2  # what a plan that only copies a caption weighs: there is little to learn


@dataclass(frozen=True)
class Mix:
    """Weights of the kinds of document; 0 leaves a kind out."""

    text_to_image: float = 0.0
    image_to_text: float = 0.0
    image_only: float = 0.0
    text_only: float = 0.0
    draw: float = 0.0
    edit: float = 0.0
    ask: float = 0.0
    describe: float = 0.0
    plan: float = 0.0

    def __post_init__(self) -> None:
        """Refuse negative weights and a mixture of nothing."""
        weights = [getattr(self, field.name) for field in fields(self)]
        if min(weights) < 0 or max(weights) <= 0:
            raise UserError(f"mix: given {weights}, allowed are weights of 0 or more, one above 0")


@dataclass(frozen=True)
class Picture:
    """A picture to be encoded; `key` names it for ever, so that its codes can be kept.

    `content` may be its codes, (k,) as the tokenizer gives them.
    """

    content: Scene | Tensor
    key: Hashable = None

    @property
    def codes(self) -> Tensor | None:
        """Its codes, where they are known."""
        content = self.content
        return content if isinstance(content, Tensor) and content.ndim == 1 else None


@dataclass(frozen=True)
class Draft:
    """A document whose images are still pictures.

    `texts` of "ask" and "plan" are requests and answers in turn.
    """

    kind: Kind
    pictures: tuple[Picture, ...] = ()
    texts: tuple[str, ...] = ()

    def document(self, codes: Sequence[Codes]) -> Document:
        """Put the codes of `pictures`, in their order, into the document."""
        return _LAYOUTS[self.kind](self.texts, codes)


_LAYOUTS: dict[Kind, Callable[[Sequence[str], Sequence[Codes]], Document]] = {
    "text_to_image": lambda texts, codes: documents.text_to_image(texts[0], codes[0]),
    "image_to_text": lambda texts, codes: documents.image_to_text(codes[0], texts[0]),
    "image_only": lambda texts, codes: documents.image_only(codes[0]),
    "text_only": lambda texts, codes: documents.text_only(texts[0]),
    "draw": lambda texts, codes: documents.draw(texts[0], codes[0]),
    "edit": lambda texts, codes: documents.edit(codes[0], texts[0], codes[1]),
    "ask": lambda texts, codes: documents.ask(codes[0], texts[0], texts[1], _further(texts)),
    "describe": lambda texts, codes: documents.describe(codes[0], texts[0]),
    "plan": lambda texts, codes: documents.plan(texts[0], texts[1], _further(texts)),
}


def _further(texts: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs of question and answer behind the first."""
    return list(zip(texts[2::2], texts[3::2], strict=True))


# What each kind of data can give; questions come without captions.
_OFFERS: dict[DataKind, tuple[Kind, ...]] = {
    "image": ("text_to_image", "image_to_text", "image_only", "text_only", "draw", "describe"),
    "edit": (*documents.PRETRAINING, "draw", "edit", "describe"),
    "question": ("image_only", "text_only", "ask"),
}


@dataclass(frozen=True)
class ShapesDrafts:
    """Drafts of one kind from the shapes world.

    With `scenes`, so many scenes come again and again, under new texts each time: a picture's codes
    are then computed once only, and no text is seen twice. `grid`, `in_words` and `repeats` as in
    `DataConfig`.
    """

    kind: Kind
    source: ShapesSource
    scenes: int | None = None
    grid: int | None = None
    in_words: bool = False
    repeats: float = 0.5

    def __len__(self) -> int:
        """Return the number of different drafts."""
        return ENDLESS

    def __getitem__(self, index: int, /) -> Draft:
        """Return one draft."""
        if self.kind == "text_only":
            return Draft("text_only", texts=(shapes_text(self.source, index),))
        if self.kind == "plan":
            return Draft("plan", texts=tuple(chain(*map(self._plan, (2 * index, 2 * index + 1)))))
        number = index if self.scenes is None else index % self.scenes
        grid = self.grid if self.kind in PLACED else None
        scene, seed = replace(self.source, grid=grid).scene(number), self.source.seed
        picture = Picture(scene, None if self.scenes is None else ("shapes", grid, number))
        if self.kind == "image_only":
            return Draft("image_only", (picture,))
        if self.kind == "edit":
            limit, turn = self.source.max_objects, _turn(index, 5)
            kinds = (*HARD_EDITS[turn : turn + 1], None)  # None: any; a new background always is
            tried = (
                edit(scene, seed, index, kind=k, max_objects=limit, grid=self.grid) for k in kinds
            )
            made = next(one for one in tried if one is not None)
            told = made.instruction
            if self._told(index):
                told = documents.with_result(told, plan_of_edit(made)[1])
            return Draft("edit", (picture, Picture(made.target)), (told,))
        if self.kind == "ask":
            pairs = self._questions(scene, index)
            if self._told(index):
                pairs.insert(0, (documents.DESCRIBE, description(scene)))
            return Draft("ask", (picture,), _turns(pairs))
        told = self._told(index)
        if self.kind == "describe" or (self.kind == "image_to_text" and told):
            return Draft(self.kind, (picture,), (description(scene),))
        text, planned = caption_and_plan(scene, seed, index)
        return Draft(self.kind, (picture,), (planned if told else text,))

    def _questions(self, scene: Scene, index: int) -> list[tuple[str, str]]:
        count = QUESTIONS_BESIDE_PLANS if self.in_words else QUESTIONS
        numbers = range(QUESTIONS * index, QUESTIONS * index + count)
        asked = [question(scene, self.source.seed, number) for number in numbers]
        return [(one.question, one.reasoned if self.in_words else one.answer) for one in asked]

    def _plan(self, index: int) -> tuple[str, ...]:
        """Return a caption, what is to be drawn, in words, and questions; or an edit in words.

        Of two that follow each other one is an edit. Indices are those of the halves of documents.
        """
        seed, limit = self.source.seed, self.source.max_objects
        source = replace(self.source, grid=self.grid)
        two = (source.scene(2 * index), source.scene(2 * index + 1))
        # There is less to learn about a scene without a clear relation.
        scene = next((scene for scene in two if related_pairs(scene)), two[0])
        lessons: list[tuple[str, str]] = []
        if (index + _turn(index // 2, 2)) % 2:
            prompt, answer = caption_and_plan(scene, seed, index, hard=True)
            if _turn(index, 1000) < 1000 * self.repeats:
                prompt = answer
            # Relations are learned last; what stands where is what drawing has to know; what is
            # asked otherwise teaches which object is meant.
            count = QUESTIONS_OF_A_PLAN
            kinds: list[QuestionKind | None] = ["list", "where", "relation", "place"]
            kinds += [None] * (count - len(kinds))
            asked = [question(scene, seed, count * index + n, one) for n, one in enumerate(kinds)]
            lessons += [(one.question, one.reasoned) for one in asked]
        else:
            made = edit(scene, seed, index, max_objects=limit, grid=self.grid)
            assert made is not None  # a new background is always possible
            prompt = documents.to_change(description(scene), made.instruction)
            answer, _ = plan_of_edit(made)
        first = f"{documents.PLAN} {prompt}" if index % 2 else prompt
        return _turns([(first, answer), *lessons])

    def _told(self, index: int) -> bool:
        """Say whether a draft holds the description of what it draws, edits to or asks about."""
        return self.in_words and _turn(index, 8) > 0


def shapes_text(source: ShapesSource, index: int) -> str:
    """Return a caption, a question with its answer, or an instruction, by turns."""
    task: Task = ("caption", "caption", "question", "edit")[index % 4]
    item = replace(source, task=task)[index]
    return item.text if item.answer is None else f"{item.text} {item.answer}"


@dataclass(frozen=True)
class FileDrafts:
    """Drafts of one kind from real pictures. Where a row lacks the text, the image stands alone.

    With `in_words` seven of eight edits hold the caption of their target, where there is one.
    """

    kind: Kind
    source: ImageSource[Any]
    path: str
    in_words: bool = False

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.source)

    def __getitem__(self, index: int, /) -> Draft:
        """Return one draft."""
        return self.batch([index])[0]

    def batch(self, indices: Sequence[int]) -> list[Draft]:
        """Return the drafts of `indices`."""
        samples = self.source.batch(indices)
        return [self._draft(i, sample) for i, sample in zip(indices, samples, strict=True)]

    def _draft(self, index: int, sample: Any) -> Draft:
        if isinstance(sample, EditSample):
            return self._edit(index, sample)
        picture = Picture(sample.image, (self.path, sample.row, "image"))
        if isinstance(sample, QuestionSample):
            first = _turn(index, len(sample.pairs))
            pairs = [*sample.pairs[first:], *sample.pairs[:first]]
            if self.kind == "text_only":
                return Draft("text_only", texts=(" ".join(pairs[0]),))
            return Draft("ask", (picture,), _turns(pairs[:QUESTIONS]))
        caption: str | None = sample.caption
        if caption is None or self.kind == "image_only":
            return Draft("image_only", (picture,))
        if self.kind == "plan":  # a caption is its own plan: nothing more is known of the picture
            return Draft("plan", texts=(caption, caption))
        pictures = () if self.kind == "text_only" else (picture,)
        return Draft(self.kind, pictures, (caption,))

    def _edit(self, index: int, sample: EditSample) -> Draft:
        """Return an edit, or its plan, for which both pictures need captions."""
        told, before, after = sample.instruction, sample.source_caption, sample.target_caption
        if self.kind == "plan" and before and after:
            request = documents.to_change(before, told)
            return Draft("plan", texts=(request, documents.change_all(before, after)))
        if self.in_words and after and _turn(index, 8) > 0:
            told = documents.with_result(told, after)
        pictures = (
            Picture(sample.source, (self.path, sample.row, "source")),
            Picture(sample.target, (self.path, sample.row, "image")),
        )
        return Draft("edit", pictures, (told,))


def _turns(pairs: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """Return questions and answers in turn, no question twice."""
    return tuple(chain(*dict(pairs).items()))


def _turn(index: int, count: int) -> int:
    """Choose the question a row begins with; each row always the same one."""
    return (index * 2_654_435_761 >> 7) % count


def mixture(config: DataConfig, mix: Mix, image_size: int, batch: int) -> Stream[Draft]:
    """Return the stream of drafts: step -> this process's share of `batch` drafts.

    Each path has its share, divided over the kinds it can give by the weights of `mix`. Raises
    UserError where the data give none of the kinds asked for.
    """
    sources: list[Indexed[Draft]] = []
    weights: list[float] = []
    for path, share in zip(config.paths, config.shares, strict=True):
        offered = _opened(config, path, mix, image_size)
        total = sum(weight for weight, _ in offered)
        if not total:
            wanted = [field.name for field in fields(mix) if getattr(mix, field.name) > 0]
            raise UserError(
                f"data: {path} gives none of the documents asked for ({', '.join(wanted)}); "
                "give other data or change mix"
            )
        sources += [source for _, source in offered]
        weights += [share * weight / total for weight, _ in offered]
    return Stream(
        sources,
        batch,
        seed=config.seed,
        weights=weights,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )


def _opened(
    config: DataConfig, path: str, mix: Mix, image_size: int
) -> list[tuple[float, Indexed[Draft]]]:
    """Return weight and source of every kind that the mix wants and the path can give."""
    wanted: list[Kind] = [kind for kind in documents.KINDS if getattr(mix, kind) > 0]
    if path == SHAPES:
        source = shapes_source(config)
        told = config.scenes, config.grid, config.in_words, config.repeats
        return [(getattr(mix, kind), ShapesDrafts(kind, source, *told)) for kind in wanted]
    found = detect_kind(path, image_column=config.image_column, options=config.reading)
    opened: dict[DataKind, ImageSource[Any]] = {}
    drafts: list[tuple[float, Indexed[Draft]]] = []
    offers = _OFFERS[found]
    # A model that learns in shapes to plan before it draws must be able to draw these, too.
    beside = SHAPES in config.paths
    if beside and found != "question":
        offers = (*offers, "plan")
    for kind in wanted:
        if kind not in offers:
            continue
        form: DataKind = found if kind in ("edit", "ask", "plan") else "image"
        if found == "question" and kind != "image_only":
            form = "question"
        if form not in opened:
            opened[form] = open_form(config, path, image_size, form)
        weight = getattr(mix, kind) * (COPIED if kind == "plan" and form == "image" else 1)
        in_words = beside and config.in_words
        drafts.append((weight, FileDrafts(kind, opened[form], path, in_words)))
    return drafts


def open_form(
    config: DataConfig,
    path: str,
    image_size: int,
    form: DataKind,
    split: str = "train",
    options: Reading | None = None,
) -> ImageSource[Any]:
    """Open the rows of `path` as pictures, edits or questions, or the codes of these."""
    return open_source(
        path,
        image_size=image_size,
        split=split,
        kind=form,
        caption_column=config.caption_column if form == "image" else None,
        image_column=config.image_column if form != "edit" else None,
        options=options or config.reading,
        codes=True,
    )


def texts(config: DataConfig, image_size: int, limit: int) -> list[str]:
    """Return what a text tokenizer is trained on: every kind of text that the data hold.

    The words of the instruction layout come with them, as often as texts of a data set, so that
    each is one id later.
    """
    found = [*documents.LAYOUT, documents.DESCRIBE, documents.PLAN] * limit
    for path in config.paths:
        if path == SHAPES:
            source = shapes_source(config)
            found += [shapes_text(source, index) for index in range(limit)]
            continue
        kind = detect_kind(path, image_column=config.image_column, options=config.reading)
        forms: list[DataKind] = [kind] if kind == "question" else sorted({"image", kind})
        for form in forms:
            found += open_form(config, path, image_size, form).texts(limit)
    return found
