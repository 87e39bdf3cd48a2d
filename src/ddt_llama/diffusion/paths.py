"""Paths from data to noise: x_t = alpha(t) x0 + sigma(t) eps for t in [0, 1], 0 = data, 1 = noise.

Training target and sampler read the same object, so a model cannot be trained on one path and
sampled on another. Sources: Liu et al. 2022 and Lipman et al. 2022 (straight), Nichol and
Dhariwal 2021 (cosine), Ho et al. 2020 (the 1,000-step schedule).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias, assert_never

import torch
from jaxtyping import Float
from torch import Tensor

from ddt_llama.config import UserError

Prediction: TypeAlias = Literal["clean", "velocity", "noise"]
Time: TypeAlias = float | int | Float[Tensor, "b"]


class Path(ABC):
    """A path x_t = alpha x0 + sigma eps with velocity v = dx_t/dt = alpha' x0 + sigma' eps.

    `t` is one number for the batch or one number a row. Coefficients are computed in the
    precision of `t` (float64 for a plain number) and applied in that of `x`, but never below
    float32: in bf16 the steps of a fine schedule would fall on one another.
    """

    @abstractmethod
    def alpha(self, t: Time) -> Tensor:
        """Return the share of data at `t`; shape of `t`."""

    @abstractmethod
    def sigma(self, t: Time) -> Tensor:
        """Return the share of noise at `t`; shape of `t`."""

    @abstractmethod
    def alpha_slope(self, t: Time) -> Tensor:
        """Return d alpha / dt; shape of `t`."""

    @abstractmethod
    def sigma_slope(self, t: Time) -> Tensor:
        """Return d sigma / dt; shape of `t`."""

    def mix(
        self, x0: Float[Tensor, "b *x"], eps: Float[Tensor, "b *x"], t: Time
    ) -> Float[Tensor, "b *x"]:
        """Return x_t = alpha x0 + sigma eps."""
        return broadcast(self.alpha(t), x0) * x0 + broadcast(self.sigma(t), x0) * eps

    def velocity(
        self, x0: Float[Tensor, "b *x"], eps: Float[Tensor, "b *x"], t: Time
    ) -> Float[Tensor, "b *x"]:
        """Return v = alpha' x0 + sigma' eps."""
        return broadcast(self.alpha_slope(t), x0) * x0 + broadcast(self.sigma_slope(t), x0) * eps

    def target(
        self,
        x0: Float[Tensor, "b *x"],
        eps: Float[Tensor, "b *x"],
        t: Time,
        prediction: Prediction,
    ) -> Float[Tensor, "b *x"]:
        """Return what a network that predicts `prediction` should answer at x_t."""
        match prediction:
            case "clean":
                return x0
            case "noise":
                return eps
            case "velocity":
                return self.velocity(x0, eps, t)
        assert_never(prediction)

    def split(
        self, xt: Float[Tensor, "b *x"], v: Float[Tensor, "b *x"], t: Time
    ) -> tuple[Float[Tensor, "b *x"], Float[Tensor, "b *x"]]:
        """Return (x0, eps) from a point and its velocity: the inverse of (`mix`, `velocity`).

        Solves the 2 x 2 system with determinant alpha sigma' - alpha' sigma, which no path here
        lets vanish (1 on the straight path), so both ends are regular.
        """
        alpha, sigma = broadcast(self.alpha(t), xt), broadcast(self.sigma(t), xt)
        alpha_slope = broadcast(self.alpha_slope(t), xt)
        sigma_slope = broadcast(self.sigma_slope(t), xt)
        determinant = alpha * sigma_slope - alpha_slope * sigma
        x0 = (sigma_slope * xt - sigma * v) / determinant
        eps = (alpha * v - alpha_slope * xt) / determinant
        return x0, eps

    def recover(
        self,
        output: Float[Tensor, "b *x"],
        xt: Float[Tensor, "b *x"],
        t: Time,
        prediction: Prediction,
    ) -> tuple[Float[Tensor, "b *x"], Float[Tensor, "b *x"]]:
        """Return (x0, eps) from a network's answer at x_t.

        Where x_t says nothing about the part that was not predicted (eps at sigma = 0, x0 at
        alpha = 0) that part is zero: the mean of eps, and of data centred at zero.
        """
        match prediction:
            case "velocity":
                return self.split(xt, output, t)
            case "clean":
                rest = xt - broadcast(self.alpha(t), xt) * output
                return output, divide_or_zero(rest, broadcast(self.sigma(t), xt))
            case "noise":
                rest = xt - broadcast(self.sigma(t), xt) * output
                return divide_or_zero(rest, broadcast(self.alpha(t), xt)), output
        assert_never(prediction)


@dataclass(frozen=True)
class Straight(Path):
    """Rectified flow, the path of the paper: alpha = 1 - t, sigma = t, v = eps - x0."""

    def alpha(self, t: Time) -> Tensor:
        """Return 1 - t."""
        return 1 - as_times(t)

    def sigma(self, t: Time) -> Tensor:
        """Return t."""
        return as_times(t)

    def alpha_slope(self, t: Time) -> Tensor:
        """Return -1."""
        return -torch.ones_like(as_times(t))

    def sigma_slope(self, t: Time) -> Tensor:
        """Return 1."""
        return torch.ones_like(as_times(t))


class Angular(Path):
    """A variance-preserving path written by its angle: alpha = cos phi(t), sigma = sin phi(t).

    The determinant of `split` is phi'(t), so a path whose angle always grows can be inverted
    everywhere.
    """

    @abstractmethod
    def angle(self, t: Time) -> Tensor:
        """Return phi(t) in [0, pi/2]; shape of `t`."""

    @abstractmethod
    def angle_slope(self, t: Time) -> Tensor:
        """Return d phi / dt > 0; shape of `t`."""

    def alpha(self, t: Time) -> Tensor:
        """Return cos phi(t)."""
        return torch.cos(self.angle(t))

    def sigma(self, t: Time) -> Tensor:
        """Return sin phi(t)."""
        return torch.sin(self.angle(t))

    def alpha_slope(self, t: Time) -> Tensor:
        """Return -phi'(t) sin phi(t)."""
        return -self.angle_slope(t) * self.sigma(t)

    def sigma_slope(self, t: Time) -> Tensor:
        """Return phi'(t) cos phi(t)."""
        return self.angle_slope(t) * self.alpha(t)


@dataclass(frozen=True)
class Cosine(Angular):
    """A quarter turn at even speed: alpha = cos(pi t / 2), sigma = sin(pi t / 2).

    Differs from Nichol and Dhariwal: without their offset of 0.008, because a path that is
    defined for every t needs no guard against steps that are too small (Salimans and Ho 2022).
    """

    def angle(self, t: Time) -> Tensor:
        """Return pi t / 2."""
        return as_times(t) * (math.pi / 2)

    def angle_slope(self, t: Time) -> Tensor:
        """Return pi / 2."""
        return torch.full_like(as_times(t), math.pi / 2)

    def alpha(self, t: Time) -> Tensor:
        """Return cos(pi t / 2) as sin(pi (1 - t) / 2), which is exactly zero at t = 1."""
        return torch.sin((1 - as_times(t)) * (math.pi / 2))


@dataclass(frozen=True)
class DiscreteDDPM(Angular):
    """The published discrete schedule: alpha_k^2 = prod_{i<=k} (1 - beta_i), sigma_k^2 the rest.

    t = k / num_steps is step k of the table: k = 0 is the data (alpha 1, sigma 0) and k = 1 ..
    num_steps are the published steps, so timestep i of diffusers (0-based) is t = (i + 1) /
    num_steps. Between two steps the angle atan2(sigma, alpha) is interpolated linearly, which
    keeps alpha^2 + sigma^2 = 1 and gives the path a velocity; at a step the slope is that of the
    segment below it. At t = 1 the published linear schedule leaves alpha = 0.0064, not 0.

    `schedule`: betas evenly spaced ("linear", Ho et al. 2020) or squares of evenly spaced roots
    ("scaled_linear", Rombach et al. 2022).
    """

    num_steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    schedule: Literal["linear", "scaled_linear"] = "linear"

    def __post_init__(self) -> None:
        """Refuse a schedule on which data would never reach noise in order."""
        if self.num_steps < 1 or not 0 < self.beta_start <= self.beta_end < 1:
            raise UserError(
                f"DiscreteDDPM: num_steps={self.num_steps}, beta_start={self.beta_start}, "
                f"beta_end={self.beta_end}; need num_steps >= 1 and "
                "0 < beta_start <= beta_end < 1"
            )

    def angle(self, t: Time) -> Tensor:
        """Return the angle of the table at t * num_steps, linear between two steps."""
        lower, slope, below = self._segment(t)
        return below + slope * (as_times(t) - lower)

    def angle_slope(self, t: Time) -> Tensor:
        """Return the slope of the table's segment that ends at or holds `t`."""
        return self._segment(t)[1]

    def _segment(self, t: Time) -> tuple[Tensor, Tensor, Tensor]:
        """Return the segment's start time, its slope and the angle at its start."""
        times = as_times(t)
        table = angle_table(self, times.device)
        # A float32 t = k / 1000 may land just above k; a thousandth of a step is still step k.
        upper = torch.ceil(times * self.num_steps - 1e-3).long().clamp(1, self.num_steps)
        below, above = table[upper - 1], table[upper]
        slope = (above - below) * self.num_steps
        lower = (upper - 1).to(torch.float64) / self.num_steps
        return lower.to(times.dtype), slope.to(times.dtype), below.to(times.dtype)


@lru_cache(maxsize=16)
def angle_table(path: DiscreteDDPM, device: torch.device) -> Float[Tensor, "steps_and_one"]:
    """Return atan2(sigma_k, alpha_k) for k = 0 .. num_steps in float64 (cached a device)."""
    if path.schedule == "linear":
        betas = torch.linspace(path.beta_start, path.beta_end, path.num_steps, dtype=torch.float64)
    else:
        low, high = path.beta_start**0.5, path.beta_end**0.5
        betas = torch.linspace(low, high, path.num_steps, dtype=torch.float64) ** 2
    log_alpha_squared = torch.cumsum(torch.log1p(-betas), 0)
    # expm1 keeps the first sigmas exact where 1 - alpha^2 would cancel.
    sigma = torch.sqrt(-torch.expm1(log_alpha_squared))
    angles = torch.atan2(sigma, torch.exp(log_alpha_squared / 2))
    return torch.cat([torch.zeros(1, dtype=torch.float64), angles]).to(device)


def as_times(t: Time) -> Tensor:
    """Return `t` as a tensor; a plain number becomes one float64 without axes."""
    return t if isinstance(t, Tensor) else torch.tensor(float(t), dtype=torch.float64)


def broadcast(coefficient: Tensor, x: Float[Tensor, "b *x"]) -> Tensor:
    """Return a coefficient with an axis of one for every axis of `x` behind the batch."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return coefficient.to(x.device, dtype).reshape(-1, *[1] * (x.ndim - 1))


def divide_or_zero(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return the quotient, and zero (with a finite gradient) where the denominator is zero."""
    zero = denominator == 0
    return (numerator / denominator.masked_fill(zero, 1)).masked_fill(zero, 0)
