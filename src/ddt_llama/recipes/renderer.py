"""The recipe of a one-step renderer, and those that come with the project.

It stands behind a finished tokenizer, and changes nothing of it: the release is that of `start`,
language model and all, with the renderer added. `steps` 0 decodes by it.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ddt_llama.recipes.data import DataConfig
from ddt_llama.recipes.formulas import Cost, renderer_cost
from ddt_llama.recipes.sizes import TOKENIZER_MUON, small_tokenizer
from ddt_llama.recipes.starts import release_of
from ddt_llama.tokenizer import TimestepTokenizer, TimestepTokenizerConfig
from ddt_llama.tokenizer.base import config_of
from ddt_llama.tokenizer.timestep import KIND
from ddt_llama.training.loop import TrainConfig
from ddt_llama.training.renderer import RendererObjective, RendererObjectiveConfig


@dataclass(frozen=True)
class RendererRecipe:
    """Loss, training and data of one renderer; the network is that of the decoder.

    `start`: a run or release (or "nano") with tokens that are tied to timesteps. It begins as the
    decoder there; one that is there already learns on.
    """

    rival: ClassVar[None] = None
    keep_codes: ClassVar[bool] = True  # what codes are read from is not moved

    name: str
    start: str
    objective: RendererObjectiveConfig = field(default_factory=RendererObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def build(self, begins: bool = True) -> TimestepTokenizer:
        """Return the network of `start` with random weights."""
        folder = release_of(self.start, "start") / "tokenizer"
        return TimestepTokenizer(config_of(folder, KIND, TimestepTokenizerConfig))

    def equip(self, model: TimestepTokenizer) -> None:
        """Give a network its renderer, which alone learns."""
        renderer = model.add_renderer()
        model.requires_grad_(False)
        renderer.requires_grad_(True)

    def loss(self, probe_images: Float[Tensor, "b 3 h w"]) -> RendererObjective:
        """Return the objective; it needs no `probe_images`."""
        return RendererObjective(self.objective)

    def open(self, release: Path) -> TimestepTokenizer:
        """Return the tokenizer of a release, with a renderer that can learn."""
        model = TimestepTokenizer.load(release / "tokenizer")
        model.config.open_latents()
        self.equip(model)
        return model

    def cost(self) -> Cost:
        """Return what the network costs, without building a weight."""
        with torch.device("meta"):
            model = self.build(begins=False)
            self.equip(model)
        return renderer_cost(model, self.train.batch)


def nano_renderer() -> RendererRecipe:
    """A renderer for nano, for two CPU cores: pictures in one pass instead of many."""
    return RendererRecipe(
        "nano_renderer",
        start="nano",
        train=TrainConfig(
            steps=1500,
            batch=64,
            sample_every=1000,
            prefetch=1,
            optim=replace(TOKENIZER_MUON, warmup=50, decay_share=0.7),
        ),
    )


def small_renderer() -> RendererRecipe:
    """A renderer for small, for one GPU; never trained."""
    small = small_tokenizer()
    return RendererRecipe(
        "small_renderer",
        start="small",
        train=replace(small.train, optim=replace(small.train.optim, warmup=50, decay_share=0.7)),
        data=small.data,
    )
