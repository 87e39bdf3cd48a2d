"""Moving average of the weights: what is sampled from and released, in place of the last step's.

Kept in float32. Early on the decay is smaller, (1 + n) / (10 + n) after n updates, so that the
average forgets the initialisation.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ddt_llama.config import UserError


def decay_at(decay: float, updates: int) -> float:
    """Return the decay of the update that follows `updates` earlier ones.

    >>> decay_at(0.999, 0)
    0.1
    """
    return min(decay, (1 + updates) / (10 + updates))


class Ema:
    """Average the trainable parameters; buffers such as codebooks stay the model's own."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Start from the present weights; 0 <= decay < 1, with 0 nothing is averaged or held."""
        if not 0 <= decay < 1:
            raise UserError(f"ema: given {decay}, allowed is 0 up to but not 1")
        self.decay, self.updates = decay, 0
        named = {name: p for name, p in model.named_parameters() if p.requires_grad and decay}
        self._names = list(named)
        self._parameters = list(named.values())
        self._average = [p.detach().to(torch.float32, copy=True) for p in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the present weights."""
        if self._parameters:
            decay = decay_at(self.decay, self.updates)
            present = [p.detach().float() for p in self._parameters]
            get_ema_multi_avg_fn(decay)(self._average, present, self.updates)
        self.updates += 1

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Put the average into the model for the length of a `with` block."""
        kept = [parameter.detach().clone() for parameter in self._parameters]
        try:
            self.write()
            yield
        finally:
            _copy(kept, self._parameters)

    def write(self) -> None:
        """Put the average into the model for good."""
        _copy(self._average, self._parameters)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by parameter name; they are read back in place."""
        return dict(zip(self._names, self._average, strict=True))


@torch.no_grad()
def _copy(values: list[Tensor], into: list[nn.Parameter]) -> None:
    for parameter, value in zip(into, values, strict=True):
        parameter.copy_(value)
