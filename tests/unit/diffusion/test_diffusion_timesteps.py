"""Densities of t against their closed forms; step times against the formula."""

import json
import math
from dataclasses import dataclass

import pytest
import torch

from ddt_llama.config import UserError, from_dict, to_dict
from ddt_llama.diffusion import (
    AtNoise,
    Cosine,
    Density,
    DiscreteDDPM,
    LogitNormal,
    Straight,
    Uniform,
    step_times,
)

COUNT = 200_000
DENSITIES = [Uniform(), LogitNormal(-0.4, 1.3), AtNoise(0.25), AtNoise(0.5, LogitNormal())]


def draw(density: Density, seed: int = 0, count: int = COUNT) -> torch.Tensor:
    return density.sample((count,), torch.Generator().manual_seed(seed))


def share_below(times: torch.Tensor, bound: float) -> float:
    return float((times < bound).double().mean())


@pytest.mark.parametrize("density", DENSITIES, ids=repr)
def test_draws_repeat_by_seed_and_lie_on_the_path(density: Density):
    times = draw(density)
    assert times.dtype == torch.float32
    assert density.sample((3, 5)).shape == (3, 5)
    assert times.min() > 0
    assert times.max() <= 1
    torch.testing.assert_close(times, draw(density), rtol=0, atol=0)
    assert not torch.equal(times, draw(density, seed=1))


@pytest.mark.parametrize("bound", [0.1, 0.5, 0.9])
def test_uniform_has_its_distribution_function(bound: float):
    deviation = math.sqrt(bound * (1 - bound) / COUNT)
    assert share_below(draw(Uniform()), bound) == pytest.approx(bound, abs=4 * deviation)


@pytest.mark.parametrize("bound", [0.1, 0.5, 0.9])
def test_logit_normal_has_its_distribution_function(bound: float):
    mean, std = -0.4, 1.3
    z = (math.log(bound / (1 - bound)) - mean) / std
    expected = 0.5 * (1 + math.erf(z / math.sqrt(2)))
    assert share_below(draw(LogitNormal(mean, std)), bound) == pytest.approx(expected, abs=0.005)


def test_at_noise_moves_its_share_to_one_and_leaves_the_rest_as_it_was():
    times = draw(AtNoise(0.25))
    at_noise = times == 1
    assert float(at_noise.double().mean()) == pytest.approx(0.25, abs=0.005)
    assert share_below(times[~at_noise], 0.3) == pytest.approx(0.3, abs=0.005)
    assert (draw(AtNoise(1.0)) == 1).all()
    torch.testing.assert_close(draw(AtNoise(0.0)), draw(Uniform()), rtol=0, atol=0)


def test_step_times_fall_evenly_from_one_to_zero():
    times = step_times(40)
    assert times.dtype == torch.float64
    torch.testing.assert_close(times.diff(), torch.full((40,), -1 / 40, dtype=torch.float64))
    assert times[0] == 1
    assert times[-1] == 0


def test_a_shift_spends_more_steps_near_noise_and_is_undone_by_its_inverse():
    times = step_times(10, shift=3.0)
    assert times[0] == 1
    assert times[-1] == 0
    assert (times[1:-1] > step_times(10)[1:-1]).all()
    undone = times / (3 - 2 * times)
    torch.testing.assert_close(undone, step_times(10), rtol=0, atol=1e-15)


@pytest.mark.parametrize("steps", [0, -3])
def test_no_steps_are_refused(steps: int):
    with pytest.raises(UserError, match=f"steps {steps}: need at least 1"):
        step_times(steps)


def test_values_outside_their_range_are_refused():
    with pytest.raises(UserError, match="shift"):
        step_times(4, shift=0.0)
    with pytest.raises(UserError, match="share"):
        AtNoise(1.5)
    with pytest.raises(UserError, match="std"):
        LogitNormal(0.0, 0.0)


def test_paths_and_densities_keep_their_kind_in_a_configuration_file():
    @dataclass(frozen=True)
    class Plan:
        path: Straight | Cosine | DiscreteDDPM
        density: Density

    for plan in (
        Plan(DiscreteDDPM(400, schedule="scaled_linear"), AtNoise(0.25, LogitNormal(0.5, 2.0))),
        Plan(Cosine(), Uniform()),
    ):
        assert from_dict(Plan, json.loads(json.dumps(to_dict(plan)))) == plan
