"""Where on the path training looks (densities of t) and where sampling stops (step times).

A density is a value with one method, `sample(shape, generator)`; the tokenizer's objective draws
one t a row from it.
Sources: Esser et al. 2024 (logit-normal density, shifted times); Selftok's ablation found
uniform better than logit-normal for tokens.
"""

from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from ddt_llama.config import UserError


@dataclass(frozen=True)
class Uniform:
    """Every t in (0, 1] alike; t = 0, where nothing is left to predict, is left out."""

    def sample(self, shape: tuple[int, ...], generator: Generator | None = None) -> Tensor:
        """Draw 1 - U with U uniform on [0, 1)."""
        return 1 - torch.rand(shape, generator=generator, device=device_of(generator))


@dataclass(frozen=True)
class LogitNormal:
    """t = sigmoid(mean + std z): the middle of the path more often than its ends."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a deviation that is not positive."""
        if not self.std > 0:
            raise UserError(f"LogitNormal: std {self.std}; need a positive number")

    def sample(self, shape: tuple[int, ...], generator: Generator | None = None) -> Tensor:
        """Draw the sigmoid of a normal."""
        z = torch.randn(shape, generator=generator, device=device_of(generator))
        return torch.sigmoid(self.mean + self.std * z)


@dataclass(frozen=True)
class AtNoise:
    """A share of the draws exactly at t = 1, the rest from another density.

    At t = 1 the input holds nothing of the image, so all that the network can answer comes from
    the tokens.
    """

    share: float
    rest: Uniform | LogitNormal = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        """Refuse a share that is not one."""
        if not 0 <= self.share <= 1:
            raise UserError(f"AtNoise: share {self.share}; need 0 to 1")

    def sample(self, shape: tuple[int, ...], generator: Generator | None = None) -> Tensor:
        """Draw from the rest, then move a random share of the draws to t = 1."""
        times = self.rest.sample(shape, generator)
        chosen = torch.rand(shape, generator=generator, device=times.device) < self.share
        return times.masked_fill(chosen, 1.0)


# A union and not a protocol, so that configuration files can name the member they mean.
Density: TypeAlias = Uniform | LogitNormal | AtNoise


def device_of(generator: Generator | None) -> torch.device:
    """Return the device on which a generator draws."""
    return torch.device("cpu") if generator is None else generator.device


def step_times(steps: int, *, shift: float = 1.0) -> Float[Tensor, "steps_and_one"]:
    """Return steps + 1 float64 times falling from 1 to 0.

    Evenly spaced, then t -> shift t / (1 + (shift - 1) t): shift > 1 spends more steps near
    noise (Esser et al. 2024, section 5.3.2). Raises UserError for steps < 1 or shift <= 0.
    """
    if steps < 1:
        raise UserError(f"steps {steps}: need at least 1")
    if shift <= 0:
        raise UserError(f"shift {shift}: need a positive number (1 = evenly spaced)")
    times = torch.arange(steps, -1, -1, dtype=torch.float64) / steps
    return shift * times / (1 + (shift - 1) * times)
