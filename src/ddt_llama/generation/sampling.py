"""How the next token is chosen: methods as values, and noise that belongs to a row, not to a batch.

Sampling is Gumbel-max: argmax(logits / temperature + gumbel) is a draw from softmax(logits /
temperature). The noise is a pure function of (row seed, step, token), computed by integer
arithmetic on any device, so a row draws the same tokens alone, in any batch, on CPU and on GPU, and
nothing waits for the host.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddt_llama.config import UserError


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
        if not 0.0 < self.temperature < float("inf"):
            raise UserError(
                f"temperature is {self.temperature}; it must be a finite number above 0 "
                "(use top_k=1 for the most likely token)"
            )


FULL = Sampling()
GREEDY = Sampling(Greedy())


def guide(
    conditional: Float[Tensor, "b v"], unconditional: Float[Tensor, "b v"], scale: float
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
        before = chances.cumsum(dim=-1) - chances
        kept = ordered.masked_fill(before >= method.p, -torch.inf)
        return torch.empty_like(logits).scatter_(-1, order, kept)
    return logits


def choose(
    logits: Float[Tensor, "b v"], sampling: Sampling, noise: Float[Tensor, "b v"] | None
) -> Int[Tensor, " b"]:
    """Draw one token a row by Gumbel-max; `noise` None or `Greedy()` takes the most likely one."""
    if noise is None or isinstance(sampling.method, Greedy):
        return logits.argmax(dim=-1)
    return (restrict(logits, sampling) + noise).argmax(dim=-1)


def gumbel_noise(
    seeds: Sequence[int], start: int, steps: int, size: int, device: torch.device | str = "cpu"
) -> Float[Tensor, "steps b size"]:
    """Return standard Gumbel noise for each row seed at steps `start` .. `start + steps - 1`.

    Element (i, r, j) depends on (seeds[r], start + i, j) alone. Seeds lie in [0, 2**63).
    """
    row = _scramble(torch.tensor(list(seeds), dtype=torch.int64, device=device))
    step = torch.arange(start, start + steps, dtype=torch.int64, device=device)
    stream = _scramble(row[None, :] + (step[:, None] + 1) * _GOLDEN)
    column = torch.arange(1, size + 1, dtype=torch.int64, device=device) * _GOLDEN
    bits = (_scramble(stream[..., None] + column) >> 24) & ((1 << 40) - 1)
    # -log(1 - u) with u near 0 keeps the large noise values, those that win, finely resolved.
    u = bits.float().add_(0.5).mul_(2.0**-40).clamp_(max=1.0 - 2.0**-24)
    return u.neg_().log1p_().neg_().log_().neg_()


_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MULTIPLIERS = (-4658895280553007687, -7723592293110705685)


def _scramble(x: Tensor) -> Tensor:
    """Finalise SplitMix64 (Steele, Lea & Flood 2014) on wrapping signed 64-bit integers."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MULTIPLIERS[0]
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MULTIPLIERS[1]
    return x ^ ((x >> 31) & ((1 << 33) - 1))
