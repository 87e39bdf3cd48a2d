"""What reconstruction is measured on: held-out scenes, or any opened source of pictures."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ddt_llama.config import UserError
from ddt_llama.data.sources import ImageSource, Sample
from ddt_llama.shapes.render import render
from ddt_llama.shapes.scene import Scene, Split, sample_scene

# No training stream uses this seed.
EVALUATION_SEED = 20_250_424
MAX_SEED = 2**62  # images of a suite count on from its seed


def check_seed(seed: int) -> None:
    """Raise UserError for a seed that no generator takes."""
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"seed is {seed}; it must be a whole number from 0 to {MAX_SEED}")


@runtime_checkable
class Pictures(Protocol):
    """A fixed list of pictures; `scenes` says what they show, where that is known."""

    def __len__(self) -> int:
        """Return the number of pictures."""
        ...

    def images(self, start: int, stop: int) -> Float[Tensor, "b 3 h w"]:
        """Return pictures start to stop, in [-1, 1]."""
        ...

    def scenes(self, start: int, stop: int) -> Sequence[Scene] | None:
        """Return what these pictures show, or None."""
        ...


@dataclass(frozen=True)
class ScenePictures:
    """Renders of scenes; split "heldout" has only compositions that training never saw.

    `max_objects` and `grid` as in `sample_scene`.
    """

    count: int
    size: int
    split: Split = "heldout"
    seed: int = EVALUATION_SEED
    max_objects: int = 4
    grid: int | None = None

    def __len__(self) -> int:
        """Return the number of scenes."""
        return self.count

    def scenes(self, start: int, stop: int) -> Sequence[Scene]:
        """Return the scenes themselves."""
        return [
            sample_scene(
                self.seed, i, max_objects=self.max_objects, split=self.split, grid=self.grid
            )
            for i in range(start, stop)
        ]

    def images(self, start: int, stop: int) -> Float[Tensor, "b 3 h w"]:
        """Draw the scenes."""
        return render(self.scenes(start, stop), self.size)


class SourcePictures:
    """The first `count` usable pictures of a source in a fixed shuffled order (all, if None).

    A row that cannot be read has another row standing in for it; it is counted once only. Raises
    UserError where the pictures have another size than the tokenizer, or none can be read.
    """

    def __init__(self, source: ImageSource[Sample], size: int, count: int | None = None) -> None:
        """Decode pictures until `count` different ones are found."""
        if source.image_size != size:
            raise UserError(
                f"pictures of size {source.image_size} were given to a tokenizer of size {size}; "
                f"open the source with image_size={size}"
            )
        order = list(range(len(source)))
        random.Random(EVALUATION_SEED).shuffle(order)
        self._source = source
        self._indices: list[int] = []
        seen: set[int] = set()
        for index in order:
            if count is not None and len(seen) >= count:
                break
            row = source[index].row
            if row not in seen:
                seen.add(row)
                self._indices.append(index)
        if not self._indices:
            raise UserError(f"{source.name}: no picture to evaluate on; give at least one")

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self._indices)

    def images(self, start: int, stop: int) -> Float[Tensor, "b 3 h w"]:
        """Read pictures."""
        return torch.stack([s.image for s in self._source.batch(self._indices[start:stop])])

    def scenes(self, start: int, stop: int) -> None:
        """Return None: nobody knows what a real picture shows."""
        del start, stop


def batches(count: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut 0..count into consecutive ranges (start, stop) of at most `size`."""
    if size < 1:
        raise UserError(f"batch_size is {size}; it must be at least 1")
    return ((start, min(start + size, count)) for start in range(0, count, size))
