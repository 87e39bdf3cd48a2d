"""Variants differ in what their name says, are trained once each, and are compared seed by seed."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ddt_llama.config import UserError, to_dict
from ddt_llama.evaluation.intervals import Figure
from ddt_llama.generation import Model
from ddt_llama.language.text import TextTokenizer
from ddt_llama.probes import length as length_module
from ddt_llama.probes import variants as module
from ddt_llama.probes.ablate import UNTOLD, VELOCITY, ablate, base_name, variants_of
from ddt_llama.probes.ablate import verdict as ablate_verdict
from ddt_llama.probes.learn import NANO, Course
from ddt_llama.probes.length import length
from ddt_llama.probes.length import verdict as length_verdict
from ddt_llama.probes.variants import (
    VariantPlan,
    base_of,
    differences,
    each_can_vary,
    figures_of,
    judged,
)
from ddt_llama.recipes.sizes import EARLY_PIECES, nano_tokenizer
from ddt_llama.recipes.tokenizer import TokenizerRecipe
from ddt_llama.tokenizer import TimestepTokenizer, TimestepTokenizerConfig
from ddt_llama.tokenizer.decoder import DecoderConfig
from ddt_llama.tokenizer.encoder import EncoderConfig
from ddt_llama.tokenizer.quantizer import QuantizerConfig
from ddt_llama.training.loop import TrainConfig
from ddt_llama.training.optim import OptimConfig
from stand_in import StandIn

TINY = TimestepTokenizerConfig(
    image_size=32,
    patch=16,
    num_tokens=4,
    quantizer=QuantizerConfig(codebook_size=8, code_dim=2),
    encoder=EncoderConfig(dim=16, depth=1, num_heads=2),
    decoder=DecoderConfig(dim=16, depth=1, num_heads=2),
)
TRAIN = TrainConfig(
    steps=2, batch=4, sample_every=9, tensorboard=False, optim=OptimConfig(lr=1e-3, warmup=1)
)
RECIPE = TokenizerRecipe("tiny", tokenizer=TINY, train=TRAIN)
PLAN = VariantPlan(
    (0, 1),
    RECIPE.objective,
    TRAIN,
    course=Course(shape=replace(NANO, dim=16, depth=1, mlp_dim=16), train=TRAIN),
    pictures=16,
    held_out=8,
    scenes=4,
    steps=2,
    drawn=1,
)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    made = Model(TimestepTokenizer(TINY).eval(), name="tiny")
    made.text = TextTokenizer.train(["a red circle", "two blue squares"] * 50, 280)
    return made


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, f"{path}.{name}")
    else:
        yield path, value


@pytest.mark.parametrize("base", [nano_tokenizer(), RECIPE], ids=["nano", "other"])
def test_each_variant_differs_in_what_its_name_says(base: TokenizerRecipe) -> None:
    every = variants_of(base)
    as_leaves = {name: dict(leaves(to_dict(one))) for name, one in every.items()}
    changed = {
        name: {
            path.removeprefix(".")
            for path, value in own.items()
            if value != as_leaves[base_name(name, every)][path]
        }
        for name, own in as_leaves.items()
    }
    nano = base.objective.own > 0
    assert list(changed.values()) == [
        set(),
        {"tokenizer.language_order"},
        {"tokenizer.language_order"},
        {"tokenizer.pieces"},
        {"objective.own"} if nano else set(),
        {"tokenizer.prediction"},
        {"objective.balance"},
        {"objective.hide_fine"},
        {"tokenizer.decoder.token_stream"},
        {"tokenizer.encoder.queries", "tokenizer.decoder.positions"},
        {"tokenizer.encoder.queries", "tokenizer.decoder.positions"},
    ]
    anywhere = every["queries start anywhere"].tokenizer
    assert anywhere.language_order == "coarse_to_fine"  # it has no rows to be written by
    early = base.tokenizer.pieces == EARLY_PIECES
    assert f"k(t) {'linear' if early else 'early'}" in changed


def test_variants_are_trained_once_and_their_names_tell_them_apart(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []
    train = module.run
    monkeypatch.setattr(module, "run", lambda recipe, out: begun.append(out) or train(recipe, out))
    base = base_of(PLAN, model)
    longer = replace(base, tokenizer=replace(TINY, num_tokens=8))
    found = judged(PLAN, {"as it is": base, "longer": longer}, model, tmp_path)
    assert len(begun) == len(set(begun)) == 4
    assert [set(run) for runs in found.values() for run in runs] == [set(module.QUANTITIES)] * 4
    assert found["as it is"][0] != found["as it is"][1]  # two seeds are two trainings
    assert found["longer"][0]["flops"] > 1.9 * found["as it is"][0]["flops"]
    assert found["longer"][0]["parameters"] == found["as it is"][0]["parameters"] + 4 * 16 * 2
    assert judged(PLAN, {"as it is": base}, model, tmp_path)["as it is"] == found["as it is"]
    assert len(begun) == 4


def test_orders_of_one_tokenizer_share_its_training(model: Model, tmp_path: Path) -> None:
    base = base_of(PLAN, model)
    turned = replace(base, tokenizer=replace(TINY, language_order="raster"))
    found = judged(PLAN, {"as it is": base, "turned": turned}, model, tmp_path)
    assert len(list((tmp_path / "tokenizers").iterdir())) == len(PLAN.seeds)
    assert [run["psnr"] for run in found["turned"]] == [run["psnr"] for run in found["as it is"]]
    assert [run["bits"] for run in found["turned"]] != [run["bits"] for run in found["as it is"]]


def test_so_short_a_training_has_few_codes(model: Model) -> None:
    assert base_of(PLAN, model).tokenizer == TINY
    few = base_of(replace(PLAN, codes=4), model).tokenizer
    assert few == replace(TINY, quantizer=replace(TINY.quantizer, codebook_size=4))


def test_a_training_that_was_stopped_is_not_judged(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = module.run
    monkeypatch.setattr(
        module, "run", lambda recipe, out: train(recipe, out)._replace(finished=False)
    )
    with pytest.raises(KeyboardInterrupt):
        judged(PLAN, {"as it is": base_of(PLAN, model)}, model, tmp_path)
    assert not list(tmp_path.glob("parts/*.json"))


def test_differences_are_taken_seed_by_seed() -> None:
    found = {
        "as it is": [
            {"psnr": 20.0, "shapes": 0.5, "flops": 1.0},
            {"psnr": 30.0, "shapes": 0.1, "flops": 1.0},
        ],
        "better": [{"psnr": 21.0, "shapes": 0.5}, {"psnr": 31.0, "shapes": 0.2}],
    }
    apart = differences(found, {"better": "as it is"})
    assert list(apart) == ["better"]
    assert apart["better"]["psnr"] == Figure(1.0, 1.0, 1.0)
    assert apart["better"]["shapes"].low < 0 < apart["better"]["shapes"].high
    found["worse"] = [{"psnr": 18.0}, {"psnr": 29.0}]
    three = differences(found, {"better": "as it is", "worse": "as it is"})
    assert three["better"]["psnr"].low < 1 < three["better"]["psnr"].high
    assert set(three["worse"]) == {"psnr"}
    both = differences(found, {"better": "as it is", "worse": "as it is"}, models=2)
    assert both["better"]["psnr"].low < three["better"]["psnr"].low  # more is to hold together
    del found["worse"]
    assert set(apart["better"]) == {"psnr", "shapes"}
    assert ablate_verdict(apart) == "better +1.0 dB (+1.0 to +1.0)"
    assert ablate_verdict({"same": {"psnr": Figure(0.1, -0.1, 0.3)}}) == ("not told apart: same")
    assert figures_of(found)["better.psnr"].value == 26.0
    two = differences(found, {"as it is": "better"})
    assert two["as it is"]["psnr"].value == -1.0


def test_only_networks_with_tokens_tied_to_timesteps_can_vary(model: Model) -> None:
    each_can_vary([model])
    bare = Model(model.tokenizer, name="bare")
    with pytest.raises(UserError, match="no language model in bare"):
        each_can_vary([bare])

    class Grid(StandIn):
        prefixes = False

    with pytest.raises(UserError, match="tied to timesteps; grid has none"):
        each_can_vary([Model(Grid(), name="grid")])
    with pytest.raises(UserError, match="trains networks"):
        base_of(PLAN, Model(StandIn(), name="x"))


def test_both_probes_tell_what_they_found(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("length", "ablate"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(length_module, "LENGTHS", (2, 4))
    told = length(PLAN, [model], tmp_path / "length")
    assert {"tiny.2 tokens.psnr", "tiny.4 tokens.flops"} <= set(told.figures)
    assert told.verdict.startswith("tiny: 2 tokens give ")
    plot = told.plots["tiny: PSNR in dB, 2 seeds"]
    lengths, dB = plot.curves[""]
    assert (lengths, dB[0]) == ([2.0, 4.0], pytest.approx(told.figures["tiny.2 tokens.psnr"].value))
    least, most = plot.bands[""]
    assert all(low < middle < high for low, middle, high in zip(least, dB, most, strict=True))
    no_prompts = {name: f for name, f in told.figures.items() if "shapes" not in name}
    own = {name.removeprefix("tiny."): f for name, f in no_prompts.items()}
    assert "objects" not in length_verdict(own)

    every = variants_of(RECIPE)
    few = {name: every[name] for name in ("as it is", "written in raster order", UNTOLD, VELOCITY)}
    monkeypatch.setattr("ddt_llama.probes.ablate.variants_of", lambda base: few)
    told = ablate(PLAN, [model], tmp_path / "ablate")
    assert "tiny.written in raster order.psnr.more" in told.figures
    assert len(told.rows) == len(module.MEASURED)
    shown = told.rows["tiny: PSNR in dB, more than its base"]
    assert list(shown) == [*list(few)[1:3], f"{VELOCITY} (base: {UNTOLD})"]
    assert shown[UNTOLD] == told.figures[f"tiny.{UNTOLD}.psnr.more"]
    assert told.verdict.startswith(f"After {PLAN.train.steps} steps of a tokenizer, 2 seeds")
    psnr = {name: told.figures[f"tiny.{name}.psnr"].value for name in few}
    more = told.figures[f"tiny.{VELOCITY}.psnr.more"].value
    assert more == pytest.approx(psnr[VELOCITY] - psnr[UNTOLD])


def test_a_quick_plan_is_short_and_others_are_refused() -> None:
    short = VariantPlan().quick()
    assert short.train.steps < 10 > short.course.train.steps
    assert len(short.seeds) == 2
    for part in ("train", "data"):
        given = replace(getattr(PLAN, part), seed=1)
        with pytest.raises(UserError, match=f"^{part}.seed: given 1"):
            replace(PLAN, **{part: given})
    for wrong in ({"seeds": ()}, {"scenes": 0}, {"steps": 0}, {"codes": 0}):
        with pytest.raises(UserError):
            replace(PLAN, **wrong)


def test_a_change_that_costs_2_dB_is_seen_and_one_that_costs_nothing_is_not(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three seeds of known scatter; the velocity costs as much as learning from itself gives."""
    costs = {"k(t) early": 2.0, VELOCITY: 1.5, UNTOLD: 1.5}

    def known(plan: Any, variants: Any, *rest: Any) -> Any:
        return {
            name: [
                {"psnr": 25 + seed - costs.get(name, 0.0) + 0.02 * ((place + seed) % 3)}
                for seed in range(3)
            ]
            for place, name in enumerate(variants)
        }

    monkeypatch.setattr("ddt_llama.probes.ablate.judged", known)
    told = ablate(replace(PLAN, seeds=(0, 1, 2)), [model], tmp_path)
    assert "k(t) early -2.0 dB (-2.1 to -1.9)" in told.verdict
    assert f"{UNTOLD} -1.5 dB" in told.verdict
    unseen = told.verdict.partition("not told apart: ")[2]
    assert f"{VELOCITY} (base: {UNTOLD})" in unseen
    assert "gradients" in unseen
    assert told.figures["tiny.k(t) early.psnr.more"].value == pytest.approx(-2, abs=0.02)

    monkeypatch.setattr("ddt_llama.probes.length.judged", known)
    costs = {f"{count} tokens": 100 / count for count in (8, 16, 32, 64, 128)}
    told = length(replace(PLAN, seeds=(0, 1, 2)), [model], tmp_path)
    assert "8 tokens give 13.5 (" in told.verdict
    assert "128 tokens give 25.2 (" in told.verdict
    x, y = told.plots["tiny: PSNR in dB, 3 seeds"].curves[""]
    assert x == [8, 16, 32, 64, 128]
    assert y == sorted(y)
