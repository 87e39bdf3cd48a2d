"""What stands beside text in training, and what of it is measured."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddt_llama.config import UserError
from ddt_llama.evaluation.intervals import Figure
from ddt_llama.generation import Model
from ddt_llama.language.backbone import BackboneConfig
from ddt_llama.language.text import TextTokenizer
from ddt_llama.probes.learn import Course, Learned, Plan, learn_all
from ddt_llama.probes.synergy import ALONE, beside, conditions, gaps, of_others, synergy, verdict
from ddt_llama.training.loop import TrainConfig
from ddt_llama.training.optim import OptimConfig
from stand_in import StandIn

COURSE = Course(
    shape=BackboneConfig(dim=32, depth=1, num_heads=2, num_kv_heads=2, mlp_dim=64),
    train=TrainConfig(
        steps=12, batch=8, sample_every=6, tensorboard=False, optim=OptimConfig(lr=1e-2, warmup=4)
    ),
)
PLAN = Plan((0, 1), COURSE, pictures=40, held_out=8)


class Bright(StandIn):
    """Codes of a picture: its mean, in a thousand steps, eight times."""

    def encode(self, images: Tensor) -> Tensor:
        steps = (images.mean((1, 2, 3)) * 500 + 500).long().clamp(0, 999)
        return steps[:, None].repeat(1, self.num_tokens)


def texts(count: int) -> list[Tensor]:
    """All different, of three, four or five ids."""
    return [torch.tensor([n % 5, n // 5 % 5, n // 25, *[1] * (n % 3)]) for n in range(count)]


def test_captions_come_before_codes_and_are_held_out_alone() -> None:
    rows = torch.arange(40).view(10, 4)
    alone, own, others = conditions(texts(10), 5, {"x": rows}, 50, 2)
    assert [one.name for one in (alone, own, others)] == [ALONE, beside("x"), of_others("x")]
    assert own.train[1].tolist() == [1, 0, 0, 1, 5 + 4, 5 + 5, 5 + 6, 5 + 7]
    assert others.train[1].tolist() == [1, 0, 0, 1, 5, 6, 7, 8]
    assert others.train[0].tolist() == [0, 0, 0, 5 + 28, 5 + 29, 5 + 30, 5 + 31]  # none held out
    for one in (alone, own, others):
        assert (one.alphabet, len(one.train)) == (55, 8)
        assert [row.tolist() for row in one.held_out] == [t.tolist() for t in texts(10)[-2:]]


def test_known_captions_are_not_held_out() -> None:
    again = [*texts(9), texts(9)[0]]  # the last caption stands in training, too
    sources = conditions(again, 5, {"x": torch.zeros(10, 4).long()}, 50, 2)
    assert all([row.tolist() for row in one.held_out] == [texts(9)[8].tolist()] for one in sources)


def test_no_codes_beside_text_change_nothing(tmp_path: Path) -> None:
    codes = {"x": torch.zeros(40, 0, dtype=torch.long), "y": torch.zeros(40, 4, dtype=torch.long)}
    alone, empty, _, four, _ = conditions(texts(40), 5, codes, 3, 8)
    sources = (alone, empty, four)
    done = learn_all(PLAN, sources, ("native",), tmp_path)
    for seed in PLAN.seeds:
        alone, nothing, more = (done[one.name, "native", seed] for one in sources)
        assert nothing.bits == alone.bits
        assert more.bits != alone.bits
        assert len(alone.by_place) == len(more.by_place) == 5


def test_a_gap_is_taken_seed_by_seed_and_told_with_its_sign() -> None:
    def runs(*bits: float) -> list[Learned]:
        return [Learned([(8, one)], [one], [one], {}) for one in bits]

    learned = {ALONE: runs(2.0, 3.0, 4.0), beside("x"): runs(1.9, 2.88, 3.88)}
    learned[of_others("x")] = runs(2.0, 3.0, 4.05)
    figures = gaps(learned, ["x"])
    assert figures["text + x.gap"].value == pytest.approx(-0.34 / 3)
    assert figures["text alone.perplexity"].value == pytest.approx((4 + 8 + 16) / 3)
    assert figures["text + x.to_others"].value == pytest.approx(-0.39 / 3)
    told = verdict(PLAN, ["x"], figures, {"x less y": Figure(0.1, -0.1, 0.3)})
    assert "of x it helps that they are the picture's own (-0.130 (" in told
    assert "in all, text weighing less beside codes, -0.113 (" in told
    assert told.endswith("; what their meaning does: x less y +0.100 (-0.100 to +0.300).")


@pytest.mark.slow
def test_codes_that_say_what_words_mean_help(tmp_path: Path) -> None:
    """Each of 200 words is of one of two classes; texts name it wrongly in a fifth, codes never."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(200, (900,), generator=generator)
    filler = torch.randint(8, (900,), generator=generator)
    wrong = torch.rand(900, generator=generator) < 0.2
    classes = words % 2
    rows = list(torch.stack([words, 202 + filler, 200 + (classes ^ wrong)], dim=1))
    codes = classes[:, None].repeat(1, 4)
    sources = conditions(rows, 210, {"x": codes}, 2, 300)
    sources = [replace(one, told=(2,) * len(one.held_out)) for one in sources]
    long = replace(
        COURSE.train, steps=150, batch=32, sample_every=150, optim=OptimConfig(lr=5e-3, warmup=20)
    )
    done = learn_all(Plan((0, 1), replace(COURSE, train=long)), sources, ("native",), tmp_path)
    for seed in (0, 1):
        alone, own, others = (done[one.name, "native", seed].bits for one in sources)
        assert own < min(alone, others) - 0.015


@pytest.mark.slow
def test_noise_beside_text_costs_nothing_once_the_end_of_a_text_is_marked(tmp_path: Path) -> None:
    """Symbols of two kinds, then an end with probability 1/4: 1.56 bits each, also beside codes."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(3000).geometric_(0.25, generator=generator).clamp(max=20).long()
    rows = [
        torch.cat([torch.randint(2, (int(n) - 1,), generator=generator), torch.tensor([2])])
        for n in lengths
    ]
    known = [torch.cat([row, torch.tensor([3])]) for row in rows]  # 3 makes none of them held out
    codes = torch.randint(4, (3000, 4), generator=generator)
    alone, beside, _ = conditions(known, 4, {"x": codes}, 4, 300)
    held_out = tuple(known[-300:])
    long = replace(
        COURSE.train, steps=150, batch=32, sample_every=150, optim=OptimConfig(lr=5e-3, warmup=20)
    )
    done = learn_all(
        Plan((0,), replace(COURSE, train=long)),
        [replace(one, held_out=held_out) for one in (alone, beside)],
        ("native",),
        tmp_path,
    )
    costs = [done[name, "native", 0].bits for name in (ALONE, "text + x")]
    assert costs[1] == pytest.approx(costs[0], abs=0.03)


def test_the_whole_probe(tmp_path: Path) -> None:
    model = Model(Bright(), name="bright")
    with pytest.raises(UserError, match="no language model in bright"):
        synergy(PLAN, [model], tmp_path / "a")
    model.text = TextTokenizer.train(["a red circle", "two blue squares"] * 50, 280)
    short = replace(PLAN, course=replace(COURSE, train=replace(COURSE.train, steps=2)))
    outcome = synergy(replace(short, pictures=24), [model], tmp_path / "b")
    assert {"text + bright.gap", "text + bright.to_others", f"{ALONE}.bits"} <= set(outcome.figures)
    assert len(outcome.plots["held-out captions, 2 seeds"].curves) == 3
    assert outcome.notes.startswith("Held out: ")
