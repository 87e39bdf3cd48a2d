"""Paths: every equation has an inverse or a closed form in float64, both ends included."""

import math
from typing import get_args

import pytest
import torch

from ddt_llama.config import UserError
from ddt_llama.diffusion import Cosine, DiscreteDDPM, Path, Prediction, Straight

PATHS = [Straight(), Cosine(), DiscreteDDPM(), DiscreteDDPM(schedule="scaled_linear")]
SCHEDULES = [DiscreteDDPM(), DiscreteDDPM(400, 0.00085, 0.012, schedule="scaled_linear")]
TIMES = [0.0, 1e-9, 0.001, 0.0013, 0.25, 0.5, 0.7777, 0.999, 1.0]
PREDICTIONS = get_args(Prediction)
by_path = pytest.mark.parametrize("path", PATHS, ids=repr)


def pair(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, 3, 2, 5, dtype=torch.float64, generator=generator)
    return x0, eps


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@by_path
@pytest.mark.parametrize("t", TIMES)
def test_split_inverts_mix_and_velocity_at_every_time_ends_included(path: Path, t: float):
    x0, eps = pair()
    again = path.split(path.mix(x0, eps, t), path.velocity(x0, eps, t), t)
    close(again[0], x0, 1e-14)
    close(again[1], eps, 1e-14)


@by_path
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("t", [0.05, 0.5, 0.7777, 0.95])
def test_recover_inverts_target_inside_the_path(path: Path, prediction: Prediction, t: float):
    x0, eps = pair()
    output = path.target(x0, eps, t, prediction)
    again = path.recover(output, path.mix(x0, eps, t), t, prediction)
    close(again[0], x0, 1e-12)
    close(again[1], eps, 1e-12)


@by_path
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("t", [0.0, 1.0])
def test_recover_at_the_ends_is_exact_or_zero_never_infinite(
    path: Path, prediction: Prediction, t: float
):
    x0, eps = pair()
    output = path.target(x0, eps, t, prediction).requires_grad_()
    got_x0, got_eps = path.recover(output, path.mix(x0, eps, t), t, prediction)
    lost_x0 = prediction == "noise" and float(path.alpha(t)) == 0
    lost_eps = prediction == "clean" and float(path.sigma(t)) == 0
    close(got_x0, torch.zeros_like(x0) if lost_x0 else x0, 1e-12)
    close(got_eps, torch.zeros_like(eps) if lost_eps else eps, 1e-12)
    (gradient,) = torch.autograd.grad((got_x0 + got_eps).sum(), output)
    assert gradient.isfinite().all()


@by_path
@pytest.mark.parametrize("t", [0.2504, 0.5003, 0.9996])
def test_slopes_are_the_derivatives(path: Path, t: float):
    step = 1e-5
    for value, slope in ((path.alpha, path.alpha_slope), (path.sigma, path.sigma_slope)):
        difference = (value(t + step) - value(t - step)) / (2 * step)
        assert float(slope(t)) == pytest.approx(float(difference), rel=1e-6, abs=1e-7)


@by_path
def test_the_path_starts_at_data_and_turns_to_noise_without_going_back(path: Path):
    assert float(path.alpha(0.0)) == 1
    assert float(path.sigma(0.0)) == 0
    times = torch.linspace(0, 1, 3001, dtype=torch.float64)
    assert (path.alpha(times).diff() < 0).all()
    assert (path.sigma(times).diff() > 0).all()


@pytest.mark.parametrize("path", PATHS[:2], ids=repr)
def test_continuous_paths_end_in_pure_noise_exactly(path: Path):
    assert float(path.alpha(1.0)) == 0
    assert float(path.sigma(1.0)) == 1


@pytest.mark.parametrize("path", PATHS[1:], ids=repr)
def test_angular_paths_keep_the_variance(path: Path):
    times = torch.linspace(0, 1, 777, dtype=torch.float64)
    total = path.alpha(times) ** 2 + path.sigma(times) ** 2
    close(total, torch.ones_like(total), 1e-15)


def test_the_velocity_of_the_straight_path_is_noise_minus_data():
    x0, eps = pair()
    close(Straight().velocity(x0, eps, 0.3), eps - x0, 0)


@pytest.mark.parametrize("path", SCHEDULES, ids=repr)
def test_step_k_of_the_table_is_the_published_product(path: DiscreteDDPM):
    product = 1.0
    for k in range(1, path.num_steps + 1):
        share = (k - 1) / (path.num_steps - 1)
        if path.schedule == "linear":
            beta = path.beta_start + share * (path.beta_end - path.beta_start)
        else:
            low, high = math.sqrt(path.beta_start), math.sqrt(path.beta_end)
            beta = (low + share * (high - low)) ** 2
        product *= 1 - beta
        t = k / path.num_steps
        assert float(path.alpha(t)) == pytest.approx(math.sqrt(product), rel=1e-11)
        assert float(path.sigma(t)) == pytest.approx(math.sqrt(1 - product), rel=1e-11)


def test_the_published_linear_schedule_leaves_the_known_rest_of_signal():
    assert float(DiscreteDDPM().alpha(1.0)) ** 2 == pytest.approx(4.0358e-5, rel=1e-4)


def test_a_time_in_single_precision_belongs_to_its_own_step():
    path = DiscreteDDPM()
    k = torch.arange(1, 1001)
    single, double = k.float() / 1000, k.double() / 1000
    torch.testing.assert_close(path.alpha(single).double(), path.alpha(double), rtol=2e-5, atol=0)
    slopes = path.angle_slope(double)
    torch.testing.assert_close(path.angle_slope(single).double(), slopes, rtol=1e-6, atol=0)
    # The slope at a step is that of the segment below it.
    below = torch.stack([path.angle(float(t) - 4e-4) for t in double])
    torch.testing.assert_close((path.angle(double) - below) / 4e-4, slopes, rtol=1e-9, atol=1e-9)


@by_path
def test_one_time_a_row_equals_row_by_row(path: Path):
    x0, eps = pair()
    times = torch.tensor([0.0, 0.31, 1.0], dtype=torch.float64)
    together = path.mix(x0, eps, times), path.velocity(x0, eps, times)
    for row, t in enumerate(times.tolist()):
        close(together[0][row : row + 1], path.mix(x0[row : row + 1], eps[row : row + 1], t), 1e-15)
        alone = path.velocity(x0[row : row + 1], eps[row : row + 1], t)
        close(together[1][row : row + 1], alone, 1e-14)


@by_path
def test_precision_follows_the_images_but_never_falls_below_single(path: Path):
    x0, eps = pair()
    assert path.mix(x0, eps, torch.rand(3)).dtype == torch.float64
    assert path.mix(x0.float(), eps.float(), 0.3).dtype == torch.float32
    assert path.mix(x0.float(), eps.float(), torch.rand(3).double()).dtype == torch.float32
    assert path.mix(x0.bfloat16(), eps.bfloat16(), 0.3).dtype == torch.float32


@pytest.mark.parametrize(
    ("num_steps", "beta_start", "beta_end"),
    [(0, 1e-4, 0.02), (1000, 0.0, 0.02), (1000, 0.5, 0.1), (1000, 1e-4, 1.0)],
)
def test_a_schedule_that_is_none_is_refused(num_steps: int, beta_start: float, beta_end: float):
    with pytest.raises(UserError, match="need num_steps >= 1 and 0 < beta_start <= beta_end < 1"):
        DiscreteDDPM(num_steps, beta_start, beta_end)
