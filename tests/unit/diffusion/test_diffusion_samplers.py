"""The sampler on data whose best denoiser is known: exact ways, exact variances, orders.

Noise is followed exactly, without a random draw, as coordinates: row vectors over independent
unit noises, so that variances are squared lengths and covariances are dot products.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import pytest
import torch
from torch import Tensor

from ddt_llama.config import UserError
from ddt_llama.diffusion import Cosine, DiscreteDDPM, Path, Straight, sample, step_times

PATHS = [Straight(), Cosine(), DiscreteDDPM()]
by_path = pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
MEAN, STD = 0.3, 0.5


def gaussian_denoiser(path: Path, mean: float = MEAN, std: float = STD) -> Callable:
    """The pair E[(x0, eps) | x_t] for x0 ~ N(mean, std^2)."""

    def predict(xt: Tensor, t: float) -> tuple[Tensor, Tensor]:
        alpha, sigma = float(path.alpha(t)), float(path.sigma(t))
        total = alpha**2 * std**2 + sigma**2
        offset = xt - alpha * mean
        return mean + std**2 * alpha / total * offset, sigma / total * offset

    return predict


def gaussian_way(path: Path, x: Tensor, t: float, s: float) -> Tensor:
    """The exact flow of the probability flow equation from t to s for Gaussian data."""
    spread = {u: math.hypot(float(path.alpha(u)) * STD, float(path.sigma(u))) for u in (t, s)}
    centre = {u: float(path.alpha(u)) * MEAN for u in (t, s)}
    return centre[s] + spread[s] / spread[t] * (x - centre[t])


def noise(rows: int = 8) -> Tensor:
    return torch.randn(rows, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def error(path: Path, steps: int, order: Literal[1, 2]) -> float:
    start = noise()
    times = step_times(steps)
    got = sample(gaussian_denoiser(path), start, path=path, times=times, order=order)
    return float((got - gaussian_way(path, start, 1.0, 0.0)).abs().max())


@by_path
@pytest.mark.parametrize(("order", "gain"), [(1, 2.0), (2, 4.0)])
def test_doubling_the_steps_halves_or_quarters_the_error_from_end_to_end(
    path: Path, order: Literal[1, 2], gain: float
):
    errors = [error(path, steps, order) for steps in (64, 128, 256)]
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(gain, rel=0.03)
    assert errors[-1] < (0.02 if order == 1 else 3e-4)


@by_path
def test_the_second_order_follows_a_way_of_constant_bend_exactly(path: Path):
    a, b, k = (noise() + shift for shift in (0.0, 1.0, 2.0))

    def predict(_: Tensor, t: float) -> tuple[Tensor, Tensor]:
        angle = math.atan2(float(path.sigma(t)), float(path.alpha(t)))
        return a + k * math.cos(angle), b + k * math.sin(angle)

    got = sample(predict, noise(), path=path, times=[0.9, 0.5, 0.3, 0.0], order=2)
    torch.testing.assert_close(got, a + k, rtol=0, atol=1e-13)


def test_on_the_straight_path_the_step_is_that_of_euler():
    def predict(xt: Tensor, t: float) -> tuple[Tensor, Tensor]:
        return Straight().split(xt, torch.sin(3 * xt) + t, t)

    times = [1.0, 0.8, 0.35, 0.1, 0.0]
    x = noise()
    for t, s in pairwise(times):
        x = x + (s - t) * (torch.sin(3 * x) + t)
    got = sample(predict, noise(), path=Straight(), times=times)
    torch.testing.assert_close(got, x, rtol=0, atol=1e-15)


@by_path
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_every_eta_keeps_the_marginal_variance_at_every_time(path: Path, eta: float):
    """For data at one point every x_s has variance sigma_s^2, whatever share is fresh."""
    times = step_times(12).tolist()
    axes = torch.eye(12, dtype=torch.float64)
    for end in range(1, 13):
        got = sample(
            gaussian_denoiser(path, mean=0.0, std=0.0),
            axes[:1] * float(path.sigma(1.0)),
            path=path,
            times=times[: end + 1],
            eta=eta,
            fresh_noise=lambda index: axes[index + 1 : index + 2],
        )
        expected = float(path.sigma(times[end])) ** 2
        assert float(got.square().sum()) == pytest.approx(expected, abs=1e-14)


@by_path
def test_full_eta_is_the_forward_process_in_reverse(path: Path):
    """For data at zero Cov(x_s, x_t) = alpha_t / alpha_s sigma_s^2, as when noise was added."""
    times = [0.95, 0.7, 0.4, 0.2]
    axes = torch.eye(len(times), dtype=torch.float64)
    states = [
        sample(
            gaussian_denoiser(path, mean=0.0, std=0.0),
            axes[:1] * float(path.sigma(times[0])),
            path=path,
            times=times[:end],
            eta=1.0,
            fresh_noise=lambda index: axes[index + 1 : index + 2],
        )
        for end in range(2, len(times) + 1)
    ]
    states = [axes[:1] * float(path.sigma(times[0])), *states]
    for i, t in enumerate(times):
        for j, s in enumerate(times[i:], start=i):
            expected = float(path.alpha(t) / path.alpha(s) * path.sigma(s) ** 2)
            assert float((states[i] * states[j]).sum()) == pytest.approx(expected, abs=1e-14)


@by_path
def test_full_eta_reaches_the_variance_of_the_data_at_first_order(path: Path):
    errors = []
    for steps in (128, 256, 512):
        axes = torch.eye(steps, dtype=torch.float64)
        spread = math.hypot(float(path.alpha(1.0)) * STD, float(path.sigma(1.0)))
        got = sample(
            gaussian_denoiser(path, mean=0.0),
            axes[:1] * spread,
            path=path,
            times=step_times(steps),
            eta=1.0,
            fresh_noise=lambda index, axes=axes: axes[index + 1 : index + 2],
        )
        errors.append(abs(float(got.square().sum()) - STD**2))
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2, rel=0.1)
    assert errors[-1] < 0.02


@by_path
@pytest.mark.parametrize("prediction", ["clean", "velocity", "noise"])
def test_sampling_from_pure_noise_is_finite_for_every_prediction(path: Path, prediction):
    """A network that answers anything at t = 1 must not divide by zero there."""

    def predict(xt: Tensor, t: float) -> tuple[Tensor, Tensor]:
        return path.recover(torch.sin(xt), xt, t, prediction)

    orders: tuple[Literal[1, 2], ...] = (1, 2)
    for order in orders:
        assert (
            sample(predict, noise(), path=path, times=step_times(7), order=order).isfinite().all()
        )


def test_one_step_returns_the_clean_prediction_and_asks_no_fresh_noise():
    def never(index: int) -> Tensor:
        raise AssertionError(index)

    clean = noise() + 1
    got = sample(
        lambda xt, t: (clean, xt),
        noise(),
        path=Straight(),
        times=[1.0, 0.0],
        eta=1.0,
        fresh_noise=never,
    )
    torch.testing.assert_close(got, clean, rtol=0, atol=0)


@by_path
def test_fresh_noise_is_asked_once_a_step_but_not_for_the_last(path: Path):
    asked, seen = [], []

    def fresh(index: int) -> Tensor:
        asked.append(index)
        return noise()

    def predict(xt: Tensor, t: float) -> tuple[Tensor, Tensor]:
        seen.append(t)
        return gaussian_denoiser(path)(xt, t)

    sample(predict, noise(), path=path, times=step_times(5), eta=0.5, fresh_noise=fresh)
    assert asked == [0, 1, 2, 3]
    assert seen == step_times(5)[:-1].tolist()
    assert all(isinstance(t, float) for t in seen)


def test_rows_with_their_own_seeds_do_not_depend_on_the_batch():
    def row(seed: int, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + index)
        return torch.randn(1, 6, dtype=torch.float64, generator=generator)

    def draw(seeds: list[int]) -> Tensor:
        return sample(
            gaussian_denoiser(Cosine()),
            torch.cat([row(seed, 999) for seed in seeds]),
            path=Cosine(),
            times=step_times(6),
            eta=0.7,
            fresh_noise=lambda index: torch.cat([row(seed, index) for seed in seeds]),
        )

    torch.testing.assert_close(draw([4, 9, 2])[1:2], draw([9]), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"times": [1.0]}, "falling strictly"),
        ({"times": [1.0, 0.5, 0.5, 0.0]}, "falling strictly"),
        ({"times": [1.5, 0.0]}, "falling strictly"),
        ({"times": [1.0, -0.1]}, "falling strictly"),
        ({"times": [1.0, float("nan")]}, "falling strictly"),
        ({"eta": 1.5}, "eta 1.5: need 0"),
        ({"eta": -0.1}, "need 0"),
        ({"eta": 0.5}, "needs fresh_noise"),
        ({"eta": 0.5, "order": 2, "fresh_noise": lambda _: noise()}, "use order 1, or eta 0"),
    ],
)
def test_arguments_outside_their_range_are_refused_in_one_line(fields: dict, message: str):
    fields = {"path": Straight(), "times": [1.0, 0.0], **fields}
    with pytest.raises(UserError, match=message) as caught:
        sample(lambda xt, t: (xt, xt), noise(), **fields)
    assert "\n" not in str(caught.value)
