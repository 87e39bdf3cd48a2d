"""What the probes share that decode pictures from some of their tokens, level by level."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ddt_llama.config import check_range
from ddt_llama.evaluation.pictures import ScenePictures
from ddt_llama.evaluation.reconstruction import device_of
from ddt_llama.generation.model import Model
from ddt_llama.probes.base import SEED, check_seeds
from ddt_llama.shapes.render import render
from ddt_llama.shapes.scene import Scene

SHOWN_LEVELS = 8  # columns of a picture strip
SHOWN_PICTURES = 4  # its rows


@dataclass(frozen=True)
class LevelPlan:
    """`levels` equal parts of the tokens, `scenes` pictures a seed, `steps` of decoding.

    Of fewer tokens than levels each is one. Steps are those of each model's release unless given. A
    seed chooses the scenes and the noise, which is the same at all levels.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    levels: int = 32
    scenes: int = 64
    steps: int | None = None

    def __post_init__(self) -> None:
        """Refuse seeds that are none, and numbers that measure nothing."""
        check_seeds(self.seeds)
        check_range(self, 1, math.inf, "levels")
        check_range(self, 0, math.inf, "steps")
        check_range(self, 2, math.inf, "scenes")  # one is compared with another

    def about(self) -> str:
        """Say in a sentence or two what is measured on what."""
        steps = (
            "the decoding steps of each release" if self.steps is None else f"{self.steps} steps"
        )
        return (
            f"{len(self.seeds)} seeds of {self.scenes} held-out scenes each, {self.levels} levels, "
            f"{steps}. One training of each tokenizer: what others would change is not in the "
            "intervals."
        )

    def quick(self) -> "LevelPlan":
        """Return a plan of few pictures and levels."""
        return replace(self, levels=8, scenes=8)

    def counts(self, num_tokens: int) -> list[int]:
        """Return the number of tokens at each level, the last all of them.

        >>> LevelPlan(levels=4).counts(64), LevelPlan(levels=4).counts(3)
        ([16, 32, 48, 64], [1, 2, 3])
        """
        levels = min(self.levels, num_tokens)
        return [round(num_tokens * (level + 1) / levels) for level in range(levels)]

    def shares(self, num_tokens: int) -> list[float]:
        """Return the share of the tokens at each level, the last 1."""
        return [count / num_tokens for count in self.counts(num_tokens)]

    def shown(self, num_tokens: int) -> list[int]:
        """Return the levels on a picture strip."""
        levels = len(self.counts(num_tokens))
        step = max(1, levels // SHOWN_LEVELS)
        return list(range(levels - 1, -1, -step))[::-1]


@dataclass(frozen=True)
class Subjects:
    """The pictures of one seed, their codes by one model, and how they are decoded."""

    model: Model
    scenes: Sequence[Scene]
    images: Float[Tensor, "b 3 h w"]
    codes: Int[Tensor, "b k"]
    steps: int
    seed: int

    @classmethod
    def of(cls, model: Model, plan: LevelPlan, seed: int, count: int | None = None) -> "Subjects":
        """Draw held-out scenes and encode them."""
        number = plan.scenes if count is None else count
        size = model.tokenizer.image_size
        pictures = ScenePictures(number, size, "heldout", SEED + seed)
        images = pictures.images(0, number)
        device = device_of(model.tokenizer)
        codes = model.tokenizer.encode(images.to(device))
        scenes = pictures.scenes(0, number)
        steps = model.settings.steps if plan.steps is None else plan.steps
        return cls(model, scenes, images, codes, steps, seed)

    def decode(
        self, codes: Int[Tensor, "b k"], visible: Bool[Tensor, " k"] | None = None
    ) -> Float[Tensor, "b 3 h w"]:
        """Decode codes; the noise of a picture is the same at every call.

        In place of codes that are not `visible` a tokenizer that was never trained to do without
        them is given those of the bare background: what else it would show is no fault of its
        tokens.
        """
        first = self.seed * 1_000_003
        if visible is not None and not self.model.tokenizer.prefixes:
            codes, visible = torch.where(visible.to(codes.device), codes, self.bare()), None
        decoded = self.model.tokenizer.decode(
            codes, steps=self.steps, visible=visible, seed=range(first, first + len(codes))
        )
        return decoded.float().cpu()

    def bare(self) -> Int[Tensor, "b k"]:
        """Return the codes of the pictures without their objects."""
        grounds = [replace(scene, objects=()) for scene in self.scenes]
        images = render(grounds, self.model.tokenizer.image_size)
        return self.model.tokenizer.encode(images.to(self.codes.device))
