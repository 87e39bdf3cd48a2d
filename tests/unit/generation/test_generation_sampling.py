"""Sampling values: what they keep, what they refuse, and chance that belongs to a row."""

import math

import pytest
import torch
from torch.nn import functional as F

from ddt_llama.config import UserError
from ddt_llama.generation.sampling import (
    FULL,
    Greedy,
    Sampling,
    TopK,
    TopP,
    choose,
    guide,
    restrict,
    uniforms,
)

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, 0.5]])


def test_guidance_is_exact_at_both_ends_and_linear_between() -> None:
    conditional, unconditional = torch.randn(2, 3, 7, generator=torch.manual_seed(0)).unbind()
    assert torch.equal(guide(conditional, unconditional, 0.0), unconditional)
    assert torch.equal(guide(conditional, unconditional, 1.0), conditional)
    expected = unconditional + 3.5 * (conditional - unconditional)
    torch.testing.assert_close(guide(conditional, unconditional, 3.5), expected)


def test_top_k_keeps_the_k_largest() -> None:
    kept = restrict(LOGITS, Sampling(TopK(2))).isfinite()
    assert kept.tolist() == [[True, True, False, False, False]]
    assert torch.equal(restrict(LOGITS, Sampling(TopK(99))), LOGITS)


@pytest.mark.parametrize(
    ("p", "count"), [(1e-320, 1), (0.01, 1), (0.5, 1), (0.6, 2), (0.94, 4), (1.0, 5)]
)
def test_top_p_keeps_the_fewest_that_reach_p(p: float, count: int) -> None:
    kept = restrict(LOGITS, Sampling(TopP(p))).isfinite()[0]
    chances = LOGITS[0].softmax(0)
    assert int(kept.sum()) == count
    assert float(chances[kept].sum()) >= p - 1e-6
    assert chances[kept].min() >= chances[~kept].max() if count < 5 else kept.all()
    assert float(chances[kept].sum() - chances[kept].min()) < p


def test_temperature_comes_before_the_method() -> None:
    hot = restrict(LOGITS, Sampling(TopP(0.6), temperature=4.0)).isfinite()
    assert int(hot.sum()) == 3  # two at temperature 1
    torch.testing.assert_close(restrict(LOGITS, Sampling(temperature=2.0)), LOGITS / 2)


def test_tokens_are_drawn_from_the_softmax() -> None:
    draws = 20_000
    chance = uniforms(list(range(draws)), 4)[3]
    chosen = choose(LOGITS.expand(draws, -1), Sampling(temperature=1.5), chance)
    counts = torch.bincount(chosen, minlength=5) / draws
    expected = (LOGITS[0] / 1.5).softmax(0)
    spread = (expected * (1 - expected) / draws).sqrt()
    assert ((counts - expected).abs() < 4 * spread).all()


def test_the_token_is_the_first_at_which_the_sum_exceeds_the_number() -> None:
    logits = torch.randn(200, 4_000, generator=torch.manual_seed(0), dtype=torch.float64)
    chance = torch.rand(200, generator=torch.manual_seed(1), dtype=torch.float64)
    for row, u, found in zip(logits, chance, choose(logits, FULL, chance), strict=True):
        total, token = 0.0, -1
        while total <= float(u):
            token += 1
            total += float(row.softmax(0)[token])
        assert int(found) == token


@pytest.mark.parametrize("size", [1, 5, 16_384])
def test_the_ends_of_chance_never_leave_what_may_be_drawn(size: int) -> None:
    chance = torch.tensor([0.5 * 2.0**-22, 1 - 0.5 * 2.0**-22])  # of 22 bits
    for seed in range(20):
        logits = torch.randn(2, size + 2, generator=torch.manual_seed(seed))
        logits[:, 0] = logits[:, -1] = -torch.inf
        chosen = choose(logits, FULL, chance)
        assert 1 <= int(chosen.min()) <= int(chosen.max()) <= size


def test_chance_is_uniform_and_depends_on_seed_and_step_alone() -> None:
    chance = uniforms([*range(3000), 2**63 - 1], 16)
    assert 0 < float(chance.min()) < float(chance.max()) < 1
    tenths = torch.histc(chance, 10, 0, 1) / chance.numel()
    assert (tenths - 0.1).abs().max() < 0.005
    assert torch.equal(uniforms([4, 2], 5), chance[:5, [4, 2]])
    for table in (chance[:, :400].T, chance[:, :400]):
        between = torch.corrcoef(table).nan_to_num(0).fill_diagonal_(0).abs()
        assert float(between.mean()) < 1.2 / table.shape[1] ** 0.5


def test_greedy_takes_the_largest_whatever_the_number() -> None:
    logits = torch.randn(6, 9, generator=torch.manual_seed(1))
    chance = uniforms(range(6), 1)[0]
    assert torch.equal(choose(logits, Sampling(Greedy()), chance), logits.argmax(1))
    assert torch.equal(choose(logits, Sampling(TopK(1)), chance), logits.argmax(1))
    assert not torch.equal(choose(logits, FULL, chance), logits.argmax(1))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: TopK(0), "top_k is 0"),
        (lambda: TopP(0.0), "top_p is 0.0"),
        (lambda: TopP(1.2), "top_p is 1.2"),
        (lambda: TopP(math.nan), "top_p is nan"),
        (lambda: Sampling(temperature=0.0), "temperature is 0.0"),
        (lambda: Sampling(temperature=1e-40), "temperature is 1e-40; it must lie in 1e-06 to 1e"),
        (lambda: Sampling(temperature=-1.0), "temperature is -1.0"),
        (lambda: Sampling(temperature=math.inf), "temperature is inf"),
        (lambda: Sampling(temperature=math.nan), "temperature is nan"),
    ],
)
def test_values_out_of_range_are_refused(make, told: str) -> None:
    with pytest.raises(UserError, match=told):
        make()


def test_chance_of_a_kept_token_is_renormalised() -> None:
    draws = 8_000
    chance = uniforms(list(range(draws)), 1)[0]
    chosen = choose(LOGITS.expand(draws, -1), Sampling(TopK(2)), chance)
    share = float((chosen == 0).float().mean())
    assert abs(share - float(F.softmax(LOGITS[0, :2], 0)[0])) < 0.02
