"""Suite `shapes`: does the model draw, edit and answer what was asked?

Six categories as in GenEval (Ghosh et al. 2023) on compositions that training never held, judged by
the verifier that reads a picture back into a scene; edits (is the change done, is the rest
untouched); questions by exact match.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Unpack, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from ddt_llama.config import UserError, check_range
from ddt_llama.evaluation.intervals import (
    Figure,
    clustered_proportion,
    mean,
    mean_of,
    proportion,
    setting,
)
from ddt_llama.evaluation.pictures import EVALUATION_SEED, batches, check_seed
from ddt_llama.evaluation.result import watch
from ddt_llama.generation.settings import Options, Settings
from ddt_llama.shapes.captions import description, in_few_words
from ddt_llama.shapes.judge import change_done, rest_untouched, untouched_error
from ddt_llama.shapes.prompts import (
    CATEGORIES,
    Category,
    Requirement,
    Use,
    edit_suite,
    heldout_prompts,
    question_suite,
)
from ddt_llama.shapes.questions import Question
from ddt_llama.shapes.render import render
from ddt_llama.shapes.scene import COLOURS, SHAPES, SIZES, Scene
from ddt_llama.shapes.verify import read
from ddt_llama.tokenizer.base import Tokenizer


@runtime_checkable
class Artist(Protocol):
    """What the suite asks of a model; `generation.Model` is one."""

    settings: Settings

    @property
    def tokenizer(self) -> Tokenizer:
        """The image tokenizer; its image size is that of all pictures."""
        ...

    def draw_codes(
        self,
        prompts: str | Sequence[str],
        *,
        num: int = 1,
        seed: int | Sequence[int] = 0,
        **options: Unpack[Options],
    ) -> Int[Tensor, "b k"]:
        """Return codes of `num` images a prompt, prompt by prompt."""
        ...

    def edit_codes(
        self,
        images: Float[Tensor, "b 3 h w"],
        instructions: str | Sequence[str],
        *,
        num: int = 1,
        seed: int | Sequence[int] = 0,
        **options: Unpack[Options],
    ) -> Int[Tensor, "b k"]:
        """Return codes of the edited images."""
        ...

    def ask_many(
        self, images: Float[Tensor, "b 3 h w"], questions: str | Sequence[str]
    ) -> list[str]:
        """Return an answer to each question about its image."""
        ...

    def describe_many(self, images: Float[Tensor, "b 3 h w"]) -> list[str]:
        """Say what is in each image."""
        ...

    def decode(
        self,
        codes: Int[Tensor, "b k"],
        seeds: Sequence[int],
        steps: int | None = None,
        visible: int | None = None,
    ) -> Float[Tensor, "b 3 h w"]:
        """Return the images of codes."""
        ...


@dataclass(frozen=True)
class ShapesSuite:
    """Says how much to ask.

    `prompts` a category and `images` a prompt; `edits` and `questions` in all (0 leaves that part
    out). `guidance_scale`, `temperature`, `steps` and `tries`: None takes the release's own. `use`
    "tuning" asks what no evaluation does, so that settings can be chosen by it.
    """

    prompts: int = 100
    images: int = 4
    edits: int = 300
    questions: int = 500
    guidance_scale: float | None = None
    temperature: float | None = None
    steps: int | None = None
    tries: int | None = None
    batch_size: int = 32
    seed: int = EVALUATION_SEED
    use: Use = "test"

    def __post_init__(self) -> None:
        """Refuse numbers that measure nothing."""
        check_range(self, 0, math.inf, "prompts", "edits", "questions")
        check_range(self, 1, math.inf, "images", "batch_size")
        check_seed(self.seed)
        Settings().changed(self.options)  # refuses what no model draws with

    @property
    def options(self) -> Options:
        """How pictures are drawn."""
        return {
            "guidance_scale": self.guidance_scale,
            "temperature": self.temperature,
            "steps": self.steps,
            "tries": self.tries,
        }

    def run(self, model: Artist) -> dict[str, Figure]:
        """Measure a model on prompts, edits and questions that training never held.

        Keys: `shapes.CATEGORY`, `shapes.overall` (mean of the six), `shapes.readable` (share of
        drawings that the verifier could read), `shapes.edit.{done,kept,both}` and
        `shapes.edit.both.KIND`, `shapes.edit.untouched_error` (mean absolute difference, of the
        full range, where nothing should change), `shapes.questions`, `shapes.questions.KIND`,
        `shapes.questions.blind` (what the commonest answer to each form would score, unseen) and
        `shapes.descriptions` (share of the scenes asked about that are described without an
        error, articles and prepositions aside).
        Shares have Wilson's intervals, those of drawings clustered by demand; `overall` is their
        square-and-add, the error a mean with Student's t.
        """
        figures: dict[str, Figure] = {}
        if self.prompts:  # what cannot be measured is refused before anything is drawn
            for category in CATEGORIES:
                heldout_prompts(category, self.prompts, self.seed, use=self.use)
        if self.edits:
            figures |= self.editing(model)
        if self.questions:
            figures |= self.asking(model)
        if self.prompts:
            figures |= self.drawing(model)
        used = model.settings.changed(self.options)
        return figures | {
            "shapes.prompts_a_category": setting(self.prompts),
            "shapes.images_a_prompt": setting(self.images),
            "shapes.guidance_scale": setting(used.guidance_scale),
            "shapes.temperature": setting(used.temperature),
            "shapes.steps": setting(used.steps),
            "shapes.plan": setting(used.plan),
            "shapes.look": setting(used.look),
            "shapes.tries": setting(used.tries),
            "shapes.views": setting(used.views),
        }

    def drawing(self, model: Artist) -> dict[str, Figure]:
        """Draw every prompt and judge each picture by what its prompt demands."""
        figures: dict[str, Figure] = {}
        readable: list[list[bool]] = []
        for category in CATEGORIES:
            verdicts, clear = self._category(model, category)
            figures[f"shapes.{category}"] = clustered_proportion(verdicts)
            readable += clear
        overall = {"shapes.overall": mean_of(list(figures.values()))}
        return overall | figures | {"shapes.readable": clustered_proportion(readable)}

    def _category(
        self, model: Artist, category: Category
    ) -> tuple[list[list[bool]], list[list[bool]]]:
        """Return for each demand of a category, for each image: is it right, can it be read.

        Prompts that word the same demand, mirrored or not, are one cluster: they tend to fail
        together. Image j of prompt i has the seed `seed + i * images + j`: no two of a category
        share noise.
        """
        verdicts: dict[Requirement, list[bool]] = defaultdict(list)
        readable: dict[Requirement, list[bool]] = defaultdict(list)
        prompts = heldout_prompts(category, self.prompts, self.seed, use=self.use)
        at_once = max(1, self.batch_size // self.images)
        for start, stop in watch(list(batches(len(prompts), at_once)), f"draw {category}"):
            part = prompts[start:stop]
            first = [self.seed + i * self.images for i in range(start, stop)]
            seeds = [seed + j for seed in first for j in range(self.images)]
            texts = [prompt for prompt, _ in part]
            codes = model.draw_codes(texts, num=self.images, seed=first, **self.options)
            found = read(self._decode(model, codes, seeds))
            for row, (_, requirement) in enumerate(part):
                own = found[row * self.images : (row + 1) * self.images]
                demand = requirement.canonical
                verdicts[demand] += [requirement.satisfied(scene) for scene in own]
                readable[demand] += [scene is not None for scene in own]
        return list(verdicts.values()), list(readable.values())

    def editing(self, model: Artist) -> dict[str, Figure]:
        """Edit held-out scenes; judge the change, and what should have stayed as it was."""
        edits = edit_suite(self.edits, self.seed, use=self.use)
        outcomes: dict[str, list[bool]] = defaultdict(list)
        errors: list[float] = []
        for start, stop in watch(list(batches(len(edits), self.batch_size)), "edit"):
            part = edits[start:stop]
            seeds = [self.seed + i for i in range(start, stop)]
            sources = render([made.source for made in part], model.tokenizer.image_size)
            texts = [made.instruction for made in part]
            codes = model.edit_codes(sources, texts, seed=seeds, **self.options)
            results = self._decode(model, codes, seeds)
            for row, (made, scene) in enumerate(zip(part, read(results), strict=True)):
                done, kept = change_done(made, scene), rest_untouched(made, scene)
                outcomes["shapes.edit.done"].append(done)
                outcomes["shapes.edit.kept"].append(kept)
                outcomes["shapes.edit.both"].append(done and kept)
                outcomes[f"shapes.edit.both.{made.kind}"].append(done and kept)
                errors.append(untouched_error(made, sources[row], results[row]))
        used = model.settings.for_edits().changed(self.options)
        return _shares(outcomes) | {
            "shapes.edit.untouched_error": mean(errors),
            "shapes.edit.guidance_scale": setting(used.guidance_scale),
            "shapes.edit.temperature": setting(used.temperature),
            "shapes.edit.plan": setting(used.plan),
        }

    def asking(self, model: Artist) -> dict[str, Figure]:
        """Ask about scenes and describe them; only the exact words of the answer count."""
        asked = question_suite(self.questions, self.seed, use=self.use)
        outcomes: dict[str, list[bool]] = defaultdict(list)
        for start, stop in watch(list(batches(len(asked), self.batch_size)), "ask"):
            part = asked[start:stop]
            images = render([scene for scene, _ in part], model.tokenizer.image_size)
            answers = model.ask_many(images, [question.question for _, question in part])
            told = model.describe_many(images)
            outcomes["shapes.descriptions"] += [
                in_few_words(text) == description(scene)
                for text, (scene, _) in zip(told, part, strict=True)
            ]
            for (_, question), answer in zip(part, answers, strict=True):
                right = answer.strip() == question.answer
                outcomes["shapes.questions"].append(right)
                outcomes[f"shapes.questions.{question.kind}"].append(right)
        return _shares(outcomes) | {"shapes.questions.blind": setting(blind_guess(asked))}

    def _decode(self, model: Artist, codes: Tensor, seeds: Sequence[int]) -> Tensor:
        return model.decode(codes, seeds, steps=model.settings.changed(self.options).steps)


def tune_words(
    model: Artist, suite: ShapesSuite = ShapesSuite(prompts=20, images=2, edits=96, questions=200)
) -> tuple[Settings, dict[str, tuple[Figure, Figure]]]:
    """Return the model's settings with words first where they help: `plan`, `edit_plan`, `look`.

    Each is tried both ways on tuning prompts, edits and questions, and taken where it scores
    higher. Also returns the figures without and with it.
    """
    suite = replace(suite, use="tuning")
    measures: dict[str, Callable[[], Figure]] = {
        "plan": lambda: suite.drawing(model)["shapes.overall"],
        "edit_plan": lambda: suite.editing(model)["shapes.edit.both"],
        "look": lambda: suite.asking(model)["shapes.questions"],
    }
    stored, chosen = model.settings, model.settings
    figures: dict[str, tuple[Figure, Figure]] = {}
    for name, measure in measures.items():
        tried = []
        try:
            for first in (False, True):
                model.settings = replace(stored, **{name: first})
                tried.append(measure())
        finally:
            model.settings = stored
        figures[name] = tried[0], tried[1]
        chosen = replace(chosen, **{name: tried[1].value > tried[0].value})
    return chosen, figures


Tuned = dict[tuple[float, float], Figure]  # (guidance scale, temperature) -> what it reached


def tune_drawing(
    model: Artist,
    scales: Sequence[float] = (1.0, 1.5, 2.0, 3.0),
    temperatures: Sequence[float] = (1.0, 0.7, 0.4),
    suite: ShapesSuite = ShapesSuite(prompts=20, images=2),
) -> tuple[Settings, Tuned]:
    """Return the model's settings with the guidance scale and temperature that draw best.

    Best by `shapes.overall` on the tuning prompts, none of which is a prompt of the evaluation:
    the scale at the middle temperature first, then the temperature at that scale. Of equals the
    smallest scale wins, and the highest temperature. Also returns the figure of every pair that
    was tried. Raises UserError where there is nothing to choose from.
    """
    scale, temperature, figures = _best(
        scales,
        temperatures,
        lambda one: replace(suite, use="tuning", **one).drawing(model)["shapes.overall"],
    )
    return replace(model.settings, guidance_scale=scale, temperature=temperature), figures


def tune_editing(
    model: Artist,
    scales: Sequence[float] = (1.0, 1.5, 2.0, 3.0),
    temperatures: Sequence[float] = (0.7, 0.4, 0.1),
    suite: ShapesSuite = ShapesSuite(edits=192),
) -> tuple[Settings, Tuned]:
    """Do as `tune_drawing` for edits, by `shapes.edit.both` on the tuning edits."""
    scale, temperature, figures = _best(
        scales,
        temperatures,
        lambda one: replace(suite, use="tuning", **one).editing(model)["shapes.edit.both"],
    )
    settings = replace(model.settings, edit_guidance_scale=scale, edit_temperature=temperature)
    return settings, figures


def _best(
    scales: Sequence[float],
    temperatures: Sequence[float],
    measure: Callable[[dict[str, float]], Figure],
) -> tuple[float, float, Tuned]:
    if not scales or not temperatures:
        raise UserError("no guidance scale or no temperature to choose from; give at least one")
    figures: Tuned = {}

    def best(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
        for pair in pairs:
            if pair not in figures:
                figures[pair] = measure({"guidance_scale": pair[0], "temperature": pair[1]})
        return min(pairs, key=lambda pair: (-figures[pair].value, pair[0], -pair[1]))

    middle = sorted(temperatures)[len(temperatures) // 2]
    scale, _ = best([(scale, middle) for scale in scales])
    return *best([(scale, temperature) for temperature in temperatures]), figures


# Words that tell one question from another of the same form.
_LOOKS = re.compile(
    rf"\b({'|'.join([*SHAPES, *(name for name, _ in (*COLOURS, *SIZES))])})(es|s)?\b"
)


def blind_guess(asked: Sequence[tuple[Scene, Question]]) -> float:
    """Return the share right if each form of question always got its commonest answer.

    Forms are wordings less colours, shapes and sizes: "is there a _?" is answered yes more often
    than "is there a _ _?", so that a guess by kind alone would be too low a floor. It is counted on
    the questions themselves, so rather too high.
    """
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for _, question in asked:
        answers[_LOOKS.sub("_", question.question)][question.answer] += 1
    return sum(max(counts.values()) for counts in answers.values()) / len(asked)


def _shares(outcomes: Mapping[str, Sequence[bool]]) -> dict[str, Figure]:
    return {name: proportion(verdicts) for name, verdicts in outcomes.items()}
