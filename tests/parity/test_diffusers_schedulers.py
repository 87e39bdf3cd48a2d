"""The sampler beside the schedulers of diffusers, on one network and one series of noises.

The tables of diffusers are float32; where the tolerance is tight they are replaced by the same
tables in float64, so that only the rule of the step is compared.
"""

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor

from ddt_llama.diffusion import DiscreteDDPM, Prediction, Straight, sample, step_times

diffusers = pytest.importorskip("diffusers")

LINEAR = DiscreteDDPM()
SCALED = DiscreteDDPM(1000, 0.00085, 0.012, schedule="scaled_linear")
by_path = pytest.mark.parametrize("path", [LINEAR, SCALED], ids=["linear", "scaled_linear"])
NAMES = {"clean": "sample", "noise": "epsilon", "velocity": "v_prediction"}
by_prediction = pytest.mark.parametrize("prediction", list(NAMES))
TIGHT = 1e-9


def network(xt: Tensor, t: float) -> Tensor:
    """Answer something smooth that depends on both."""
    return torch.sin(2 * xt) * (0.5 + t) + 0.3 * torch.roll(xt, 1, -1)


def noise(index: int = -1) -> Tensor:
    generator = torch.Generator().manual_seed(100 + index)
    return torch.randn(2, 3, 4, dtype=torch.float64, generator=generator)


def predictor(path: DiscreteDDPM, prediction: Prediction) -> Callable:
    """Read the network's answer as diffusers does: its velocity is per angle, not per time."""

    def predict(xt: Tensor, t: float) -> tuple[Tensor, Tensor]:
        output = network(xt, t)
        if prediction == "velocity":
            output = output * path.angle_slope(t)
        return path.recover(output, xt, t, prediction)

    return predict


def betas(path: DiscreteDDPM) -> dict:
    return {
        "num_train_timesteps": path.num_steps,
        "beta_start": path.beta_start,
        "beta_end": path.beta_end,
        "beta_schedule": path.schedule,
        "clip_sample": False,
        "timestep_spacing": "trailing",
    }


def in_double(scheduler, path: DiscreteDDPM) -> None:
    """Replace the float32 tables of a scheduler by the same in float64."""
    steps = torch.arange(1, path.num_steps + 1, dtype=torch.float64) / path.num_steps
    exact = path.alpha(steps) ** 2
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), exact, rtol=2e-5, atol=1e-8)
    scheduler.alphas_cumprod = exact
    scheduler.one = scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)


@pytest.fixture
def same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the n-th draw of diffusers' DDPM the noise of our step n."""
    from diffusers.schedulers import scheduling_ddpm

    draws = iter(range(1000))
    monkeypatch.setattr(
        scheduling_ddpm, "randn_tensor", lambda *_args, **_kwargs: noise(next(draws))
    )


@by_path
@pytest.mark.parametrize(
    ("prediction", "steps"), [("clean", 20), ("velocity", 50), ("noise", 1000)]
)
@pytest.mark.usefixtures("same_noise")
def test_full_eta_is_the_step_of_ddpm(path: DiscreteDDPM, prediction: Prediction, steps: int):
    scheduler = diffusers.DDPMScheduler(
        **betas(path), prediction_type=NAMES[prediction], variance_type="fixed_small"
    )
    in_double(scheduler, path)
    scheduler.set_timesteps(steps)
    x = noise()
    for timestep in scheduler.timesteps:
        output = network(x, (int(timestep) + 1) / path.num_steps)
        x = scheduler.step(output, int(timestep), x).prev_sample
    got = sample(
        predictor(path, prediction),
        noise(),
        path=path,
        times=step_times(steps),
        eta=1.0,
        fresh_noise=noise,
    )
    torch.testing.assert_close(got, x, rtol=TIGHT, atol=TIGHT)


@by_path
@by_prediction
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_any_eta_is_the_step_of_ddim(path: DiscreteDDPM, prediction: Prediction, eta: float):
    scheduler = diffusers.DDIMScheduler(**betas(path), prediction_type=NAMES[prediction])
    in_double(scheduler, path)
    scheduler.set_timesteps(25)
    x = noise()
    for index, timestep in enumerate(scheduler.timesteps):
        output = network(x, (int(timestep) + 1) / path.num_steps)
        fresh = noise(index) if eta > 0 else None
        step = scheduler.step(output, int(timestep), x, eta=eta, variance_noise=fresh)
        x = step.prev_sample
    got = sample(
        predictor(path, prediction),
        noise(),
        path=path,
        times=step_times(25),
        eta=eta,
        fresh_noise=noise,
    )
    torch.testing.assert_close(got, x, rtol=TIGHT, atol=TIGHT)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_straight_path_is_flow_matching_euler(shift: float):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=step_times(30)[:-1].tolist())
    x = noise().float()
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        x = scheduler.step(network(x, float(sigma)), timestep, x).prev_sample

    def predict(xt: Tensor, t: float) -> tuple[Tensor, Tensor]:
        return Straight().recover(network(xt, t), xt, t, "velocity")

    times = step_times(30, shift=shift)
    got = sample(predict, noise(), path=Straight(), times=times)
    torch.testing.assert_close(got.float(), x, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # theirs
def test_the_second_order_meets_dpm_solver_faster_than_the_first():
    """Two second-order rules on one problem: their difference falls with the step squared."""

    def predict(xt: Tensor, t: float) -> tuple[Tensor, Tensor]:
        alpha, sigma = float(LINEAR.alpha(t)), float(LINEAR.sigma(t))
        return LINEAR.recover(sigma / (0.25 * alpha**2 + sigma**2) * xt, xt, t, "noise")

    def theirs(steps: int) -> Tensor:
        fields = {key: value for key, value in betas(LINEAR).items() if key != "clip_sample"}
        scheduler = diffusers.DPMSolverMultistepScheduler(
            **fields, final_sigmas_type="zero", solver_order=2
        )
        scheduler.set_timesteps(steps)
        x = noise()
        for timestep in scheduler.timesteps:
            eps = predict(x, (int(timestep) + 1) / LINEAR.num_steps)[1]
            x = scheduler.step(eps, timestep, x).prev_sample
        return x

    def apart(steps: int, order: Literal[1, 2]) -> float:
        got = sample(predict, noise(), path=LINEAR, times=step_times(steps), order=order)
        return float((got - theirs(steps)).abs().max())

    assert apart(100, order=1) / apart(200, order=1) == pytest.approx(2, rel=0.05)
    assert apart(100, order=2) / apart(200, order=2) > 3
    assert apart(200, order=2) < apart(200, order=1) / 20
