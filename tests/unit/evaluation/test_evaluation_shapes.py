"""The shapes suite on models that draw, edit and answer in a known way."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import pytest
import torch
from torch import Tensor

from ddt_llama.config import UserError
from ddt_llama.evaluation.intervals import clustered_proportion
from ddt_llama.evaluation.reconstruction import ReconstructionSuite
from ddt_llama.evaluation.shapes_suite import (
    Artist,
    ShapesSuite,
    blind_guess,
    tune_drawing,
    tune_editing,
    tune_words,
)
from ddt_llama.evaluation.suites import suite_named
from ddt_llama.generation.model import Model
from ddt_llama.generation.settings import Options, Settings, row_seeds
from ddt_llama.shapes.captions import description
from ddt_llama.shapes.prompts import (
    CATEGORIES,
    Requirement,
    Use,
    edit_suite,
    heldout_prompts,
    question_suite,
)
from ddt_llama.shapes.questions import Question
from ddt_llama.shapes.render import render
from ddt_llama.shapes.scene import BACKGROUNDS, COLOURS, Object, Scene

Change = Callable[[Scene], Scene]
SUITE = ShapesSuite(prompts=10, images=2, edits=24, questions=20, batch_size=8)
SPOTS = [(0.2, 0.2), (0.5, 0.5), (0.8, 0.8), (0.2, 0.8)]


class Codes:
    """Stands for the image tokenizer: one token, the number of a scene in a list."""

    num_tokens = 1
    codebook_size = 2**20
    image_size = 64
    refines = prefixes = True
    renders = False

    def encode(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def decode(
        self,
        codes: Tensor,
        *,
        steps: int = 8,
        visible: int | None = None,
        seed: int | Sequence[int] = 0,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        raise NotImplementedError

    def code_vectors(self) -> Tensor:
        return torch.eye(self.codebook_size)

    def to_language(self, codes: Tensor) -> Tensor:
        return codes

    def from_language(self, codes: Tensor) -> Tensor:
        return codes

    def fingerprint(self) -> str:
        return "stand-in"

    def save(self, folder: Path, *, dtype: object = None) -> None:
        raise NotImplementedError


class Perfect:
    """Knows every prompt, edit and question of SUITE; `change` spoils each scene it shows."""

    def __init__(self, change: Change = lambda scene: scene, use: Use = "test") -> None:
        self.settings = Settings(guidance_scale=2.5, steps=3)
        self.tokenizer = Codes()
        self.change = change
        self.shown: list[Scene] = []
        self.drawn: list[tuple[str, int, float | None]] = []
        self.decoded: list[tuple[int, int]] = []
        self.known = {
            prompt: requirement
            for category in CATEGORIES
            for prompt, requirement in heldout_prompts(category, SUITE.prompts, SUITE.seed, use=use)
        }
        self.edits = {
            (made.instruction, key(made.source)): made
            for made in edit_suite(SUITE.edits, SUITE.seed, use=use)
        }
        self.told = {
            key(scene): description(scene)
            for scene, _ in question_suite(SUITE.questions, SUITE.seed, use=use)
        }
        self.answers = {
            (asked.question, key(scene)): asked.answer
            for scene, asked in question_suite(SUITE.questions, SUITE.seed, use=use)
        }

    def show(self, scene: Scene) -> int:
        self.shown.append(self.change(scene))
        return len(self.shown) - 1

    def draw_codes(
        self,
        prompts: str | Sequence[str],
        *,
        num: int = 1,
        seed: int | Sequence[int] = 0,
        **options: Unpack[Options],
    ) -> Tensor:
        texts = [prompt for prompt in prompts for _ in range(num)]
        scale = options.get("guidance_scale")
        seeds = row_seeds(seed, len(prompts), num)
        self.drawn += [(text, s, scale) for text, s in zip(texts, seeds, strict=True)]
        return torch.tensor([[self.show(scene_for(self.known[text]))] for text in texts])

    def edit_codes(
        self,
        images: Tensor,
        instructions: str | Sequence[str],
        *,
        num: int = 1,
        seed: int | Sequence[int] = 0,
        **options: Unpack[Options],
    ) -> Tensor:
        made = [
            self.edits[text, image.numpy().tobytes()]
            for text, image in zip(instructions, images, strict=True)
        ]
        return torch.tensor([[self.show(self.edited(one.source, one.target))] for one in made])

    def edited(self, source: Scene, target: Scene) -> Scene:
        return target

    def ask_many(self, images: Tensor, questions: str | Sequence[str]) -> list[str]:
        return [
            self.answers[text, image.numpy().tobytes()]
            for text, image in zip(questions, images, strict=True)
        ]

    def describe_many(self, images: Tensor) -> list[str]:
        return [self.told[image.numpy().tobytes()] for image in images]

    def decode(
        self,
        codes: Tensor,
        seeds: Sequence[int],
        steps: int | None = None,
        visible: int | None = None,
    ) -> Tensor:
        assert steps is not None
        self.decoded += [(seed, steps) for seed in seeds]
        return render([self.shown[number] for number in codes[:, 0].tolist()])


def key(scene: Scene) -> bytes:
    return render([scene])[0].numpy().tobytes()


def scene_for(requirement: Requirement) -> Scene:
    """Build a scene that does what is asked, from what the requirement says alone."""
    order = [0, 1, 2, 3] if requirement.relation in (None, 0, 2) else [1, 0, 2, 3]
    items: list[Object] = []
    for want in requirement.wants:
        for _ in range(want.count):
            x, y = SPOTS[order[len(items)]]
            items.append(Object(want.shape or 0, want.colour or 0, want.size or 0, x, y))
    scene = Scene(requirement.background or 0, tuple(items))
    assert requirement.satisfied(scene)
    return scene


def recoloured(scene: Scene) -> Scene:
    items = (replace(item, colour=(item.colour + 1) % len(COLOURS)) for item in scene.objects)
    return replace(scene, objects=tuple(items))


def turned(scene: Scene) -> Scene:
    items = (replace(item, x=1 - item.x, y=1 - item.y) for item in scene.objects)
    return replace(scene, objects=tuple(items))


def one_more(scene: Scene) -> Scene:
    """Repeat the first object, well above and to the left of all others."""
    assert all(item.x > 0.15 or item.y > 0.15 for item in scene.objects)
    spot = next(s for s in [(0.8, 0.2), (0.15, 0.5)] if far(s, scene))
    extra = replace(scene.objects[0], x=spot[0], y=spot[1])
    return replace(scene, objects=(*scene.objects, extra))


def far(spot: tuple[float, float], scene: Scene) -> bool:
    return all(abs(i.x - spot[0]) + abs(i.y - spot[1]) > 0.35 for i in scene.objects)


def test_a_perfect_model_scores_one_everywhere() -> None:
    model = Perfect()
    figures = SUITE.run(model)
    for name in ("overall", *CATEGORIES, "readable", "edit.done", "edit.kept", "edit.both"):
        assert figures[f"shapes.{name}"].value == 1.0, name
    assert figures["shapes.questions"].value == 1.0
    assert figures["shapes.descriptions"].value == 1.0
    assert figures["shapes.edit.untouched_error"].value == pytest.approx(0.0, abs=1e-6)
    assert figures["shapes.guidance_scale"].value == 2.5
    kinds = [name for name in figures if name.startswith("shapes.edit.both.")]
    assert len(kinds) == 6


def test_a_model_that_takes_wrong_colours_fails_where_a_colour_was_asked_for() -> None:
    figures = SUITE.drawing(Perfect(recoloured))
    wrong = {category: figures[f"shapes.{category}"].value for category in CATEGORIES}
    # No colour is asked for in `single`.
    assert wrong == dict.fromkeys(CATEGORIES, 0.0) | {"single": 1.0}
    assert figures["shapes.overall"].value == pytest.approx(1 / 6)
    assert figures["shapes.readable"].value == 1.0


def test_a_model_that_mixes_up_sides_fails_in_position_only() -> None:
    figures = SUITE.drawing(Perfect(turned))
    scores = {category: figures[f"shapes.{category}"].value for category in CATEGORIES}
    assert scores == dict.fromkeys(CATEGORIES, 1.0) | {"position": 0.0}


def test_a_model_that_draws_one_too_many_fails_in_counting() -> None:
    figures = SUITE.drawing(Perfect(one_more))
    assert figures["shapes.counting"].value == 0.0
    assert figures["shapes.single"].value == figures["shapes.two"].value == 1.0


def test_a_model_that_draws_an_empty_canvas_is_readable_and_wrong() -> None:
    figures = SUITE.drawing(Perfect(lambda scene: replace(scene, objects=())))
    assert figures["shapes.overall"].value == 0.0
    assert figures["shapes.readable"].value == 1.0


def test_wordings_of_one_demand_are_one_cluster() -> None:
    suite = replace(SUITE, prompts=100, images=1)
    prompts = heldout_prompts("single", suite.prompts, suite.seed)
    demands = list(dict.fromkeys(requirement for _, requirement in prompts))
    assert len(demands) < len(prompts)

    class Half(Perfect):
        """Knows every second demand, however it is worded."""

        def draw_codes(self, prompts: str | Sequence[str], **options: Any) -> Tensor:
            codes = super().draw_codes(prompts, **options)
            for number, prompt in zip(codes[:, 0].tolist(), prompts, strict=True):
                if demands.index(self.known[prompt]) % 2:
                    self.shown[number] = Scene(0, ())
            return codes

    model = Half()
    model.known = dict(prompts)
    verdicts, _ = suite._category(model, "single")
    wordings = [sum(asked == demand for _, asked in prompts) for demand in demands]
    assert verdicts == [[i % 2 == 0] * count for i, count in enumerate(wordings)]


def test_figures_are_clustered_by_prompt() -> None:
    """A model that always errs on every fifth prompt: 2 images a prompt count as one."""
    model = Perfect()
    spoilt = {p for i, p in enumerate(model.known) if i % 5 == 0}
    original = model.draw_codes

    def draw_codes(
        prompts: str | Sequence[str],
        *,
        num: int = 1,
        seed: int | Sequence[int] = 0,
        **options: Unpack[Options],
    ) -> Tensor:
        codes = original(prompts, num=num, seed=seed, **options)
        for row, number in enumerate(codes[:, 0].tolist()):
            if prompts[row // num] in spoilt:
                model.shown[number] = Scene(0, ())
        return codes

    model.draw_codes = draw_codes
    figure = SUITE.drawing(model)["shapes.attribute"]
    assert figure == clustered_proportion([[i % 5 != 0] * 2 for i in range(10)])
    assert figure.value == 0.8


def test_a_model_that_changes_nothing_keeps_all_and_does_nothing() -> None:
    class Idle(Perfect):
        def edited(self, source: Scene, target: Scene) -> Scene:
            return source

    figures = SUITE.editing(Idle())
    assert figures["shapes.edit.done"].value == 0.0
    assert figures["shapes.edit.kept"].value == 1.0
    assert figures["shapes.edit.both"].value == 0.0
    assert figures["shapes.edit.untouched_error"].value == pytest.approx(0.0, abs=1e-6)


def test_a_model_that_edits_and_repaints_the_background_does_not_keep() -> None:
    def repainted(scene: Scene) -> Scene:
        return replace(scene, background=(scene.background + 1) % len(BACKGROUNDS))

    figures = SUITE.editing(Perfect(repainted))
    kinds = 6
    # Only edits of the background itself look at the background to be done.
    assert figures["shapes.edit.done"].value == pytest.approx((kinds - 1) / kinds)
    assert figures["shapes.edit.kept"].value == pytest.approx(1 / kinds)
    assert figures["shapes.edit.both"].value == 0.0
    assert figures["shapes.edit.untouched_error"].value > 0.1


def test_answers_must_be_exact_up_to_outer_blanks() -> None:
    class Curt(Perfect):
        def ask_many(self, images: Tensor, questions: str | Sequence[str]) -> list[str]:
            right = super().ask_many(images, questions)
            return [
                f" {answer}" if question.startswith("how") else f"{answer}."
                for answer, question in zip(right, questions, strict=True)
            ]

    asked = question_suite(SUITE.questions, SUITE.seed)
    figures = SUITE.asking(Curt())
    expected = sum(q.question.startswith("how") for _, q in asked) / len(asked)
    assert figures["shapes.questions"].value == pytest.approx(expected)
    blind = figures.pop("shapes.questions.blind").value
    kinds = {question.kind for _, question in asked}
    answers = [[q.answer for _, q in asked if q.kind == kind] for kind in sorted(kinds)]
    assert blind > sum(max(map(a.count, a)) for a in answers) / len(asked)
    by_kind = [v.value for k, v in figures.items() if k.startswith("shapes.questions.")]
    assert sum(by_kind) / len(by_kind) == pytest.approx(expected)  # as many of each kind


def test_a_blind_guess_knows_the_form_of_a_question_but_not_its_words() -> None:
    asked = [
        Question("is there a circle?", "yes", "existence"),
        Question("is there a star?", "yes", "existence"),
        Question("is there a red star?", "no", "existence"),
        Question("is there a pink cross?", "no", "existence"),
        Question("how many crosses are there?", "2", "count"),
        Question("how many large stars are there?", "1", "count"),
        Question("how many circles are there?", "3", "count"),
    ]
    assert blind_guess([(Scene(0, ()), one) for one in asked]) == 6 / 7  # 2 or 3 of two of a form


def test_descriptions_must_leave_nothing_out() -> None:
    class Forgetful(Perfect):
        def describe_many(self, images: Tensor) -> list[str]:
            # Of two objects and more the first is lost.
            told = [text.split(", ") for text in super().describe_many(images)]
            return [", ".join(parts[1:] if len(parts) > 2 else parts) for parts in told]

    scenes = [scene for scene, _ in question_suite(SUITE.questions, SUITE.seed)]
    expected = sum(len(scene.objects) == 1 for scene in scenes) / len(scenes)
    assert 0 < expected < 1
    figures = SUITE.asking(Forgetful())
    assert figures["shapes.descriptions"].value == pytest.approx(expected)
    assert figures["shapes.questions"].value == 1.0


def test_no_two_images_of_a_category_share_a_seed_whatever_the_batch() -> None:
    runs = []
    for batch_size in (1, 8):
        model = Perfect()
        replace(SUITE, batch_size=batch_size).drawing(model)
        runs.append(model.drawn)
        assert {steps for _, steps in model.decoded} == {3}
        assert [seed for _, seed, _ in model.drawn] == [seed for seed, _ in model.decoded]
    assert runs[0] == runs[1]
    first = [seed for _, seed, _ in runs[0][: SUITE.prompts * SUITE.images]]
    assert len(set(first)) == SUITE.prompts * SUITE.images


def test_given_guidance_and_steps_replace_the_stored_ones() -> None:
    model = Perfect()
    suite = replace(SUITE, edits=0, questions=0, guidance_scale=4.0, steps=7)
    figures = suite.run(model)
    assert figures["shapes.guidance_scale"].value == 4.0
    assert {scale for *_, scale in model.drawn} == {4.0}
    assert {steps for _, steps in model.decoded} == {7}
    assert not any(name.startswith(("shapes.edit", "shapes.questions")) for name in figures)


def test_prompts_of_either_use_are_drawn_in_so_many_tries() -> None:
    class Counting(Perfect):
        def draw_codes(self, prompts: str | Sequence[str], **options: Any) -> Tensor:
            assert options["tries"] == 3
            return super().draw_codes(prompts, **options)

    model = Counting(use="tuning")  # it knows no other prompts, edits and questions
    figures = replace(SUITE, use="tuning", tries=3).run(model)
    assert figures["shapes.tries"].value == 3
    for name in ("shapes.overall", "shapes.edit.both", "shapes.questions"):
        assert figures[name].value == 1.0


def test_drawing_is_tuned_on_other_prompts_and_ties_go_to_the_plainest() -> None:
    class Wavering(Perfect):
        """Wrong below scale 2 and above temperature 0.9."""

        def draw_codes(self, prompts: str | Sequence[str], **options: Any) -> Tensor:
            scale, temperature = options["guidance_scale"], options["temperature"]
            self.good = scale >= 2 and temperature <= 0.9
            return super().draw_codes(prompts, **options)

        def show(self, scene: Scene) -> int:
            self.shown.append(scene if self.good else Scene(scene.background, ()))
            return len(self.shown) - 1

    model = Wavering(use="tuning")
    best, figures = tune_drawing(model, (4.0, 1.0, 2.0), (0.5, 1.0, 0.9), SUITE)
    assert best == replace(model.settings, guidance_scale=2.0, temperature=0.9)
    assert list(figures) == [(4.0, 0.9), (1.0, 0.9), (2.0, 0.9), (2.0, 0.5), (2.0, 1.0)]
    for (scale, temperature), figure in figures.items():
        assert figure.value == float(scale >= 2 and temperature <= 0.9)
    assert not set(model.known) & set(Perfect().known)
    with pytest.raises(UserError, match="no guidance scale"):
        tune_drawing(model, ())


def test_editing_is_tuned_apart_on_other_edits() -> None:
    class Wavering(Perfect):
        """Edits well at temperature 0.4 alone."""

        def edit_codes(self, images: Tensor, instructions: Any, **options: Any) -> Tensor:
            self.good = options["temperature"] == 0.4
            return super().edit_codes(images, instructions, **options)

        def edited(self, source: Scene, target: Scene) -> Scene:
            return target if self.good else source

    model = Wavering(use="tuning")
    best, figures = tune_editing(model, (3.0, 1.0), (1.0, 0.4), SUITE)
    assert best == replace(model.settings, edit_guidance_scale=1.0, edit_temperature=0.4)
    assert best.for_edits() == replace(model.settings, guidance_scale=1.0, temperature=0.4)
    assert [figure.value for figure in figures.values()] == [0, 0, 1]
    assert not set(model.edits) & set(Perfect().edits)


def test_words_come_first_where_they_help() -> None:
    class Thinker(Perfect):
        """Needs a plan to draw, no plan to edit, and answers alike."""

        def draw_codes(self, prompts: str | Sequence[str], **options: Any) -> Tensor:
            self.good = self.settings.plan
            return super().draw_codes(prompts, **options)

        def edit_codes(self, images: Tensor, instructions: Any, **options: Any) -> Tensor:
            self.good = not self.settings.for_edits().plan
            return super().edit_codes(images, instructions, **options)

        def show(self, scene: Scene) -> int:
            self.shown.append(scene if self.good else Scene(scene.background, ()))
            return len(self.shown) - 1

    model = Thinker(use="tuning")
    before = model.settings
    chosen, figures = tune_words(model, SUITE)
    assert chosen == replace(before, plan=True)
    assert model.settings == before
    assert [figure.value for figure in figures["plan"]] == [0.0, 1.0]
    assert [figure.value for figure in figures["look"]] == [1.0, 1.0]


def test_a_suite_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="images: given 0"):
        ShapesSuite(images=0)
    with pytest.raises(UserError, match="prompts: given -1"):
        ShapesSuite(prompts=-1)


def test_there_are_enough_prompts_for_the_default_suite() -> None:
    suite = ShapesSuite()
    for category in CATEGORIES:
        texts = {prompt for prompt, _ in heldout_prompts(category, suite.prompts, suite.seed)}
        assert len(texts) >= 100


def test_the_model_of_this_project_is_an_artist() -> None:
    assert isinstance(Perfect(), Artist)
    assert isinstance(Model(Codes()), Artist)


def test_unknown_suites_and_fields_name_what_exists() -> None:
    with pytest.raises(UserError, match="reconstruction, shapes, text"):
        suite_named("geneval")
    with pytest.raises(UserError, match="codebook_scenes"):
        suite_named("reconstruction", {"scene": 3})
    suite = suite_named("shapes", {"prompts": "5", "guidance_scale": "1.5"})
    assert suite == ShapesSuite(prompts=5, guidance_scale=1.5)
    assert suite_named("reconstruction", {"visible": "1,4"}) == ReconstructionSuite(visible=(1, 4))
