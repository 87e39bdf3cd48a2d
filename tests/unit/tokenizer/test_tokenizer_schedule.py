"""k(t): the paper's grid, monotone, Selftok's pieces; windows, probabilities, language order."""

import math
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddt_llama.diffusion import AtNoise, Uniform
from ddt_llama.tokenizer import SELFTOK_PIECES, TokenSchedule
from ddt_llama.tokenizer.schedule import step_seeds, token_places

tokens = st.integers(1, 1024)
pieces = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any)
quick = settings(deadline=None, max_examples=60, derandomize=True)


def schedule(num_tokens: int, weights: list[int]) -> TokenSchedule:
    return TokenSchedule(num_tokens, tuple(w / sum(weights) for w in weights))


@quick
@given(tokens)
def test_a_linear_schedule_counts_the_papers_timesteps(num_tokens: int):
    steps = torch.arange(num_tokens + 1)
    for t in (steps / num_tokens, (steps.double() / num_tokens).float()):
        assert torch.equal(TokenSchedule(num_tokens).num_visible(t), steps)


@quick
@given(tokens)
def test_between_two_timesteps_the_later_one_counts(num_tokens: int):
    middle = (torch.arange(num_tokens) + 0.5) / num_tokens
    expected = torch.arange(num_tokens) + 1
    assert torch.equal(TokenSchedule(num_tokens).num_visible(middle), expected)


@quick
@given(tokens, pieces)
def test_any_schedule_rises_from_none_to_all(num_tokens: int, weights: list[int]):
    visible = schedule(num_tokens, weights).num_visible(torch.linspace(0, 1, 501))
    assert (visible[0], visible[-1]) == (0, num_tokens)
    assert (visible.diff() >= 0).all()
    assert visible.dtype == torch.int64


@quick
@given(tokens, pieces)
def test_the_pieces_integrate_to_their_shares(num_tokens: int, weights: list[int]):
    ends = torch.arange(len(weights) + 1) / len(weights)
    shares = accumulate((w / sum(weights) for w in weights), initial=0.0)
    expected = [math.ceil(num_tokens * share - 1e-4) for share in shares]
    got = schedule(num_tokens, weights).num_visible(ends).tolist()
    assert got == expected


def test_selftok_reveals_its_512_tokens_in_five_pieces():
    visible = TokenSchedule(512, SELFTOK_PIECES).num_visible(torch.tensor([0.2, 0.4, 0.6, 0.8, 1]))
    assert visible.tolist() == [192, 192 + 184, 192 + 184 + 72, 192 + 184 + 72 + 48, 512]


@quick
@given(st.integers(1, 64), pieces, st.integers(0, 64))
def test_the_window_is_what_lies_between_its_bounds(
    num_tokens: int, weights: list[int], first: int
):
    plan, t = schedule(num_tokens, weights), torch.linspace(0, 1, 7)
    window = plan.window(t, first)
    for row, count in zip(window.tolist(), plan.num_visible(t).tolist(), strict=True):
        assert row == [first <= index < count for index in range(num_tokens)]


def test_each_image_has_its_own_lower_bound():
    plan, t = TokenSchedule(4), torch.tensor([[0.25, 1.0], [0.75, 1.0], [1.0, 0.0]])
    window = plan.window(t, torch.tensor([0, 1, 4])[:, None])
    counts = [[[1, 0, 0, 0], [1, 1, 1, 1]], [[0, 1, 1, 0], [0, 1, 1, 1]], [[0] * 4, [0] * 4]]
    assert window.int().tolist() == counts


def test_under_uniform_times_token_i_is_visible_after_its_step():
    times = (torch.arange(100_000) + 0.5) / 100_000
    got = TokenSchedule(32).probability_visible(times)
    torch.testing.assert_close(got, 1 - torch.arange(32) / 32, rtol=0, atol=1e-4)
    drawn = Uniform().sample((100_000,), torch.Generator().manual_seed(0))
    torch.testing.assert_close(TokenSchedule(32).probability_visible(drawn), got, rtol=0, atol=6e-3)


def test_draws_at_noise_see_all_tokens():
    times = AtNoise(0.4).sample((100_000,), torch.Generator().manual_seed(0))
    got = TokenSchedule(8).probability_visible(times)
    expected = 0.4 + 0.6 * (1 - torch.arange(8) / 8)
    torch.testing.assert_close(got, expected, rtol=0, atol=6e-3)


def test_the_default_language_order_is_coarse_to_fine():
    codes = torch.arange(10).reshape(2, 5)
    assert TokenSchedule(5).to_language(codes)[1].tolist() == [9, 8, 7, 6, 5]
    fine = TokenSchedule(5, language_order="fine_to_coarse")
    assert torch.equal(fine.to_language(codes), codes)
    for plan in (TokenSchedule(5), fine, TokenSchedule(5, language_order="raster")):
        assert torch.equal(plan.from_language(plan.to_language(codes)), codes)


def test_raster_order_goes_row_by_row_over_the_places_of_the_tokens():
    plan = TokenSchedule(12, language_order="raster")
    places = token_places(12)[plan.to_language(torch.arange(12)[None])[0]]
    expected = [((row + 0.5) / 3, (column + 0.5) / 4) for row in range(3) for column in range(4)]
    torch.testing.assert_close(places, torch.tensor(expected))


@pytest.mark.parametrize(
    ("count", "shares", "message"),
    [
        (0, (1.0,), "num_tokens is 0"),
        (4, (0.5, 0.4), r"pieces \(0.5, 0.4\).*sum to 1"),
        (4, (1.5, -0.5), "at least 0"),
    ],
)
def test_an_impossible_schedule_is_refused(count: int, shares: tuple[float, ...], message: str):
    with pytest.raises(ValueError, match=message):
        TokenSchedule(count, shares)


def test_one_seed_gives_each_row_its_own():
    assert step_seeds(7, 3) == [7, 8, 9]
    assert step_seeds([4, 4, 0], 3) == [4, 4, 0]
    with pytest.raises(ValueError, match="2 seeds were given for 3 images"):
        step_seeds([1, 2], 3)
