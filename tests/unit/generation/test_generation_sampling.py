"""Sampling values: what they keep, what they refuse, and noise that is a law of its own."""

import math

import pytest
import torch
from torch.nn import functional as F

from ddt_llama.config import UserError
from ddt_llama.generation.sampling import (
    Greedy,
    Sampling,
    TopK,
    TopP,
    choose,
    guide,
    gumbel_noise,
    restrict,
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


@pytest.mark.parametrize(("p", "count"), [(0.01, 1), (0.5, 1), (0.6, 2), (0.94, 4), (1.0, 5)])
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


def test_gumbel_max_draws_from_the_softmax() -> None:
    draws = 20_000
    noise = gumbel_noise(list(range(draws)), 3, 1, LOGITS.shape[1])[0]
    chosen = choose(LOGITS.expand(draws, -1), Sampling(temperature=1.5), noise)
    counts = torch.bincount(chosen, minlength=5) / draws
    expected = (LOGITS[0] / 1.5).softmax(0)
    spread = (expected * (1 - expected) / draws).sqrt()
    assert ((counts - expected).abs() < 4 * spread).all()


def test_noise_has_the_moments_of_gumbel_and_no_ties_among_many() -> None:
    noise = gumbel_noise([1, 2**63 - 1], 0, 4, 50_000).flatten()
    assert noise.isfinite().all()
    assert abs(float(noise.mean()) - 0.5772) < 0.01
    assert abs(float(noise.std()) - math.pi / math.sqrt(6)) < 0.01
    top = noise.topk(1000).values
    assert len(top.unique()) > 990


def test_noise_depends_on_seed_step_and_token_alone() -> None:
    noise = gumbel_noise([3, 4, 5], 0, 6, 11)
    assert torch.equal(gumbel_noise([4], 2, 3, 11)[:, 0], noise[2:5, 1])
    assert torch.equal(gumbel_noise([5, 3], 0, 6, 7), noise[:, [2, 0], :7])
    seeds = gumbel_noise(list(range(400)), 0, 1, 400)[0]
    assert float(torch.corrcoef(seeds).fill_diagonal_(0).abs().max()) < 0.3
    steps = gumbel_noise([9], 0, 400, 400)[:, 0]
    assert float(torch.corrcoef(steps).fill_diagonal_(0).abs().max()) < 0.3


def test_greedy_takes_the_largest_whatever_the_noise() -> None:
    logits = torch.randn(6, 9, generator=torch.manual_seed(1))
    noise = gumbel_noise(range(6), 0, 1, 9)[0]
    assert torch.equal(choose(logits, Sampling(Greedy()), noise), logits.argmax(1))
    assert torch.equal(choose(logits, Sampling(TopK(1)), noise), logits.argmax(1))
    assert not torch.equal(choose(logits, Sampling(), noise), logits.argmax(1))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: TopK(0), "top_k is 0"),
        (lambda: TopP(0.0), "top_p is 0.0"),
        (lambda: TopP(1.2), "top_p is 1.2"),
        (lambda: TopP(math.nan), "top_p is nan"),
        (lambda: Sampling(temperature=0.0), "temperature is 0.0"),
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
    noise = gumbel_noise(list(range(draws)), 0, 1, 5)[0]
    chosen = choose(LOGITS.expand(draws, -1), Sampling(TopK(2)), noise)
    share = float((chosen == 0).float().mean())
    assert abs(share - float(F.softmax(LOGITS[0, :2], 0)[0])) < 0.02
