"""A tokenizer that is none: what a test does not need, it does not do."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class StandIn:
    """The `Tokenizer` protocol, to be filled in where a test needs it."""

    num_tokens, codebook_size, image_size = 8, 1000, 64
    refines = prefixes = True
    renders = False

    def encode(self, images: Tensor) -> Tensor:
        """Return codes."""
        raise NotImplementedError

    def decode(
        self,
        codes: Tensor,
        *,
        steps: int = 8,
        visible: Any = None,
        seed: Any = 0,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """Return images."""
        raise NotImplementedError

    def code_vectors(self) -> Tensor:
        """Return vectors that are all alike."""
        return torch.ones(self.codebook_size, 1)

    def to_language(self, codes: Tensor) -> Tensor:
        """Return the codes as they are."""
        return codes

    def from_language(self, codes: Tensor) -> Tensor:
        """Return the codes as they are."""
        return codes

    def fingerprint(self) -> str:
        """Return letters."""
        return "stand-in"

    def save(self, folder: Path, *, dtype: torch.dtype | None = None) -> None:
        """Save nothing."""
        raise NotImplementedError
