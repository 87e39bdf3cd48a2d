"""One sampler for every path: split x_t into (x0, eps), mix again at the next time.

This is the Euler step on the straight path, DDIM (Song et al. 2020) on a variance-preserving
one and, with eta = 1, the DDPM posterior (Ho et al. 2020) that the paper's decoder loops over.
order = 2 is the multistep rule of DPM-Solver++(2M) (Lu et al. 2022), stochastic for eta > 0.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ddt_llama.diffusion.paths import Path


def sample(
    predict: Callable[[Tensor, float], tuple[Tensor, Tensor]],
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
    the step that ends at sigma = 0. Raises ValueError for values outside these.
    """
    times = [float(t) for t in times]
    check_arguments(times, eta, order, fresh_noise)
    xt, previous = noise, None
    for index, (t, s) in enumerate(pairwise(times)):
        x0, eps = predict(xt, t)
        if order == 2:
            current = x0
            if previous is not None:
                # x0 is extrapolated and eps follows, so that the two still make x_t.
                change = extrapolation(path, times[index - 1], t, s) * (x0 - previous)
                x0 = x0 + change
                eps = eps - change * float(path.alpha(t) / path.sigma(t))
            previous = current
        alpha, sigma = float(path.alpha(s)), float(path.sigma(s))
        fresh = eta * fresh_share(path, t, s)
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


def extrapolation(path: Path, last: float, t: float, s: float) -> float:
    """Return the weight of (x0 at t) - (x0 at last) in the second-order step from t to s.

    Half the ratio of the two steps in log(alpha / sigma). It is zero, that is first order, for
    the step that follows pure noise and for the one that ends at clean data, where that clock
    is infinite; two steps of first order do not lower the order of the whole.
    """
    if float(path.alpha(last)) == 0 or float(path.sigma(s)) == 0:
        return 0.0
    clock = [float(torch.log(path.alpha(u) / path.sigma(u))) for u in (last, t, s)]
    return (clock[2] - clock[1]) / (2 * (clock[1] - clock[0]))


def check_arguments(
    times: list[float], eta: float, order: int, fresh_noise: Callable[[int], Tensor] | None
) -> None:
    """Refuse times that do not fall inside [0, 1], eta outside [0, 1] and unknown orders."""
    falling = all(t > s for t, s in pairwise(times))
    if len(times) < 2 or not falling or times[0] > 1 or times[-1] < 0:
        raise ValueError(f"times {times}: need at least two, falling strictly inside [0, 1]")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta {eta}: need 0 (deterministic) to 1 (posterior)")
    if eta > 0 and fresh_noise is None:
        raise ValueError(f"eta {eta} needs fresh_noise(step_index) -> noise; or set eta to 0")
    if order not in (1, 2):
        raise ValueError(f"order {order}: use 1 or 2")
