"""The recipe of an image tokenizer, and the pictures and figures it shows along the way."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ddt_llama.config import UserError
from ddt_llama.data.images import save_png
from ddt_llama.evaluation.metrics import psnr
from ddt_llama.evaluation.reconstruction import read_back, useful_steps
from ddt_llama.generation.model import Model
from ddt_llama.recipes.data import SAMPLE_SEED, SHAPES, DataConfig, unseen_images
from ddt_llama.recipes.formulas import (
    Cost,
    learning,
    spatial_cost,
    spatial_flops,
    timestep_cost,
    timestep_learning_flops,
)
from ddt_llama.recipes.sheets import levels_sheet
from ddt_llama.runs import Run
from ddt_llama.shapes.render import render
from ddt_llama.shapes.world import ShapesSource
from ddt_llama.tokenizer import (
    SpatialTokenizer,
    SpatialTokenizerConfig,
    TimestepTokenizer,
    TimestepTokenizerConfig,
)
from ddt_llama.tokenizer.sd3 import load_image_stream
from ddt_llama.training.critics import PatchCritic
from ddt_llama.training.loop import TrainConfig
from ddt_llama.training.spatial import SpatialObjective, SpatialObjectiveConfig
from ddt_llama.training.timestep import TimestepObjective, TimestepObjectiveConfig

SHOWN = 8  # pictures on a sheet
MEASURED = 64  # scenes behind the figures
STEPS = (1, 4, 16)
SHOWN_STEPS = 8  # behind a sheet


@dataclass(frozen=True)
class TokenizerRecipe:
    """Network, loss, training and data of one tokenizer.

    `start`: a run or release (or "nano") whose tokenizer of the same shape training goes on from;
    its codebook is in use already, so set `objective.round_from` 0 and `round_until` 1. It may be
    smaller than the recipe's: the codes it lacks come from the first batches. Its renderer, if it
    has one, stays behind. `keep_codes` trains the decoder alone, so that a language model trained
    on the codes of `start` goes on speaking them. `image_stream` is the `transformer` folder of a
    local diffusers SD3 checkpoint, from which the decoder's image stream starts (Selftok); SD3
    answers a velocity, so it goes with `tokenizer.prediction` "velocity".
    """

    rival: ClassVar[None] = None  # others are compared with it

    name: str
    start: str | None = None
    keep_codes: bool = False
    image_stream: str | None = None
    tokenizer: TimestepTokenizerConfig = field(default_factory=TimestepTokenizerConfig)
    objective: TimestepObjectiveConfig = field(default_factory=TimestepObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        """Refuse to keep codes that nobody has learned, and parts that do not go together."""
        refuse_new_codes(self.keep_codes, self.start)
        own, slips = self.objective.own, self.objective.slips
        if own and self.tokenizer.prediction != "clean":
            raise UserError(
                f"objective.own {own} with tokenizer.prediction {self.tokenizer.prediction!r}: it "
                'needs prediction "clean"; or set own to 0'
            )
        if slips and not self.keep_codes:
            raise UserError(
                f"objective.slips {slips}: only a decoder that trains alone can learn to forgive "
                "them; add --start RUN --keep-codes true, or set slips to 0"
            )
        if self.image_stream is not None:
            if self.start is not None:
                raise UserError("image_stream: start has a decoder already; give one of the two")
            if self.tokenizer.prediction != "velocity":
                raise UserError(
                    f"image_stream: SD3 answers a velocity, tokenizer.prediction is "
                    f"{self.tokenizer.prediction!r}; add --tokenizer.prediction velocity"
                )

    @property
    def starts_from_weights(self) -> bool:
        """Say whether training begins from weights that lie somewhere else."""
        return self.start is not None or self.image_stream is not None

    def build(self, begins: bool = True) -> TimestepTokenizer:
        """Return the network with random weights, or SD3's where training begins from them.

        Where it begins its latent space is opened, too. Raises UserError where there is none.
        """
        if begins:
            self.tokenizer.open_latents()
        model = TimestepTokenizer(self.tokenizer)
        if begins and self.image_stream is not None:
            load_image_stream(model.decoder, self.image_stream)
        return model

    def equip(self, model: Any) -> None:
        """Leave a network as it is: its training needs nothing beside it."""

    def loss(self, probe_images: Float[Tensor, "b 3 h w"]) -> TimestepObjective:
        """Return the objective; `probe_images` are held out."""
        return TimestepObjective(self.objective, probe_images)

    def learning_flops(self, model: Any) -> float:
        """Return the FLOPs of learning from one image."""
        return timestep_learning_flops(model, self.objective.draws, self.keep_codes)

    def cost(self) -> Cost:
        """Return what the network costs, without building a weight."""
        with torch.device("meta"):
            model = self.build(begins=False)
        return timestep_cost(model, self.objective.draws, self.train.batch, self.keep_codes)


@dataclass(frozen=True)
class SpatialRecipe:
    """Network, loss, training and data of one spatial tokenizer, the rival.

    `rival`: the recipe of the tokenizer it is to be compared with, of as many bits, parameters and
    FLOPs (`ddt recipes` prints both). `start` and `keep_codes` as in `TokenizerRecipe`.
    """

    name: str
    rival: str | None = None
    start: str | None = None
    keep_codes: bool = False
    tokenizer: SpatialTokenizerConfig = field(default_factory=SpatialTokenizerConfig)
    objective: SpatialObjectiveConfig = field(default_factory=SpatialObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        """Refuse to keep codes that nobody has learned."""
        refuse_new_codes(self.keep_codes, self.start)

    @property
    def starts_from_weights(self) -> bool:
        """Say whether training begins from weights that lie somewhere else."""
        return self.start is not None

    def build(self, begins: bool = True) -> SpatialTokenizer:
        """Return the network with random weights."""
        return SpatialTokenizer(self.tokenizer)

    def equip(self, model: Any) -> None:
        """Give a network the critic that its training needs."""
        if self.objective.adversarial > 0:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.train.seed)
                model.critic = PatchCritic(self.objective.critic_widths)

    def loss(self, probe_images: Float[Tensor, "b 3 h w"]) -> SpatialObjective:
        """Return the objective; `probe_images` are held out."""
        return SpatialObjective(self.objective, probe_images)

    def learning_flops(self, model: Any) -> float:
        """Return the FLOPs of learning from one image, without those of features and critic."""
        encode, decode, _ = spatial_flops(model)
        return learning(decode, encode, self.keep_codes)

    def cost(self) -> Cost:
        """Return what the network costs, without building a weight."""
        with torch.device("meta"):
            model = self.build(begins=False)
        return spatial_cost(model, self.train.batch, self.keep_codes)


def refuse_new_codes(keep_codes: bool, start: str | None) -> None:
    """Raise UserError where codes are to be kept that nobody has learned."""
    if keep_codes and start is None:
        raise UserError("keep_codes: there are none to keep; give --start RUN, or leave it out")


class ReconstructionSamples:
    """Show held-out pictures beside what their codes give back; measure on held-out scenes.

    A sheet has one column a picture: the original, then decoded from 1, 4, 8, ... all tokens
    in `shown_steps`.
    """

    def __init__(
        self,
        data: DataConfig,
        size: int,
        steps: Sequence[int] = STEPS,
        shown_steps: int = SHOWN_STEPS,
    ) -> None:
        self.steps, self.shown_steps = steps, shown_steps
        self.images = unseen_images(data, size, SHOWN)
        self.scenes = []
        if SHAPES in data.paths:
            source = ShapesSource(seed=SAMPLE_SEED, max_objects=data.max_objects, split="heldout")
            self.scenes = [source.scene(index) for index in range(MEASURED)]
        self.measured = (
            render(self.scenes, size) if self.scenes else unseen_images(data, size, MEASURED)
        )

    def __call__(self, model: Any, step: int, run: Run) -> Mapping[str, float]:
        """Write the sheet of this step and return the figures."""
        whole, seeds = Model(model), range(len(self.images))
        codes = whole.encode(self.images)
        overview = levels_sheet(whole, self.images, codes, seeds, self.shown_steps)
        save_png(overview, run.samples / f"step-{step:08d}.png")
        codes = whole.encode(self.measured)
        figures: dict[str, float] = {}
        for steps in useful_steps(model, self.steps):
            decoded = model.decode(codes, steps=steps).float().cpu()
            figures[f"sample.psnr.{steps}"] = float(psnr(decoded, self.measured).mean())
            if self.scenes:
                exact = read_back(decoded, self.scenes)
                figures[f"sample.exact.{steps}"] = sum(exact) / len(exact)
        return figures
