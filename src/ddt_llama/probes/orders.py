"""In which order a language model is given the symbols of a sequence."""

from typing import Literal, get_args

import torch
from jaxtyping import Int
from torch import Generator, Tensor

Order = Literal["native", "reversed", "stride-2", "stride-3", "fixed", "fresh"]
ORDERS: tuple[Order, ...] = get_args(Order)
LONGEST = 1024  # symbols; shorter sequences share one fixed permutation


def places(order: Order, length: int, seed: int = 0, number: int = 0) -> Int[Tensor, " length"]:
    """Return where the symbol read at each step stands in the sequence.

    "stride-n": every n-th symbol from the first, then every n-th from the second, and so on;
    "fixed": one permutation for all sequences, chosen by `seed`, of which a shorter one takes the
    places that it has; "fresh": another one for every `number`.

    >>> places("stride-2", 5).tolist()
    [0, 2, 4, 1, 3]
    """
    steps = torch.arange(length)
    if order == "native":
        return steps
    if order == "reversed":
        return steps.flip(0)
    if order.startswith("stride-"):
        stride = int(order.removeprefix("stride-"))
        return torch.cat([steps[first::stride] for first in range(min(stride, length))])
    if order == "fixed":
        whole = _permutation(max(length, LONGEST), seed)
        return whole[whole < length]
    return _permutation(length, (seed + 1) * 1_000_003 + number)


def _permutation(length: int, seed: int) -> Int[Tensor, " length"]:
    return torch.randperm(length, generator=Generator().manual_seed(seed))
