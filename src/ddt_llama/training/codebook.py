"""What the objectives of image tokenizers share: a codebook that moves once a step."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddt_llama.config import UserError


class CodebookKeeper:
    """Collect the features of a step's batches, then move the codebook towards them."""

    def __init__(self) -> None:
        self._seen: list[tuple[Tensor, Tensor]] = []  # of the parts of this step

    def see(self, features: Float[Tensor, "b k e"], codes: Int[Tensor, "b k"]) -> None:
        """Remember the features of a batch, and the codes they were rounded to."""
        self._seen.append((features.detach(), codes))

    def after_step(
        self, model: Any, step: int, probe_every: int, probe: Callable[[], Mapping[str, float]]
    ) -> dict[str, float]:
        """Move the codebook; every `probe_every` steps add its use and what `probe` measures.

        All processes measure the same: each may hold a shard of the model.
        """
        figures = self.move(model, step)
        if figures is None:
            return {}
        if step % probe_every == 0:
            figures |= {f"codebook.{k}": v for k, v in model.quantizer.metrics().items()}
            figures |= probe()
        return figures

    def move(self, model: Any, step: int) -> dict[str, float] | None:
        """Move the codebook of `model`; `codebook.replaced` counts its dead codes.

        None where nothing was seen.
        A frozen codebook stays as it is, and only its use is counted.
        """
        if not self._seen:
            return None
        features, codes = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
        self._seen.clear()
        if model.quantizer.frozen:
            model.quantizer.count_usage(codes)
            return {}
        # Equal on all ranks, unlike the seed of a rank's noise.
        replaced = model.quantizer.update(features, codes, seed=step)
        return {"codebook.replaced": float(replaced)}


def check_phases(begins: int, ends: int) -> None:
    """Raise UserError where rounding would be phased in before it begins."""
    if ends < begins:
        raise UserError(
            f"objective.round_from {begins}, round_until {ends}: it would end before it begins; "
            "rounded from the first step on is 0 and 1"
        )


def rounding_at(step: int, begins: int, ends: int) -> float:
    """Return how far features are rounded in step `step`: 0 up to `begins`, 1 from `ends` on.

    Where both are one step it is the last that rounds nothing.

    >>> rounding_at(150, 100, 200)
    0.5
    """
    return min(1.0, max(0.0, (step - begins) / max(1, ends - begins)))


def spread(features: Float[Tensor, "b k e"]) -> float:
    """Return 1 - |mean unit feature|^2 over images, a position's mean.

    0 when all images look alike to the encoder, near 1 when they differ in every direction.
    """
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    return float((1 - unit.mean(0).square().sum(-1)).mean())
