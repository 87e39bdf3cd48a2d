"""Muon for CPUs and GPUs: momentum, made orthogonal by five Newton-Schulz products.

Source: Jordan et al. 2024, with the update scaled to AdamW's (Liu et al. 2025, arXiv 2502.16982).
The same update as `torch.optim.Muon`, which always multiplies in bf16; here the precision follows
the device (a CPU without bf16 emulates it, five times slower than float32), and matrices of one
shape go through the products together.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ddt_llama import distributed

# The quintic whose repetition carries singular values in (0, 1] to about 1 (Jordan et al. 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
TOGETHER = 8  # matrices of one shape a batched product: more would only cost memory


class Muon(torch.optim.Optimizer):
    """Nesterov momentum of the gradient, orthogonalised; every parameter is a matrix.

    The weights of a convolution are one, too: outputs by all that a place of the input has for
    them. The step is lr x 0.2 sqrt(max(rows, columns)) long, so that its entries have the size of
    AdamW's. State: `momentum_buffer`, as in `torch.optim.Muon`.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient; `closure` computes the loss first, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            directions = [
                distributed.whole_tensor(self._direction(p, group["momentum"])).flatten(1)
                for p in moving
            ]
            for p, update in zip(moving, orthogonal_together(directions), strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                length = 0.2 * max(update.shape) ** 0.5
                update = distributed.like_shards(update.reshape(p.shape), p)
                p.add_(update, alpha=-group["lr"] * length)
        return loss

    def _direction(self, parameter: Tensor, momentum: float) -> Tensor:
        """Advance the momentum; return it as Nesterov looks ahead."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(buffer, momentum)


def orthogonal_together(matrices: Sequence[Float[Tensor, "_ _"]]) -> list[Float[Tensor, "_ _"]]:
    """Return `orthogonal(matrices)`, each process of several doing its share of the products.

    The matrices must be equal on all processes; so are the results, to the last bit.
    """
    ranks = distributed.world_size()
    if ranks == 1 or not matrices:
        return orthogonal(matrices)
    # By turns among those of one shape: every process gets as much work.
    order = sorted(range(len(matrices)), key=lambda place: (tuple(matrices[place].shape), place))
    mine = order[distributed.rank() :: ranks]
    shared = [torch.zeros_like(matrix) for matrix in matrices]
    for place, result in zip(mine, orthogonal([matrices[i] for i in mine]), strict=True):
        shared[place] = result
    everything = distributed.all_reduce_sum(torch.cat([part.flatten() for part in shared]))
    parts = everything.split([part.numel() for part in shared])
    return [part.view_as(like) for part, like in zip(parts, matrices, strict=True)]


def orthogonal(matrices: Sequence[Float[Tensor, "_ _"]]) -> list[Float[Tensor, "_ _"]]:
    """Return for each matrix U S V^T about U V^T, singular values between 0.5 and 1.5."""
    shapes: dict[tuple[int, ...], list[int]] = {}
    for place, matrix in enumerate(matrices):
        shapes.setdefault(tuple(matrix.shape), []).append(place)
    found: list[Tensor] = list(matrices)
    for places in shapes.values():
        for start in range(0, len(places), TOGETHER):
            part = places[start : start + TOGETHER]
            results = _newton_schulz(torch.stack([matrices[place] for place in part]))
            for place, result in zip(part, results, strict=True):
                found[place] = result
    return found


def _newton_schulz(matrices: Float[Tensor, "b rows columns"]) -> Float[Tensor, "b rows columns"]:
    a, b, c = COEFFICIENTS
    x = matrices.to(torch.bfloat16 if distributed.has_bf16(matrices.device) else torch.float32)
    tall = x.shape[1] > x.shape[2]
    x = x.mT.contiguous() if tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)
