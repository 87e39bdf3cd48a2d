"""What every image tokenizer offers: images to codes and back.

The language side sees only this protocol; method and rivals are exchangeable behind it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor


@runtime_checkable
class Tokenizer(Protocol):
    """Images `b 3 h w` in [-1, 1] to codes `b k` in 0..codebook_size-1, and back.

    Two abilities are asked for by name, never the kind of a tokenizer: `refines` says that steps,
    seed and guidance change what `decode` returns, `prefixes` that it can do with the `visible`
    coarsest codes.
    """

    num_tokens: int
    codebook_size: int
    image_size: int
    refines: bool
    prefixes: bool

    def encode(self, images: Float[Tensor, "b 3 h w"]) -> Int[Tensor, "b k"]:
        """Return the codes, column 0 the finest."""
        ...

    def decode(
        self,
        codes: Int[Tensor, "b k"],
        *,
        steps: int = 8,
        visible: int | None = None,
        seed: int | Sequence[int] = 0,
        guidance_scale: float = 1.0,
    ) -> Float[Tensor, "b 3 h w"]:
        """Return images; the same codes and seed give the same images."""
        ...

    def code_vectors(self) -> Float[Tensor, "v e"]:
        """Return the unit vector of each code: near vectors look alike."""
        ...

    def to_language(self, codes: Int[Tensor, "b k"]) -> Int[Tensor, "b k"]:
        """Reorder the columns to the order that the language model reads and writes."""
        ...

    def from_language(self, codes: Int[Tensor, "b k"]) -> Int[Tensor, "b k"]:
        """Undo `to_language`."""
        ...

    def save(self, folder: Path, *, dtype: torch.dtype | None = None) -> None:
        """Write config.json and model.safetensors; floats are stored as `dtype` if given."""
        ...
