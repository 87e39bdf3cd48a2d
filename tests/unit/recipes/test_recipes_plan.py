"""What a rank holds in closed form, and how long a training takes."""

import math
from typing import Any

import pytest

from ddt_llama.config import UserError, override
from ddt_llama.hardware import ACCELERATORS
from ddt_llama.recipes import recipe_named
from ddt_llama.recipes.cost import cost_of
from ddt_llama.recipes.memory import Held, Sizes
from ddt_llama.recipes.plan import (
    NODE,
    PUBLISHED,
    USABLE,
    Choice,
    Memory,
    Step,
    choices,
    flops_offered,
    fullest,
    learning_of,
    plan,
)

P = 1000
SIZES = Sizes(
    blocks=900,
    largest=90,
    outside=100,
    trained=P,
    averaged=P,
    muon=0,
    products=0,
    buffers=7,
    frozen=3,
)
# The end of a pass: all gradients, nothing else.
END = Held(gradients=4 * 900, gradients_outside=4 * 100)


def held(choice: Choice, gpus: int, sizes: Sizes = SIZES, **changes: Any) -> Memory:
    given = {"accumulates": False, "low": False, **changes}
    moments = given.pop("moments", [END])
    return fullest(sizes, moments, choice, gpus, **given)


def states(memory: Memory) -> float:
    return memory.weights + memory.gradients + memory.moments


def test_adamw_of_one_process_is_sixteen_bytes_a_parameter() -> None:
    found = held(Choice("none", "none"), 1)
    assert states(found) == 16 * P
    assert found.average == 4 * P
    assert found.total == 20 * P + 7 + 3


@pytest.mark.parametrize(("shard", "gpus", "shards"), [("full", 16, 16), ("hybrid", 16, NODE)])
def test_shards_hold_their_share_of_states(shard: Any, gpus: int, shards: int) -> None:
    found = held(Choice(shard, "none"), gpus)
    assert found.weights + found.moments == 12 * P / shards
    assert found.average == 4 * P / shards
    # What is outside of blocks is whole until the pass ends; blocks come one and one ahead.
    assert found.gradients == 4 * 900 / shards + 4 * 100
    assert found.copies == 4 * (100 + 3 * 90)


def test_averaging_over_whole_copies_holds_gradients_twice() -> None:
    alone, two = (held(Choice("none", "none"), gpus).gradients for gpus in (1, 2))
    assert (alone, two) == (4 * P, 8 * P)


def test_in_bfloat16_weights_travel_in_half_and_gradients_are_summed_whole() -> None:
    found = held(Choice("full", "none"), 1000, low=True)
    assert found.copies == 2 * (100 + 3 * 90) + 4 * 90
    leaving = held(Choice("full", "none"), 1000, low=True, moments=[Held()])
    assert leaving.copies in (found.copies, 8 * 100)


def test_gradients_of_earlier_passes_stay() -> None:
    activations = Held(activations=50_000)
    once, again = (
        held(Choice("none", "none"), 1, moments=[activations, END], accumulates=more)
        for more in (False, True)
    )
    assert once.activations == again.activations == 50_000
    assert (once.gradients, again.gradients) == (0, 4 * P)


def test_offload_leaves_states_to_the_cpu() -> None:
    found = held(Choice("full", "none", offload=True), 10)
    assert found.weights == found.moments == found.average == 0
    assert found.host == 20 * P / 10
    assert found.gradients == pytest.approx(4 * 100 - 4 * 100 / 10)
    assert found.total == found.gradients + found.copies + 7 + 3


def test_muon_has_one_moment_and_holds_its_products() -> None:
    sizes = SIZES._replace(muon=800, products=500)
    alone, four = (held(Choice("none", "none"), gpus, sizes) for gpus in (1, 4))
    assert alone.moments == 4 * (2 * P - 800)
    assert alone.update == 4 * (800 + 500)
    assert four.update in (0, 4 * 3 * 800)


def small(**fields: Any) -> Any:
    shape = {"tokenizer.encoder.depth": 1, "tokenizer.decoder.depth": 1, **fields}
    return override(recipe_named("nano_tokenizer"), shape)


@pytest.mark.slow
def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    step = Step(small(), 2)
    for choice in choices(2)[:4]:
        room = 3e9
        most = step.most(choice, room)
        assert most > 1
        assert step.memory(choice, most).total <= room < step.memory(choice, most + 1).total
    assert step.most(choices(2)[0], 1e6) == 0


@pytest.mark.slow
def test_hours_are_flops_over_what_is_reached() -> None:
    recipe = small()
    found = plan(recipe, 4, "a100", samples=10**9, utilisation=0.25, price=2.0)
    seconds = cost_of(recipe).learn * 10**9 / (4 * ACCELERATORS["a100"].flops * 0.25)
    hours = {row.choice.recompute: row.hours for row in found.rows}
    assert hours["none"] == pytest.approx(seconds / 3600)
    assert hours["blocks"] == pytest.approx(4 / 3 * seconds / 3600)
    assert found.cost(found.best) == pytest.approx(2 * 4 * seconds / 3600)
    assert found.best.choice == Choice("none", "none")
    assert found.micro_batch == math.ceil(recipe.train.batch / 4)
    usual = plan(recipe, 4, "a100")
    assert usual.samples == recipe.train.steps * recipe.train.samples_a_step
    assert usual.cost(usual.best) is None


def test_choices_are_those_that_so_many_have() -> None:
    assert {choice.shard for choice in choices(1)} == {"none"}
    assert {choice.shard for choice in choices(NODE)} == {"none", "full"}
    assert {choice.shard for choice in choices(NODE + 1)} == {"none", "hybrid", "full"}
    assert len(choices(NODE + 1)) == 12


@pytest.mark.slow
def test_what_fits_nowhere_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = small(**{"tokenizer.decoder.dim": 16_000, "tokenizer.decoder.num_heads": 5})
    told = r"^nano_tokenizer does not fit 1 x a100: "
    with pytest.raises(UserError, match=told + r".*optimizer alone need 149 GB on each"):
        plan(wide, 1, "a100")
    monkeypatch.setattr(Step, "kept", lambda *_: 0.0)  # as where a pass takes the most
    with pytest.raises(UserError, match=told + r".*one sample a pass needs 149 GB on each"):
        plan(wide, 1, "a100")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpu": "b200"}, "gpu: given 'b200', allowed are h200, h100, a100, 910b"),
        ({"gpus": 0}, "gpus: given 0"),
        ({"samples": 0}, "images: given 0"),
        ({"utilisation": 0.0}, "utilisation: given 0"),
        ({"utilisation": 40.0}, "utilisation: given 40"),
        ({"price": -1.0}, "price: given -1"),
    ],
)
def test_numbers_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"gpus": 1, "gpu": "h100", **changes}
    with pytest.raises(UserError, match=message):
        plan(small(), **given)


def test_published_trainings_offer_what_their_accelerators_can_do() -> None:
    stage, tokenizer = PUBLISHED
    peak = ACCELERATORS["910b"].flops
    assert flops_offered(stage) == pytest.approx(512 * 14 * 86_400 * peak)
    assert flops_offered(tokenizer) == pytest.approx(32 * 96 * 3600 * peak)
    assert stage.samples is not None
    # Below what any training reaches: every pair was seen more than once, or much time went by.
    assert 0 < stage.samples * learning_of(stage) / flops_offered(stage) < 0.4
    assert 0 < USABLE < 1
