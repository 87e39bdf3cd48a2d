"""What a language model remembers of the rows of a batch, each of its own length.

Slot s of a row is position s of its text, so a row can come and go at any step, whatever the others
do: continuous batching (Yu et al. 2022, "Orca"). Both decoders keep their keys and values here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

VECTOR = 32  # slots
Layers = list[tuple[Float[Tensor, "r slots heads e"], Float[Tensor, "r slots heads f"]]]


@dataclass(frozen=True)
class Prompts:
    """Prompts that were read once: keys and values a layer, lengths, and what each led to.

    `states` is whatever the decoder's `logits` takes.
    """

    layers: Layers
    lengths: Sequence[int]
    states: Float[Tensor, "u s"]

    def row(self, index: int) -> "Prompts":
        """Return a copy of one prompt alone."""
        length = self.lengths[index]
        one = slice(index, index + 1)
        layers = [(keys[one, :length].clone(), v[one, :length].clone()) for keys, v in self.layers]
        return Prompts(layers, [length], self.states[one].clone())


class Rows:
    """Room for the keys and values of rows; the first `count` are in use.

    `lengths` are those of the rows, known to the host; `positions` is the same on the device, and
    lies within the room of a row for free ones, too. `given` and `recorded` are for `graphs`: the
    next tokens, and steps by rows and slots.
    """

    def __init__(self, rows: int, capacity: int, device: torch.device) -> None:
        """Make room for `rows` of up to `capacity` tokens; layers appear with the first prompt.

        Slots begin as zeros: what is not looked at must still be a number.
        """
        self.capacity = rounded(capacity)
        self.layers: Layers = []
        self.lengths: list[int] = []
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.given = torch.zeros_like(self.positions)
        self.recorded: dict[tuple[int, int], Callable[[], Tensor]] = {}
        self._starts = torch.arange(rows, device=device) * self.capacity
        self._slots = torch.arange(self.capacity, device=device)

    @property
    def count(self) -> int:
        """How many rows are in use."""
        return len(self.lengths)

    @property
    def most(self) -> int:
        """How many rows there is room for in all."""
        return len(self.positions)

    @property
    def room(self) -> int:
        """How many rows more can be put in."""
        return self.most - self.count

    @property
    def stop(self) -> int:
        """How many slots the next tokens look at, or over: those of the longest row, rounded up.

        Kernels sum over slots a vector at a time. In whole vectors, what a row sees is summed in
        the same order whatever the length of its company: to the last bit on many CPUs.
        """
        return rounded(max(self.lengths) + 1)

    def put(self, prompts: Prompts, which: Sequence[int]) -> None:
        """Begin a row behind the others for each prompt of `which`."""
        if not self.layers:
            room = len(self.positions), self.capacity
            self.layers = [
                (keys.new_zeros(*room, *keys.shape[2:]), v.new_zeros(*room, *v.shape[2:]))
                for keys, v in prompts.layers
            ]
        chosen = torch.tensor(which, device=self.positions.device)
        rows = slice(self.count, self.count + len(which))
        for own, read in zip(self.layers, prompts.layers, strict=True):
            for slots, values in zip(own, read, strict=True):
                slots[rows, : values.shape[1]] = values[chosen]
        lengths = [prompts.lengths[index] for index in which]
        self.positions[rows] = torch.tensor(lengths, device=self.positions.device)
        self.lengths += lengths

    def drop(self, row: int) -> int:
        """Give up a row; the last one takes its place. Returns which row that was."""
        last = self.count - 1
        if row != last:
            length = self.lengths[last]
            for slots in (one for pair in self.layers for one in pair):
                slots[row, :length] = slots[last, :length]
            self.positions[row] = self.positions[last]
            self.lengths[row] = length
        del self.lengths[last]
        self.positions[last] = 0
        return last

    def places(self, width: int) -> Int[Tensor, " r"]:
        """Return where the next token of each row goes, counted through all rows."""
        return self._starts[:width] + self.positions[:width]

    def behind(self, width: int, stop: int) -> Int[Tensor, "r slots"]:
        """Return how far the next token of each row is from every slot; negative ones lie ahead."""
        return self.positions[:width, None] - self._slots[:stop]

    def grow(self) -> None:
        """Count the token that every row was given."""
        self.positions[: self.count] += 1
        self.lengths = [length + 1 for length in self.lengths]


def rounded(length: int) -> int:
    """Return the next whole number of vectors."""
    return -(-length // VECTOR) * VECTOR
