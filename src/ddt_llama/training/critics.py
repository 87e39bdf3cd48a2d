"""Judges of a picture beside squared error: features of a vision network, and a critic in training.

Squared error alone prefers blur. VQGAN (Esser et al. 2021) adds a distance between features (Zhang
et al. 2018) and a critic that looks at patches (Isola et al. 2017) with the hinge loss. No network
of features comes with this project: give the folder of one.
"""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING

from ddt_llama.config import UserError, check_range, load_json
from ddt_llama.language.pretrained import open_whole, read_config

NORMED = 8  # groups of channels that are normalised together


class PatchCritic(nn.Module):
    """Says of overlapping patches how real they look: images `b 3 h w` to scores `b 1 y x`.

    Each of `widths` halves the picture. Norms are of groups, so that one picture is not judged by
    the others of its batch.
    """

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for place, width in enumerate(widths):
            layers.append(nn.Conv2d(channels, width, 4, stride=2, padding=1))
            layers += [nn.GroupNorm(NORMED, width)] if place else []
            layers.append(nn.LeakyReLU(0.2))
            channels = width
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 3, padding=1))

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 y x"]:
        """Return the scores; above 1 a patch passes for real, below -1 for made."""
        return self.layers(images)


def hinge(
    critic: nn.Module, made: Float[Tensor, "b 3 h w"], real: Float[Tensor, "b 3 h w"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return what the maker is to lower, and what the critic is to lower.

    The maker's term is -D(made), the critic's (max(0, 1 - D(real)) + max(0, 1 + D(made))) / 2. The
    first moves nothing of the critic and the second nothing of the maker, so one backward pass of
    their sum trains both.
    """
    still = {name: weight.detach() for name, weight in critic.named_parameters()}
    maker = -functional_call(critic, still, (made,)).float().mean()
    doubt, trust = critic(made.detach()).float(), critic(real).float()
    return maker, (F.relu(1 - trust).mean() + F.relu(1 + doubt).mean()) / 2


class Features:
    """Distance of pictures in the features of a vision network, opened from a local folder.

    A backbone of transformers (ResNet, DINOv2; ConvNeXt and Swin where they were saved as one, with
    a norm for each stage) in safetensors; its weights stay as they are. Raises UserError, naming
    the folder, where it cannot be opened.
    """

    def __init__(self, folder: str) -> None:
        path = Path(folder)
        config = read_config(path)
        if type(config) not in MODEL_FOR_BACKBONE_MAPPING:
            raise UserError(
                f"features: {folder} holds a {config.model_type} model; give a vision backbone of "
                "transformers, such as a ResNet or a DINOv2"
            )
        # A concrete class: AutoBackbone asks a hub whether a folder is one of its own.
        network: Any = open_whole(MODEL_FOR_BACKBONE_MAPPING[type(config)], path)
        network.out_indices = list(range(1, len(network.stage_names)))
        self.network: nn.Module = network.eval().requires_grad_(False)
        described = path / "preprocessor_config.json"
        known = load_json(described) if described.is_file() else {}
        self.mean, self.std = (
            torch.tensor(known.get(name, [0.5] * 3)).view(3, 1, 1)
            for name in ("image_mean", "image_std")
        )

    def distance(
        self, made: Float[Tensor, "b 3 h w"], real: Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, ""]:
        """Return the mean squared distance of unit feature vectors, summed over the stages."""
        self.network.to(made.device)
        with torch.no_grad():
            wanted = self._maps(real)
        return torch.stack(
            [
                (F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1))
                .square()
                .sum(1)
                .mean()
                for a, b in zip(self._maps(made), wanted, strict=True)
            ]
        ).sum()

    def _maps(self, images: Tensor) -> tuple[Tensor, ...]:
        mean, std = self.mean.to(images.device), self.std.to(images.device)
        return self.network((images + 1) / 2 * (1 / std) - mean / std).feature_maps


def check_features(config: Any) -> None:
    """Raise UserError for a weight `perceptual` below 0, and where it and `features` part."""
    check_range(config, 0, math.inf, "perceptual")
    if config.features is not None and config.perceptual == 0:
        raise UserError(
            "features: with objective.perceptual 0 nothing asks them; give it a weight, or "
            "leave features out"
        )
    if config.perceptual > 0 and config.features is None:
        raise UserError(
            "perceptual: no network of features comes with this program; give the folder of a "
            "vision model with --objective.features"
        )
