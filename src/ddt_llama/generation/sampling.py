"""How the next token is chosen: methods as values, and chance that belongs to a row alone.

A token is drawn by inverting the distribution function: the first token at which the summed
probabilities exceed a uniform number. That number is a pure function of (row seed, step), computed
by integer arithmetic and the same on any device, so a row's draws do not depend on what else is in
the batch (as far as its logits do not), and nothing waits for the host.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddt_llama.config import UserError

COLDEST = 1e-6  # what is colder is `Greedy`, and would leave float32 in the end


@dataclass(frozen=True)
class Greedy:
    """Take the most likely token; no noise."""


@dataclass(frozen=True)
class TopK:
    """Draw among the `k` most likely tokens."""

    k: int

    def __post_init__(self) -> None:
        """Reject an empty set of tokens."""
        if self.k < 1:
            raise UserError(f"top_k is {self.k}; it must be 1 or more: the number of tokens kept")


@dataclass(frozen=True)
class TopP:
    """Draw among the fewest tokens whose probabilities sum to at least `p`; 1 keeps all."""

    p: float = 1.0

    def __post_init__(self) -> None:
        """Reject a share outside (0, 1]."""
        if not 0.0 < self.p <= 1.0:
            raise UserError(f"top_p is {self.p}; it must lie in (0, 1]: the probability kept")


@dataclass(frozen=True)
class Sampling:
    """A method and the temperature that the logits are divided by before it."""

    method: Greedy | TopK | TopP = TopP(1.0)
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Reject temperatures that turn the distribution over."""
        if not COLDEST <= self.temperature <= 1 / COLDEST:
            raise UserError(
                f"temperature is {self.temperature}; it must lie in {COLDEST:g} to "
                f"{1 / COLDEST:g} (use top_k=1 for the most likely token)"
            )


FULL = Sampling()
GREEDY = Sampling(Greedy())


def guide(
    conditional: Float[Tensor, "b v"],
    unconditional: Float[Tensor, "b v"],
    scale: float | Float[Tensor, "b 1"],
) -> Float[Tensor, "b v"]:
    """Move from the unconditional logits through the conditional ones: u + scale (c - u).

    Scale 0 ignores the prompt, 1 is the plain model, above 1 follows the prompt more closely
    (classifier-free guidance, Ho & Salimans 2022, on next-token logits).
    """
    return torch.lerp(unconditional, conditional, scale)


def restrict(logits: Float[Tensor, "b v"], sampling: Sampling) -> Float[Tensor, "b v"]:
    """Divide by the temperature and set the tokens that the method leaves out to -inf."""
    logits = logits / sampling.temperature
    method = sampling.method
    if isinstance(method, TopK) and method.k < logits.shape[-1]:
        floor = logits.topk(method.k, dim=-1).values[:, -1:]
        return logits.masked_fill(logits < floor, -torch.inf)
    if isinstance(method, TopP) and method.p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        chances = ordered.softmax(dim=-1)
        left_out = chances.cumsum(dim=-1) - chances >= method.p
        left_out[:, 0] = False  # also where p is nothing in float32
        kept = ordered.masked_fill(left_out, -torch.inf)
        return torch.empty_like(logits).scatter_(-1, order, kept)
    return logits


def choose(
    logits: Float[Tensor, "b v"], sampling: Sampling, uniform: Float[Tensor, " b"] | None
) -> Int[Tensor, " b"]:
    """Draw one token a row, by one number of `uniforms` a row.

    `uniform` None or `Greedy()` takes the most likely token.
    """
    if uniform is None or isinstance(sampling.method, Greedy):
        return logits.argmax(dim=-1)
    # A GPU adds in parallel: in float32 a sum may fall behind the one before it.
    exact = torch.float64 if logits.is_cuda else None
    reached = restrict(logits, sampling).softmax(dim=-1, dtype=exact).cumsum(dim=-1)
    wanted = uniform[:, None] * reached[:, -1:]  # below the last sum, which is 1 up to rounding
    return torch.searchsorted(reached, wanted, right=True)[:, 0]


def uniforms(
    seeds: Sequence[int], steps: int, device: torch.device | str = "cpu"
) -> Float[Tensor, "steps b"]:
    """Return a number in (0, 1) for each step and each row seed.

    Element (i, r) depends on (i, seeds[r]) alone. Seeds lie in [0, 2**63). The numbers have 22
    bits, so that float32 holds them exactly and no product with a sum rounds up to that sum.
    """
    row = _scramble(torch.tensor(list(seeds), dtype=torch.int64, device=device))
    step = torch.arange(1, steps + 1, dtype=torch.int64, device=device)
    bits = (_scramble(row[None, :] + step[:, None] * _GOLDEN) >> 42) & ((1 << 22) - 1)
    return (bits.float() + 0.5) * 2.0**-22


_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MULTIPLIERS = (-4658895280553007687, -7723592293110705685)


def _scramble(x: Tensor) -> Tensor:
    """Finalise SplitMix64 (Steele, Lea & Flood 2014) on wrapping signed 64-bit integers."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MULTIPLIERS[0]
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MULTIPLIERS[1]
    return x ^ ((x >> 31) & ((1 << 33) - 1))
