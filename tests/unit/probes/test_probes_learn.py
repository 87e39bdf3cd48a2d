"""The probes on sources whose answer is known."""

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from known import iid, markov, markov_bits

from ddt_llama.config import UserError
from ddt_llama.evaluation.intervals import Figure
from ddt_llama.language.backbone import BackboneConfig
from ddt_llama.probes import learn as module
from ddt_llama.probes.base import (
    Outcome,
    Plot,
    close_folder,
    open_folder,
    percent,
    points,
    told,
)
from ddt_llama.probes.entropy import alone, entropy, orders_of, slope, without_mirrors
from ddt_llama.probes.learn import Course, Learned, Lesson, Plan, learn
from ddt_llama.probes.orders import places
from ddt_llama.probes.sequences import Sequences, of_codes
from ddt_llama.probes.shuffle import shuffle
from ddt_llama.training.loop import TrainConfig
from ddt_llama.training.optim import OptimConfig

COURSE = Course(
    shape=BackboneConfig(dim=32, depth=2, num_heads=2, num_kv_heads=2, mlp_dim=64),
    train=TrainConfig(
        steps=150,
        batch=32,
        ema=0.95,
        sample_every=75,
        tensorboard=False,
        optim=OptimConfig(lr=1e-2, warmup=20, decay_share=0.5),
    ),
)
ALPHABET, LENGTH, STAY = 6, 16, 0.9


def of(course: Course) -> Lesson:
    """Return a lesson of whatever sequences it is given."""
    return Lesson(course, "", "")


def chain(count: int = 3000) -> Sequences:
    return markov(count, LENGTH, ALPHABET, held_out=200, stay=STAY)


def test_a_chain_costs_what_its_entropy_says(tmp_path: Path) -> None:
    learned = learn(of(COURSE), chain(), tmp_path / "x")
    first, rest = learned.by_place[0], float(np.mean(learned.by_place[1:]))
    assert first == pytest.approx(math.log2(ALPHABET), abs=0.1)
    assert rest == pytest.approx(markov_bits(ALPHABET, STAY), abs=0.12)
    assert learned.bits == pytest.approx(np.mean(learned.by_place), abs=1e-4)
    assert float(np.mean(learned.entropy)) == pytest.approx(learned.bits, abs=0.1)
    assert [seen for seen, _ in learned.curve] == [75 * 32, 150 * 32]
    assert learned.curve[-1][1] == pytest.approx(learned.bits, abs=1e-3)


@pytest.mark.slow
def test_shuffling_costs_a_chain_bits_and_noise_none(tmp_path: Path) -> None:
    lesson = replace(COURSE, train=replace(COURSE.train, steps=80, sample_every=40))
    sources = [chain(), iid(3000, LENGTH, ALPHABET, held_out=200)]
    outcome = shuffle(Plan((0, 1), lesson), sources, tmp_path)
    figures = outcome.figures
    assert figures["markov.fixed.gap"].value > 0.1
    assert figures["markov.fresh.gap"].value > figures["markov.fixed.gap"].value
    for order in ("native", "fixed", "fresh"):
        assert figures[f"iid.{order}"].value == pytest.approx(math.log2(ALPHABET), abs=0.08)
    assert abs(figures["iid.fixed.gap"].value) < 0.05
    scale = LENGTH / (LENGTH * math.log2(ALPHABET))
    gap, per_bit = figures["markov.fixed.gap"], figures["markov.fixed.per_bit"]
    assert per_bit.value == pytest.approx(scale * gap.value)
    share = figures["markov.fixed.gap_share"].value - figures["iid.fixed.gap_share"].value
    assert figures["markov less iid.fixed.gap_share"].value == pytest.approx(share)
    assert figures["markov.fixed.gap_share"].value > 0.1
    apart = figures["markov less iid.fixed.per_bit"]
    assert apart.value == pytest.approx(per_bit.value - figures["iid.fixed.per_bit"].value)
    assert "After 80 steps of 32 sequences one fixed permutation costs markov" in outcome.verdict
    assert "per bit of an image markov less iid" in outcome.verdict
    half, end = (figures[f"markov.fixed.{name}"].value for name in ("half_way", "gap"))
    (seen, cost), *_ = outcome.plots["what one fixed permutation costs, 2 seeds"].curves.values()
    assert seen == [40 * 32, 80 * 32]
    assert cost == pytest.approx([half, end], abs=1e-3)


@pytest.mark.slow
def test_an_order_that_hides_a_rule_costs_bits_that_training_wins_back(tmp_path: Path) -> None:
    """Counting: behind the first symbol all is known, in any order to who knows the places."""
    first = torch.randint(16, (3000, 1), generator=torch.Generator().manual_seed(0))
    rows = (first + torch.arange(16)) % 16
    lesson = replace(COURSE, train=replace(COURSE.train, steps=100, sample_every=25))
    outcome = shuffle(Plan((0, 1), lesson), [of_codes("counting", rows, 16, 200)], tmp_path)
    figures = outcome.figures
    assert figures["counting.native"].value == pytest.approx(math.log2(16) / 16, abs=0.1)
    gap, half = (figures[f"counting.fixed.{name}"].value for name in ("gap", "half_way"))
    assert half > 2 * gap
    assert half > 0.3


def test_codes_in_several_orders_are_shuffled_once(tmp_path: Path) -> None:
    rows = torch.randint(6, (300, 8), generator=torch.Generator().manual_seed(0))
    one = of_codes("one", rows, 6, held_out=20)
    turned = of_codes("turned", rows[:, [3, 0, 6, 1, 7, 2, 5, 4]], 6, held_out=20)
    other = of_codes("other", (rows + 1) % 6, 6, held_out=20)
    short = replace(COURSE, train=replace(COURSE.train, steps=2, sample_every=1))
    figures = shuffle(Plan((0, 1), short), [one, turned, other], tmp_path).figures
    assert figures["turned.fixed"] == figures["one.fixed"] != figures["other.fixed"]
    assert figures["turned.native"] != figures["one.native"]
    learned = {path.name for path in (tmp_path / "lessons").iterdir()}
    assert {name for name in learned if name.startswith("turned")} == {
        "turned-native-0",
        "turned-native-1",
    }
    assert len(learned) == 2 * (3 + 1 + 3)


def test_texts_are_packed_so_that_one_permutation_means_one_thing(tmp_path: Path) -> None:
    texts = tuple(torch.tensor([n % 4, *[2] * (n % 3)]) for n in range(400))
    short = replace(COURSE, train=replace(COURSE.train, steps=2, sample_every=1))
    sources = [Sequences("t", 4, texts[:300], texts[300:]), iid(300, 8, 4, held_out=20)]
    outcome = shuffle(Plan((0, 1), short), sources, tmp_path)
    rows = sum(len(one) + 1 for one in texts[300:]) // 8
    assert outcome.notes == f"Held out: t {rows} rows, iid 20 rows."


def test_a_finished_lesson_is_not_learned_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = replace(COURSE, train=replace(COURSE.train, steps=4, sample_every=2))
    one = learn(of(short), chain(300), tmp_path / "x")
    monkeypatch.setattr(module, "train", None)
    assert learn(of(short), chain(300), tmp_path / "x") == one
    with pytest.raises(UserError, match="another recipe"):
        learn(replace(of(short), order="fixed"), chain(300), tmp_path / "x")
    monkeypatch.undo()
    longer = replace(short, train=replace(short.train, steps=6))
    assert [seen for seen, _ in learn(of(longer), chain(300), tmp_path / "x").curve] == [
        64,
        128,
        192,
    ]


@pytest.mark.slow
def test_a_lesson_that_a_signal_stops_leaves_no_result_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = replace(COURSE, train=replace(COURSE.train, steps=20, sample_every=5))
    whole = learn(of(short), chain(300), tmp_path / "whole")
    measure, calls = module.surprises, []

    def stopped(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(*given, **named)

    monkeypatch.setattr(module, "surprises", stopped)
    with pytest.raises(KeyboardInterrupt):
        learn(of(short), chain(300), tmp_path / "stopped")
    assert not (tmp_path / "stopped" / module.RESULT).exists()
    assert learn(of(short), chain(300), tmp_path / "stopped") == whole


def test_entropy_falls_where_symbols_become_certain_and_rises_backwards(tmp_path: Path) -> None:
    # Of 12 symbols the s-th repeats the first with probability s / 11, and else is any.
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(ALPHABET, (3000, 12), generator=generator)
    certain = torch.rand(3000, 12, generator=generator) < torch.arange(12) / 11
    rows = torch.where(certain, rows[:, :1], rows)
    lesson = replace(COURSE, train=replace(COURSE.train, steps=80, sample_every=80))
    sources = [of_codes("fading", rows, ALPHABET, held_out=200)]
    outcome = entropy(Plan((0, 1), lesson), sources, tmp_path)
    assert outcome.figures["fading.native.slope"].value < -1
    assert outcome.figures["fading.reversed.slope"].value > 1
    assert "of fading falls" in outcome.verdict
    assert "strides 2 and 3" in outcome.verdict
    # Each place alone is uniform: what falls is what the first symbol tells.
    assert outcome.figures["fading.alone.entropy"].value == pytest.approx(
        math.log2(ALPHABET), abs=0.01
    )
    assert abs(outcome.figures["fading.alone.slope"].value) < 0.01
    assert "that of each place alone" in outcome.verdict
    words = Sequences("words", 3, (torch.tensor([0, 1]), torch.tensor([1])), (torch.tensor([0]),))
    # One of two symbols, and a quarter of a nat that two counts of two kinds lack; the shorter has
    # no second symbol.
    assert alone(words) == [pytest.approx(1 + 0.25 / math.log(2)), 0.0]


def test_every_pass_of_a_stride_has_its_own_slope(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two bits at the first place, one at the last, in whatever order they are read."""

    def known(plan: Plan, sources: Any, orders: Any, folder: Path) -> Any:
        whole = np.linspace(2, 1, 60)
        return {
            (sources[0].name, order, seed): Learned([(1, 1.5)], *2 * [row.tolist()], {})
            for order in orders
            for seed in plan.seeds
            for row in [whole[places(order, 60, seed, 0)]]
        }

    monkeypatch.setattr("ddt_llama.probes.entropy.learn_all", known)
    rows = torch.randint(ALPHABET, (30, 60), generator=torch.Generator().manual_seed(0))
    figures = entropy(Plan((0, 1), COURSE), [of_codes("x", rows, 6, 5)], tmp_path).figures
    slopes = {"native": -1.0, "stride-2": -1.0, "stride-3": -1.0, "reversed": 1.0}
    for order, value in slopes.items():
        assert figures[f"x.{order}.slope"].value == pytest.approx(value, abs=0.06)


@pytest.mark.slow
def test_entropy_is_level_in_noise_and_falls_where_the_second_pass_knows_both_sides(
    tmp_path: Path,
) -> None:
    lesson = replace(COURSE, train=replace(COURSE.train, steps=70, sample_every=70))
    noise = iid(3000, LENGTH, ALPHABET, held_out=200)
    outcome = entropy(Plan((0, 1), lesson), [noise, chain()], tmp_path)
    figures = outcome.figures
    for order in ("native", "stride-2", "stride-3", "reversed"):
        assert abs(figures[f"iid.{order}.slope"].value) < 0.1
        assert figures[f"iid.{order}.entropy"].value == pytest.approx(math.log2(6), abs=0.05)
    _, along = outcome.plots["markov, 2 seeds"].curves["stride-2"]
    first, second = np.mean(along[1 : LENGTH // 2]), np.mean(along[LENGTH // 2 :])
    assert second < first - 0.2  # a symbol between two known ones is surer than two steps away
    _, natively = outcome.plots["markov, 2 seeds"].curves["native"]
    assert np.mean(natively[1:]) == pytest.approx(markov_bits(ALPHABET, STAY), abs=0.12)
    assert abs(figures["markov.native.slope"].value) < 0.15
    less = figures["iid less markov.native.slope"]
    assert less.value == pytest.approx(
        figures["iid.native.slope"].value - figures["markov.native.slope"].value
    )


def test_the_slope_is_that_of_a_line_in_every_segment() -> None:
    line = [9.0, *np.linspace(3, 1, 10)]  # the first is left out
    often = [3] * len(line)
    assert slope(line, often, 1) == pytest.approx(-2)
    two = [9.0, *np.linspace(3, 1, 10), *np.linspace(5, 4, 11)]
    assert slope(two, [1] * len(two), 2) == pytest.approx((-2 - 1) / 2)
    assert slope([1.0], [1], 1) == 0
    bent = [9.0, *np.linspace(0, 1, 11), *np.linspace(1, 9, 10)]  # hardly anyone comes so far
    assert slope(bent, [100_000] * 12 + [1] * 10, 1) == pytest.approx(2, abs=0.01)
    one, other = (torch.zeros(length, dtype=torch.long) for length in (4, 5))
    assert len(orders_of(Sequences("codes", 2, (one,), (one, one)))) == 4
    assert orders_of(Sequences("captions", 2, (one,), (one, other))) == ("native",)


def test_a_step_that_few_sequences_reach_counts_for_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def known(plan: Plan, sources: Any, orders: Any, folder: Path) -> Any:
        learned = Learned([(1, 1.5)], [1.0, 1.0, 5.0], [2.0, 2.0, 7.0], {})
        return {(sources[0].name, "native", seed): learned for seed in plan.seeds}

    monkeypatch.setattr("ddt_llama.probes.entropy.learn_all", known)
    short, long = torch.tensor([0, 1]), torch.tensor([0, 1, 2])
    words = Sequences("words", 3, (short, short, short, long), (short, short, short, long))
    figures = entropy(Plan((0, 1), COURSE), [words], tmp_path).figures
    assert figures["words.native.entropy"].value == pytest.approx((8 * 2 + 7) / 9)
    assert figures["words.alone.entropy"].value == 0  # every place has one symbol


def test_the_middle_of_a_training_is_told_where_it_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def learned(*seen: int) -> Any:
        def all_of(plan: Plan, sources: Any, orders: Any, folder: Path) -> Any:
            return {
                (one.name, order, seed): Learned(
                    [(at, 2.0 - at / 1000 + 3 * (order != "native") * at) for at in seen],
                    [],
                    [],
                    {},
                )
                for one in sources
                for order in orders
                for seed in plan.seeds
            }

        return all_of

    source = [iid(300, 8, 4, held_out=20)]
    for seen, half in (((100, 200, 300, 400), 200), ((100, 200, 300), None), ((500,), None)):
        monkeypatch.setattr("ddt_llama.probes.shuffle.learn_all", learned(*seen))
        figures = shuffle(Plan((0, 1), COURSE), source, tmp_path).figures
        found = figures.get("iid.fixed.half_way")
        assert (found and found.value) == (half and pytest.approx(3 * half))


def test_models_whose_names_begin_alike_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def known(plan: Plan, sources: Any, orders: Any, folder: Path) -> Any:
        keys = [(one.name, order, s) for one in sources for order in orders for s in plan.seeds]
        return {key: Learned([(1, 1.5)], [], [], {}) for key in keys}

    monkeypatch.setattr("ddt_llama.probes.shuffle.learn_all", known)
    rows = torch.randint(6, (60, 8), generator=torch.Generator().manual_seed(0))
    names = ("run 1", "run 1 coarse to fine", "run 2")
    sources = [of_codes(name, (rows + turn) % 6, 6, 20) for turn, name in enumerate(names)]
    verdict = shuffle(Plan((0, 1), COURSE), sources, tmp_path).verdict
    assert "run 1 less run 2 " in verdict
    assert "run 1 coarse to fine less run 2 " in verdict
    assert "run 1 less run 1 coarse" not in verdict


@pytest.mark.slow
def test_a_lesson_killed_before_its_result_was_written_has_the_same_one(
    tmp_path: Path,
) -> None:
    short = replace(COURSE, train=replace(COURSE.train, steps=20, sample_every=10, accumulate=2))
    whole = learn(of(short), chain(300), tmp_path / "whole", attention)
    assert [seen for seen, _ in whole.curve] == [10 * 64, 20 * 64]

    def killed(model: Any, vocabulary: Any) -> Any:
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        learn(of(short), chain(300), tmp_path / "killed", killed)
    assert learn(of(short), chain(300), tmp_path / "killed", attention) == whole


def test_a_lesson_from_which_a_part_is_gone_is_no_result(tmp_path: Path) -> None:
    short = replace(COURSE, train=replace(COURSE.train, steps=4, sample_every=2))
    folder = tmp_path / "x"
    whole = learn(of(short), chain(300), folder)
    result, metrics = folder / "result.json", folder / "metrics.jsonl"
    kept = result.read_text()
    for damaged in ("{}", "[]", kept.replace("entropy", "entropie"), '{"curve": []}'):
        result.write_text(damaged)
        with pytest.raises(UserError, match=r"result\.json: damaged; delete .*x, and the same"):
            learn(of(short), chain(300), folder)
    result.unlink()
    lines = metrics.read_text().splitlines(keepends=True)
    for left in (lines[:-1], lines[1:], []):  # the last point alone would be another figure
        metrics.write_text("".join(left))
        with pytest.raises(UserError, match=r"jsonl: lines .* are missing; delete .*x, and"):
            learn(of(short), chain(300), folder)
    metrics.write_text("".join(lines))
    assert learn(of(short), chain(300), folder) == whole


def attention(model: Any, vocabulary: Any) -> dict[str, float]:
    """Say by which kernel a pupil is examined."""
    return {"eager": float(model.config._attn_implementation == "eager")}


def test_sequences_read_from_the_other_end_are_learned_once() -> None:
    rows = torch.arange(24).view(6, 4)
    one = of_codes("one", rows, 24, held_out=2)
    back = of_codes("back", rows.flip(1), 24, held_out=2)
    other = of_codes("other", rows.flip(0), 24, held_out=2)
    fewer = of_codes("fewer", rows.flip(1)[1:], 24, held_out=2)
    assert without_mirrors([one, back, other, fewer, one]) == [one, other, fewer, one]


def test_heads_that_look_back_find_what_stood_there_sooner(tmp_path: Path) -> None:
    """Every symbol is that of three places before: two before the one that is read."""
    first = torch.randint(ALPHABET, (1000, 3), generator=torch.Generator().manual_seed(0))
    rows = of_codes("threes", first.repeat(1, 5), ALPHABET, held_out=100)
    short = replace(COURSE, train=replace(COURSE.train, steps=50, sample_every=50))
    at_random = learn(of(short), rows, tmp_path / "a").by_place[3:]
    looking = learn(of(replace(short, look_back=True)), rows, tmp_path / "b").by_place[3:]
    assert np.mean(looking) < 0.5 * np.mean(at_random)


def test_texts_of_any_length_are_learned(tmp_path: Path) -> None:
    rows = tuple(torch.tensor([1 + (n % 3)] * (2 + n % 5)) for n in range(400))
    short = replace(COURSE, train=replace(COURSE.train, steps=120))
    learned = learn(of(short), Sequences("t", 5, rows[:360], rows[360:]), tmp_path)
    assert learned.by_place[1] < 0.2 < learned.by_place[0]
    assert len(learned.by_place) == 6


def test_a_folder_belongs_to_one_probe(tmp_path: Path) -> None:
    config = Plan((0, 1), COURSE)
    open_folder(tmp_path / "a", config)
    open_folder(tmp_path / "a", config)
    with pytest.raises(UserError, match=r"another probe.*seeds was \[0, 1\], now \[0, 2\]"):
        open_folder(tmp_path / "a", Plan((0, 2), COURSE))
    (tmp_path / "a" / "config.json").write_text("[]")
    with pytest.raises(UserError, match="another probe"):
        open_folder(tmp_path / "a", config)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").touch()
    with pytest.raises(UserError, match="is no probe"):
        open_folder(tmp_path / "b", config)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / ".config.json.x").touch()  # killed while it wrote the first file
    open_folder(tmp_path / "c", config)
    plot, rows = Plot({"c": ([1.0, 2.0], [2.0, 1.0])}, "x", "y"), {"row": Figure(1.0, 0.5, 2.0)}
    seeds = Plot.of_seeds({"d": [[(1, 2.0), (2, 4.0)], [(1, 4.0), (2, 4.0)]]}, "x", "y")
    assert seeds.curves == {"d": ([1.0, 2.0], [3.0, 4.0])}
    plots, some = {"a plot": plot, "seeds": seeds}, {"some rows": rows}
    outcome = Outcome({}, "Nothing was found.", plots, rows=some, notes="By hand.")
    close_folder(tmp_path / "a", outcome, "shuffle: x", config.about(), "What for?", "x: y.")
    page = (tmp_path / "a" / "README.md").read_text()
    assert "Nothing was found." in page
    assert "2 seeds of a language model" in page
    assert "\n\nWhat for?\n\n" in page
    assert "\n\nNames of the figures: x: y.\n\n| figure" in page
    assert "By hand." in page
    points = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    assert points[0] == '{"plot": "a plot", "curve": "c", "x": 1.0, "y": 2.0}'
    assert json.loads(points[2]) == {
        "plot": "seeds",
        "curve": "d",
        "x": 1.0,
        "y": 3.0,
        "least": 2.0,
        "most": 4.0,
    }
    own = {"plot": "some rows", "row": "row", "value": 1.0, "low": 0.5, "high": 2.0}
    assert [json.loads(one) for one in points[4:]] == [own]
    for name in ("a-plot.png", "seeds.png", "some-rows.png"):
        assert (tmp_path / "a" / name).read_bytes().startswith(b"\x89PNG")
        assert f"({name})" in page


def test_figures_are_told_with_their_intervals() -> None:
    assert told(Figure(0.314, 0.25, 0.371)) == "0.31 (0.25 to 0.37)"
    assert told(Figure(1.0, -0.5, 2.0), 1, sign="+") == "+1.0 (-0.5 to +2.0)"
    assert percent(Figure(0.314, 0.25, 0.371)) == "31 % (25 to 37)"
    assert points(Figure(-0.314, -0.371, 0.25)) == "-31 points (-37 to +25)"
    assert told(Figure(0.314, -math.inf, math.inf)) == "0.31 (one seed: no interval)"


def test_seeds_must_differ() -> None:
    for wrong in ((1, 1), (), (0, -1), (10**20,)):
        with pytest.raises(UserError, match="different ones from 0 to"):
            Plan(wrong)
