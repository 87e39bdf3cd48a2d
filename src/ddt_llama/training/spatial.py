"""The objective of the spatial tokenizer: squared error of the picture + commitment.

Source: van den Oord et al. 2017, equation 3, with the codebook moved by averages instead of a loss.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ddt_llama import distributed
from ddt_llama.tokenizer.spatial import SpatialTokenizer
from ddt_llama.training.codebook import CodebookKeeper, rounding_at, spread


@dataclass(frozen=True)
class SpatialObjectiveConfig:
    """How the loss is weighed.

    The quantizer is phased in: features pass unrounded up to step `round_from`, fully rounded from
    `round_until` on. `probe_every`: steps between measurements of what the tokens hold.
    """

    commitment: float = 0.25
    round_from: int = 0
    round_until: int = 1
    probe_every: int = 100


class SpatialObjective:
    """Loss and first-screen metrics of a spatial tokenizer in training."""

    def __init__(
        self, config: SpatialObjectiveConfig, probe_images: Float[Tensor, "b 3 h w"]
    ) -> None:
        self.config = config
        self.probe_images = probe_images
        self.rounding = 0.0
        self.keeper = CodebookKeeper()

    def before_step(self, model: SpatialTokenizer, step: int) -> None:
        """Set how far features are rounded in this step."""
        self.rounding = rounding_at(step, self.config.round_from, self.config.round_until)

    def __call__(
        self, model: SpatialTokenizer, images: Float[Tensor, "b 3 h w"], step_seed: int, /
    ) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """Return the loss of one batch; nothing in it is random."""
        rebuilt = model(images, self.rounding)
        quantized = rebuilt.quantized
        error = (rebuilt.output.float() - images).square().mean()
        loss = error + self.config.commitment * self.rounding * quantized.commitment
        self.keeper.see(rebuilt.features, quantized.codes)
        return loss, {"error": error.detach(), "commitment": quantized.commitment.detach()}

    def after_step(self, model: SpatialTokenizer, step: int) -> dict[str, float]:
        """Move the codebook; every `probe_every` steps measure what the tokens hold."""
        figures = self.keeper.move(model, step)
        if figures is None:
            return {}
        if step % self.config.probe_every == 0:
            figures |= {f"codebook.{k}": v for k, v in model.quantizer.metrics().items()}
            if distributed.is_main():
                device = next(model.parameters()).device
                figures |= probe(model, self.probe_images.to(device), self.rounding)
        return figures


@torch.no_grad()
def probe(
    model: SpatialTokenizer, images: Float[Tensor, "b 3 h w"], rounding: float = 1.0
) -> dict[str, float]:
    """Return the error with own and with another image's tokens, and the spread of the features."""
    features = model.features(images)
    values = model.quantizer(features, rounding).values
    own, wrong = (model.rebuild(tokens).float() for tokens in (values, values.roll(1, 0)))
    return {
        "probe.own": float((own - images).square().mean()),
        "probe.wrong": float((wrong - images).square().mean()),
        "probe.spread": spread(features),
    }
