"""One sampler for every path: split x_t into (x0, eps), mix again at the next time.

This is the Euler step on the straight path, DDIM (Song et al. 2020) on a variance-preserving
one and, with eta = 1, the DDPM posterior (Ho et al. 2020) that the paper's decoder loops over.
`order=2` adds what the previous step tells about the bend of the way (Adams and Bashforth).
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ddt_llama.config import UserError
from ddt_llama.diffusion.paths import Path

Pair: TypeAlias = tuple[Tensor, Tensor]


def sample(
    predict: Callable[[Tensor, float], Pair],
    noise: Float[Tensor, "b *x"],
    *,
    path: Path,
    times: Float[Tensor, "steps_and_one"] | Sequence[float],
    eta: float = 0.0,
    order: Literal[1, 2] = 1,
    fresh_noise: Callable[[int], Float[Tensor, "b *x"]] | None = None,
) -> Float[Tensor, "b *x"]:
    """Carry `noise` from times[0] down to times[-1]; clean data where times[-1] is 0.

    `predict(xt, t) -> (x0, eps)` is called once a step with a plain number t in (0, 1];
    `path.recover` makes the pair from a network's output. `times` fall strictly. `eta` in [0, 1]
    is the share of fresh noise, 0 deterministic, 1 the posterior; then `fresh_noise(step_index)`
    gives the noise of a step (the caller owns seeds, one a row if wanted) and is not called for
    a step that adds none, such as the one that ends at t = 0. `order=2` is for eta = 0 only: it
    continues a smooth way, which fresh noise breaks. Raises UserError outside these.
    """
    times = [float(t) for t in times]
    check_arguments(times, eta, order, fresh_noise)
    xt, last_pair, last = noise, None, times[0]
    for index, (t, s) in enumerate(pairwise(times)):
        pair = predict(xt, t)
        x0, eps = pair
        if order == 2 and last_pair is not None:
            x0, eps = bend(pair, last_pair, *(angle(path, u) for u in (last, t, s)))
        last_pair, last = pair, t
        fresh = eta * fresh_share(path, t, s)
        alpha, sigma = float(path.alpha(s)), float(path.sigma(s))
        xt = alpha * x0 + sigma * math.sqrt(1 - fresh**2) * eps
        if fresh_noise is not None and fresh * sigma > 0:
            xt = xt + sigma * fresh * fresh_noise(index)
    return xt


def fresh_share(path: Path, t: float, s: float) -> float:
    """Return the posterior's share of fresh noise in the noise at s: sqrt(1 - r^2).

    r = alpha_t sigma_s / (alpha_s sigma_t) is the correlation of the noises at s and t in the
    forward process, so q(x_s | x_t, x0) has the deviation sigma_s sqrt(1 - r^2).
    """
    ratio = path.alpha(t) * path.sigma(s) / (path.alpha(s) * path.sigma(t))
    return float(torch.sqrt((1 - ratio**2).clamp_min(0)))


def bend(pair: Pair, last_pair: Pair, last: float, now: float, then: float) -> Pair:
    """Correct (x0, eps) at the angle `now` so that mixing at `then` is of second order.

    In the angle phi = atan2(sigma, alpha) the scaled point y = cos(phi) x0 + sin(phi) eps obeys
    y'' + y = k with k = cos(phi) eps' - sin(phi) x0', whatever the path. Taking (x0, eps)
    constant (k = 0) is the step of first order; k from the previous step, held constant, adds
    (1 - cos(then - now)) k. That is what the corrected pair gives, and it still makes x_t. Ways
    of constant k are followed exactly.
    # Differs from DPM-Solver++(2M), which extrapolates x0 in log(alpha / sigma), because that
    # clock is infinite at both ends: there it must fall back to first order and loses a factor
    # log(steps), while this one is of second order from pure noise to clean data.
    """
    (x0, eps), (last_x0, last_eps) = pair, last_pair
    cos, sin = math.cos(now), math.sin(now)
    k = (cos * (eps - last_eps) - sin * (x0 - last_x0)) / math.sin(now - last)
    change = math.tan((then - now) / 2) * k
    return x0 - sin * change, eps + cos * change


def angle(path: Path, t: float) -> float:
    """Return atan2(sigma, alpha) at `t`."""
    return math.atan2(float(path.sigma(t)), float(path.alpha(t)))


def check_arguments(
    times: list[float], eta: float, order: int, fresh_noise: Callable[[int], Tensor] | None
) -> None:
    """Refuse times that do not fall inside [0, 1], eta outside [0, 1] and order 2 with noise."""
    falling = all(t > s for t, s in pairwise(times))
    if len(times) < 2 or not falling or times[0] > 1 or times[-1] < 0:
        raise UserError(f"times {times}: need at least two, falling strictly inside [0, 1]")
    if not 0 <= eta <= 1:
        raise UserError(f"eta {eta}: need 0 (deterministic) to 1 (posterior)")
    if eta > 0 and fresh_noise is None:
        raise UserError(f"eta {eta} needs fresh_noise(step_index) -> noise; or set eta to 0")
    if order == 2 and eta > 0:
        raise UserError(f"order 2 with eta {eta}: use order 1, or eta 0")
