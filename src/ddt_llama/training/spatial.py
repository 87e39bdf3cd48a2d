"""The objective of the spatial tokenizer: squared error of the picture + commitment.

Source: van den Oord et al. 2017, equation 3, with the codebook moved by averages instead of a loss.
With a network of features and a critic it is VQGAN's (Esser et al. 2021), at fixed weights; what
the critic says moves both, and is no part of the loss that is told: it begins late, and would look
like a training that breaks.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ddt_llama.config import UserError, check_range
from ddt_llama.tokenizer.spatial import SpatialTokenizer
from ddt_llama.training.codebook import CodebookKeeper, check_phases, rounding_at, spread
from ddt_llama.training.critics import NORMED, Features, check_features, hinge


@dataclass(frozen=True)
class SpatialObjectiveConfig:
    """How the loss is weighed.

    The quantizer is phased in: features pass unrounded up to step `round_from`, fully rounded from
    `round_until` on. `probe_every`: steps between measurements of what the tokens hold.
    `perceptual` weighs the distance in the features of the vision model in the folder `features`;
    `adversarial`, from step `adversarial_from` on, the scores of a critic of `critic_widths`.
    """

    commitment: float = 0.25
    round_from: int = 0
    round_until: int = 1
    probe_every: int = 100
    perceptual: float = 0.0
    features: str | None = None
    adversarial: float = 0.0
    adversarial_from: int = 0
    critic_widths: tuple[int, ...] = (32, 64, 128)

    def __post_init__(self) -> None:
        """Refuse weights below 0, and features that nobody gives."""
        check_range(self, 0, math.inf, "commitment", "adversarial")
        check_range(self, 0, math.inf, "round_from", "round_until", "adversarial_from")
        check_range(self, 1, math.inf, "probe_every")
        check_phases(self.round_from, self.round_until)
        first, *later = self.critic_widths or (0,)
        if first < 1 or any(width < 1 or width % NORMED for width in later):
            raise UserError(
                f"critic_widths: given {self.critic_widths}, allowed are one or more, of which "
                f"those after the first are multiples of {NORMED}"
            )
        check_features(self)


class SpatialObjective:
    """Loss and first-screen metrics of a spatial tokenizer in training."""

    def __init__(
        self, config: SpatialObjectiveConfig, probe_images: Float[Tensor, "b 3 h w"]
    ) -> None:
        self.config = config
        self.probe_images = probe_images
        self.rounding = 0.0
        self.judging = False
        self.keeper = CodebookKeeper()
        self.features = None
        if config.features is not None:
            self.features = Features(config.features)

    def before_step(self, model: SpatialTokenizer, step: int) -> None:
        """Set how far features are rounded in this step, and whether the critic has its say."""
        self.rounding = rounding_at(step, self.config.round_from, self.config.round_until)
        self.judging = step >= self.config.adversarial_from

    def __call__(
        self, model: SpatialTokenizer, images: Float[Tensor, "b 3 h w"], step_seed: int, /
    ) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """Return the loss of one batch; nothing in it is random."""
        rebuilt = model(images, self.rounding)
        quantized = rebuilt.quantized
        error = (rebuilt.output.float() - images).square().mean()
        loss = error + self.config.commitment * self.rounding * quantized.commitment
        figures = {"error": error.detach(), "commitment": quantized.commitment.detach()}
        if self.features is not None:
            distance = self.features.distance(rebuilt.output, images)
            loss = loss + self.config.perceptual * distance
            figures["perceptual"] = distance.detach()
        if model.critic is not None and self.judging:
            maker, critic = hinge(model.critic, rebuilt.output, images)
            judged = self.config.adversarial * maker + critic
            loss = loss + (judged - judged.detach())
            figures |= {"adversarial": maker.detach(), "critic": critic.detach()}
        self.keeper.see(rebuilt.features, quantized.codes)
        return loss, figures

    def after_step(self, model: SpatialTokenizer, step: int) -> dict[str, float]:
        """Move the codebook; every `probe_every` steps measure what the tokens hold."""

        def measure() -> dict[str, float]:
            device = next(model.parameters()).device
            return probe(model, self.probe_images.to(device), self.rounding)

        return self.keeper.after_step(model, step, self.config.probe_every, measure)


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
