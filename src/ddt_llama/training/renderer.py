"""The objective of the one-step renderer: squared error of its picture, codes as they are.

Encoder, codebook and the diffusion decoder stay as they are: only the renderer learns. Source:
Selftok (arXiv 2505.07538), whose renderer has a distance between features beside the squared error
(weight 0.1, of LPIPS), and a critic later on, which is left out here.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from ddt_llama.config import check_range
from ddt_llama.tokenizer.timestep import TimestepTokenizer
from ddt_llama.training.critics import Features, check_features


@dataclass(frozen=True)
class RendererObjectiveConfig:
    """How the loss is weighed, and what is hidden.

    `hide_fine`: share of images whose finest tokens are hidden, a random number of them, so that
    the coarse ones alone can be rendered, too. `perceptual` weighs the distance in the features of
    the vision model in the folder `features`.
    """

    hide_fine: float = 0.0
    perceptual: float = 0.0
    features: str | None = None

    def __post_init__(self) -> None:
        """Refuse shares that are none, and features that nobody gives."""
        check_range(self, 0, 1, "hide_fine")
        check_features(self)


class RendererObjective:
    """Loss of a renderer in training."""

    def __init__(self, config: RendererObjectiveConfig) -> None:
        self.config = config
        self.features = None if config.features is None else Features(config.features)

    def parts_to_compile(self, model: TimestepTokenizer) -> list[nn.Module]:
        """Return what a step runs."""
        return [model.encoder, model.add_renderer()]

    def __call__(
        self, model: TimestepTokenizer, images: Float[Tensor, "b 3 h w"], step_seed: int, /
    ) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """Return the loss of one batch; what is hidden comes from `step_seed`."""
        patches = model.to_patches(images)
        codes = model.encode_patches(patches)
        generator = Generator().manual_seed(step_seed)
        hides = torch.rand(len(images), generator=generator) < self.config.hide_fine
        first = torch.randint(model.num_tokens, (len(images),), generator=generator) * hides
        visible = (torch.arange(model.num_tokens) >= first[:, None]).to(images.device)
        made = model.render(model.quantizer.look_up(codes), visible)
        loss = (made - patches).square().mean()
        figures = {"error": loss.detach()}
        if self.features is not None:
            pictures = model.config.latents.decode(model.unpatchify(made))
            distance = self.features.distance(pictures, images)
            loss = loss + self.config.perceptual * distance
            figures["perceptual"] = distance.detach()
        return loss, figures
