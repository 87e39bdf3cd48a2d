"""Exponents of curves that are known, what a lesson's model writes, and the whole grid."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddt_llama.config import UserError
from ddt_llama.evaluation.intervals import Figure
from ddt_llama.generation import Model
from ddt_llama.language import Vocabulary
from ddt_llama.language.text import TextTokenizer
from ddt_llama.probes import drawing
from ddt_llama.probes import scaling as module
from ddt_llama.probes.drawing import drawn, there, write
from ddt_llama.probes.learn import Course, Learned, Lesson, learn, surprises
from ddt_llama.probes.scaling import (
    SIZES,
    Law,
    ScalingPlan,
    figures_of,
    fitted,
    learn_grid,
    plots_of,
    scaling,
    trend,
)
from ddt_llama.probes.sequences import Sequences
from ddt_llama.shapes.captions import description
from ddt_llama.shapes.render import render
from ddt_llama.shapes.scene import Object, Scene
from ddt_llama.training.loop import TrainConfig
from ddt_llama.training.optim import OptimConfig
from stand_in import StandIn

TRAIN = TrainConfig(
    steps=4, batch=8, sample_every=4, tensorboard=False, optim=OptimConfig(lr=1e-2, warmup=1)
)
CIRCLE, STAR = Object(0, 0, 0, 0.25, 0.25), Object(3, 1, 1, 0.75, 0.75)
SMALL = tuple(replace(SIZES[0], dim=dim, depth=1, mlp_dim=dim) for dim in (16, 32))
COURSE = ScalingPlan.course_of_all()
PLAN = ScalingPlan(
    (0, 1),
    SMALL,
    (16, 32),
    passes=1.0,
    held_out=8,
    drawn=0,
    course=replace(COURSE, train=replace(TRAIN, steps=COURSE.train.steps)),
)


def test_the_exponents_are_those_of_a_power_law_and_its_noise_is_their_interval() -> None:
    plan = replace(PLAN, seeds=(0, 1, 2))
    sizes = [1000, 8000]
    done = {
        (place, amount, seed): Learned(
            [(1, 8 * size**-0.1 * amount ** -(0.2 + 0.01 * seed))], [1.0], [1.0], {}
        )
        for place, size in enumerate(sizes)
        for amount in plan.amounts
        for seed in plan.seeds
    }
    figures, laws = figures_of(plan, sizes, done), fitted(plan, sizes, done)
    assert [law.size for law in laws] == pytest.approx([0.1] * 3)
    assert [law.data for law in laws] == pytest.approx([0.2, 0.21, 0.22])
    assert [law.misfit for law in laws] == pytest.approx([0] * 3)
    assert figures["8000.32.bits"].value < figures["1000.16.bits"].value
    plot = plots_of(plan, sizes, done, laws, "x")["x, loss (thin: the law)"]
    assert plot.log == "xy"
    for amount in plan.amounts:  # measured and law are one line
        measured, law = plot.curves[f"{amount} pictures"], plot.laws[f"{amount} pictures"]
        assert law[0] == [measured[0][0], measured[0][-1]]
        assert law[1] == pytest.approx([measured[1][0], measured[1][-1]])
    cells = [(1, 1), (10, 1), (1, 10), (10, 10)]
    assert Law.through(cells, [5.0] * 4) == pytest.approx((5, 0, 0, 0))
    # Twice too much at two opposite corners: the plane is level between, root 2 away from each.
    bent = Law.through(cells, [2.0, 1.0, 1.0, 2.0])
    assert bent == pytest.approx((2**0.5, 0, 0, 2**0.5 - 1))


class Counter(nn.Module):
    """Writes the row's last symbol plus one, around after the last; knows it from its cache."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.vocabulary = vocabulary

    def forward(self, input_ids: Tensor, past_key_values: Any, use_cache: bool) -> Any:
        assert use_cache
        assert (past_key_values is None) == (input_ids.shape[1] > 1)
        following = (input_ids[:, -1] - self.vocabulary.code_offset + 1) % 10
        hot = nn.functional.one_hot(self.vocabulary.to_ids(following), self.vocabulary.size)
        return SimpleNamespace(logits=1e4 * hot[:, None].float(), past_key_values="known")


def test_symbols_are_written_behind_beginnings_of_any_length() -> None:
    vocabulary = Vocabulary(1, 10, 4)
    told = [torch.tensor([3, 5]), torch.tensor([7]), torch.tensor([2, 4])]
    ids = [vocabulary.to_ids(one) for one in told]
    found = write(Counter(vocabulary), vocabulary, ids, first=5, count=3, seed=0)
    assert found[0].tolist() == [6, 7, 8]
    assert found[1].tolist()[:2] == [8, 9]
    assert found[1][2] >= 5  # behind 9 comes 0, which is no code: then any code may
    assert found[2].tolist() == [5, 6, 7]


def test_symbols_are_drawn_with_the_temperature() -> None:
    vocabulary = Vocabulary(1, 10, 4)

    class Leaning(nn.Module):
        """Finds symbol 6 four times as likely as symbol 5, and nothing else possible."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, input_ids: Tensor, **_: Any) -> Any:
            chances = torch.zeros(vocabulary.size)
            chances[vocabulary.to_ids(torch.tensor([5, 6]))] = torch.tensor([0.2, 0.8])
            rows = chances.log().expand(*input_ids.shape, -1)
            return SimpleNamespace(logits=rows, past_key_values=None)

    ids = [vocabulary.to_ids(torch.tensor([7]))] * 2000
    found = write(Leaning(), vocabulary, ids, first=5, count=1, seed=0)
    assert set(found.flatten().tolist()) == {5, 6}
    likely = 0.8 ** (1 / drawing.TEMPERATURE)
    expected = likely / (likely + 0.2 ** (1 / drawing.TEMPERATURE))
    assert float((found == 6).float().mean()) == pytest.approx(expected, abs=0.02)


def test_what_is_told_is_not_measured(tmp_path: Path) -> None:
    rows = tuple(torch.tensor([0, 1, 2, 3]) for _ in range(8))
    lesson = Lesson(Course(shape=SMALL[0], train=TRAIN), "x", "y")
    plain = Sequences("x", 4, rows, rows)
    told = replace(plain, told=tuple(n % 4 for n in range(8)))
    found = learn(lesson, told, tmp_path, lambda pupil, vocabulary: {"asked": vocabulary.size})
    assert found.scores == {"asked": Vocabulary(1, 4, 4).size}
    assert learn(lesson, told, tmp_path) == found

    class Even(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 11))

    surprise, entropy = surprises(Even(), told, lesson, Vocabulary(1, 4, 4))
    assert surprise.isnan().sum(1).tolist() == entropy.isnan().sum(1).tolist() == [0, 1, 2, 3] * 2


class Grey(StandIn):
    """Codes of a picture: its brightness, eight times."""

    codebook_size = 16

    def encode(self, images: Tensor) -> Tensor:
        steps = (images.mean((1, 2, 3)) * 8 + 8).long().clamp(0, 15)
        return steps[:, None].repeat(1, self.num_tokens)

    def decode(self, codes: Tensor, **_: Any) -> Tensor:
        return (codes[:, :1, None, None] / 8 - 1).expand(-1, 3, 64, 64).float()


def test_what_is_drawn_is_what_the_codes_show(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = drawing.easy(12, 64, "heldout").scenes(0, 12)

    class Numbered(StandIn):
        """A code is the number of a scene."""

        def decode(self, codes: Tensor, **_: Any) -> Tensor:
            return render([scenes[int(number)] for number in codes[:, 0]], 64)

    text = TextTokenizer.train(["a red circle", "two blue squares"] * 50, 280)
    first = text.size + 1
    told = {tuple(one.tolist()): n for n, one in enumerate(drawing.beginnings(text, scenes))}

    def written(pupil: Any, vocabulary: Vocabulary, begun: list[Tensor], *_: Any) -> Tensor:
        numbers = [told[tuple(vocabulary.to_codes(one).tolist())] for one in begun]
        return first + torch.tensor([[(number + pupil) % 12] * 8 for number in numbers])

    monkeypatch.setattr(drawing, "write", written)
    vocabulary = Vocabulary(1, first + 1000, 100)
    assert len(told) == 12
    right, wrong = (drawn(shift, vocabulary, Numbered(), text, 12, 1) for shift in (0, 1))
    assert right == 1
    assert wrong < 0.3
    both, one = Scene(0, (CIRCLE, STAR)), Scene(1, (CIRCLE,))
    assert (there(both, one), there(one, both), there(None, one)) == (1, 0.5, 0)
    assert there(Scene(0, (STAR, STAR)), both) == 0.5


def test_descriptions_stand_before_the_codes_of_their_own_pictures() -> None:
    scenes = drawing.easy(900, 64, "train").scenes(0, 900)
    numbers = {}
    for scene in scenes:
        numbers.setdefault(render([scene], 8).numpy().tobytes(), len(numbers))

    class Named(StandIn):
        """The codes of a picture are its number among the different ones."""

        image_size = 8

        def encode(self, images: Tensor) -> Tensor:
            found = [numbers[image[None].numpy().tobytes()] for image in images]
            return torch.tensor(found)[:, None].repeat(1, self.num_tokens)

    text = TextTokenizer.train(["a red circle", "two blue squares"] * 50, 280)
    pairs = drawing.described(Named(), text, "named", 900, 300)
    first = text.size + 1
    for row, scene in zip(pairs.train, scenes, strict=False):
        number = numbers[render([scene], 8).numpy().tobytes()]
        told = text.encode(description(scene))
        assert row.tolist() == [*told, text.size, *[first + number] * Named.num_tokens]
    # What recurs is not held out, and what is told of the rest is its description and the mark.
    assert 0 < len(pairs.held_out) < 300
    # A tokenizer that tells nothing apart is asked the same.
    blind = drawing.described(Grey(), text, "grey", 900, 300)
    assert len(blind.held_out) == len(pairs.held_out)
    known = {tuple(row.tolist()) for row in pairs.train}
    assert pairs.told is not None
    for row, told in zip(pairs.held_out, pairs.told, strict=True):
        assert tuple(row.tolist()) not in known
        assert row[told - 1] == text.size
        assert (row[told:] >= first).all()


def test_every_size_learns_from_every_amount(tmp_path: Path) -> None:
    model = Model(Grey(), name="grey")
    with pytest.raises(UserError, match="no language model in grey"):
        scaling(PLAN, [model], tmp_path)
    model.text = TextTokenizer.train(["a red circle", "two blue squares"] * 50, 280)
    outcome = scaling(replace(PLAN, drawn=1), [model], tmp_path)
    names = set(outcome.figures)
    assert {"grey.exponent.size", "grey.exponent.data"} <= names
    assert sum(name.endswith(".bits") for name in names) == 4
    assert all(
        outcome.figures[name].value == 0 for name in names if name.endswith(".shapes")
    )  # a grey picture obeys nobody
    by_size = trend(outcome.figures["grey.exponent.size"], "parameters beside the vocabulary")
    assert outcome.verdict.startswith(f"Bits a code of grey {by_size} and ")
    assert outcome.figures["grey.exponent.size"].low < outcome.figures["grey.exponent.size"].high
    again = learn_grid(replace(PLAN, drawn=1), model, tmp_path)
    assert again[1, 32, 0].scores == {"shapes": 0.0}


def test_a_trend_claims_no_more_than_its_interval() -> None:
    told = trend(Figure(0.3, 0.1, 0.5), "pictures")
    assert told == "fall with pictures (exponent 0.300 (0.100 to 0.500))"
    assert trend(Figure(-0.3, -0.5, -0.1), "pictures").startswith("rise with pictures")
    assert trend(Figure(0.3, -0.1, 0.7), "x").startswith("are not seen to change with x")


def test_steps_follow_the_data_and_slopes_need_two_points() -> None:
    assert PLAN.course_for(SMALL[0], 16).train.steps == 2
    assert PLAN.course_for(SMALL[1], 32).train.steps == 4
    heads = replace(SMALL[0], num_heads=2, num_kv_heads=2)  # as many parameters
    for changes in (
        {"amounts": (5, 5)},
        {"amounts": (5, 6, 5)},
        {"shapes": SMALL[:1]},
        {"shapes": (*SMALL, heads)},
    ):
        with pytest.raises(UserError, match="two or more"):
            replace(PLAN, **changes)
    for changes in ({"amounts": ()}, *({"passes": x} for x in (0.0, math.nan, math.inf))):
        with pytest.raises(UserError, match="passes above 0 and amounts of 1 or more"):
            replace(PLAN, **changes)
    twice = replace(PLAN, course=replace(PLAN.course, train=replace(COURSE.train, accumulate=2)))
    assert twice.course_for(SMALL[0], 320).train.steps == 5  # of 64 pictures
    for course in (
        replace(PLAN.course, shape=SMALL[1]),
        replace(PLAN.course, train=replace(PLAN.course.train, steps=7)),
    ):
        with pytest.raises(UserError, match="follows from shapes, amounts and passes"):
            replace(PLAN, course=course)
    sizes = [module.parameters(shape, Model(Grey(), name="x")) for shape in SIZES]
    assert sizes == sorted(sizes)
    assert ScalingPlan().quick().held_out < ScalingPlan().held_out
