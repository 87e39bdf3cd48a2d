"""Tokenizers that differ in one thing, each trained from nothing and judged alike.

A variant is a recipe. Its tokenizer is trained briefly, encodes and decodes held-out scenes, and
gives the codes from which a small language model learns to draw. The work of `length` and `ablate`.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddt_llama import distributed
from ddt_llama.config import UserError, check_range
from ddt_llama.evaluation.flops import counted
from ddt_llama.evaluation.intervals import Figure, contrasts, mean
from ddt_llama.evaluation.metrics import psnr
from ddt_llama.evaluation.pictures import ScenePictures
from ddt_llama.evaluation.reconstruction import device_of, read_back
from ddt_llama.evaluation.result import watch
from ddt_llama.generation.model import Model
from ddt_llama.language import Vocabulary
from ddt_llama.language.text import TextTokenizer
from ddt_llama.probes.base import SEED, as_share, check_held_out, check_seeds, kept
from ddt_llama.probes.drawing import described, drawn
from ddt_llama.probes.learn import Course, Lesson, learn
from ddt_llama.probes.sources import text_of
from ddt_llama.recipes.data import DataConfig
from ddt_llama.recipes.run import run
from ddt_llama.recipes.sizes import nano_tokenizer
from ddt_llama.recipes.tokenizer import TokenizerRecipe
from ddt_llama.tokenizer import Tokenizer, load
from ddt_llama.tokenizer.base import visible_mask
from ddt_llama.training.loop import TrainConfig
from ddt_llama.training.timestep import TimestepObjectiveConfig

Judged = Mapping[str, float]  # by the names of QUANTITIES
QUANTITIES = {
    "psnr": "PSNR in dB",
    "once": "PSNR in dB of one decoding step",
    "half": "PSNR in dB of one step from the coarse half of the tokens",
    "exact": "share of scenes read back exactly",
    "bits": "bits of an image to the language model",
    "shapes": "share of described objects drawn",
    "parameters": "parameters of the tokenizer",
    "flops": "FLOPs of the language model for an image",
}
LEGEND = (
    f"MODEL.VARIANT.QUANTITY: {'; '.join(f'{name}: {told}' for name, told in QUANTITIES.items())}."
)
SHARES = ("exact", "shapes")
MEASURED = ("psnr", "once", "half", "exact", "bits", "shapes")  # the others are known beforehand
# What a verdict looks at, its unit, and how many of them are one.
TOLD = {
    "psnr": ("dB", 1.0),
    "once": ("dB in one step", 1.0),
    "half": ("dB in one step from half of the tokens", 1.0),
    "bits": ("bits an image", 1.0),
    "shapes": ("points of drawn objects", 100.0),
}


def shortened() -> TokenizerRecipe:
    """Return nano's training of a tokenizer on a few of its images.

    In small batches: what keeps tokens from saying anything at first yields to the number of steps,
    not of images (experiments/0040).
    """
    recipe = nano_tokenizer()
    train = replace(
        recipe.train,
        steps=1000,
        batch=16,
        ema=0.99,
        sample_every=1000,
        keep=1,
        tensorboard=False,
    )
    objective = replace(recipe.objective, round_from=200, round_until=400)
    return replace(recipe, train=train, objective=objective)


@dataclass(frozen=True)
class VariantPlan:
    """How every variant is trained and judged.

    `objective`, `train` and `data` are those of the tokenizers; their network is that of the model
    asked about, with at most `codes`, as many as nano's own training begins with.
    `course` trains the language models on `pictures` scenes, of which `held_out` are measured on;
    each then draws `drawn` unseen ones, none where 0. `scenes` are encoded and decoded in `steps`.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    objective: TimestepObjectiveConfig = field(default_factory=lambda: shortened().objective)
    train: TrainConfig = field(default_factory=lambda: shortened().train)
    data: DataConfig = field(default_factory=lambda: shortened().data)
    course: Course = field(default_factory=lambda: Course(look_back=True))
    codes: int = 4096
    pictures: int = 10_000
    held_out: int = 512
    scenes: int = 256
    steps: int = 8
    drawn: int = 96

    def __post_init__(self) -> None:
        """Refuse numbers that measure nothing."""
        check_seeds(self.seeds)
        check_range(self, 1, math.inf, "codes", "scenes", "steps")
        check_range(self, 0, math.inf, "drawn")
        check_held_out(self.held_out, self.pictures)
        for name, seed in (("train", self.train.seed), ("data", self.data.seed)):
            if seed:
                raise UserError(f"{name}.seed: given {seed}; a probe takes its own: --seeds")

    def about(self) -> str:
        """Say in a sentence or two what is measured on what."""
        image, text = self.train, self.course.train
        return (
            f"{len(self.seeds)} seeds, each a training of the tokenizer ({image.steps} steps of "
            f"{image.samples_a_step}, at most {self.codes:,} codes) and of a language model on its "
            f"codes ({text.steps} steps of {text.samples_a_step}, {self.pictures:,} scenes); "
            f"{self.scenes} held-out scenes of each seed, {self.drawn} unseen ones drawn, the same "
            "by all."
        )

    def quick(self) -> "VariantPlan":
        """Return a plan of two seeds and a handful of steps."""
        train, lesson = self.train, self.course.train
        train = replace(
            train, steps=3, batch=8, sample_every=3, optim=replace(train.optim, warmup=1)
        )
        lesson = replace(
            lesson, steps=4, batch=8, sample_every=4, optim=replace(lesson.optim, warmup=1)
        )
        return replace(
            self,
            seeds=self.seeds[:2],
            train=train,
            course=replace(self.course, train=lesson),
            pictures=48,
            held_out=16,
            scenes=16,
            drawn=2,
        )


def each_can_vary(models: Sequence[Model]) -> None:
    """Raise UserError for a model without tokens tied to timesteps, or without text."""
    for model in models:
        if not (model.tokenizer.refines and model.tokenizer.prefixes):
            raise UserError(
                f"this probe varies tokens that are tied to timesteps; {model.name} has none; "
                "give a model that has, such as nano"
            )
        text_of([model])


def judged(
    plan: VariantPlan,
    variants: Mapping[str, TokenizerRecipe],
    model: Model,
    folder: Path,
) -> dict[str, list[Judged]]:
    """Train and judge every variant with every seed; values are in the order of the seeds."""
    found: dict[str, list[Judged]] = {name: [] for name in variants}
    text = text_of([model])
    work = list(product(plan.seeds, variants))  # all of one seed first: an early look compares

    def place(name: str, seed: int) -> str:
        return f"{model.name}-{name.replace(' ', '-')}-{seed}"

    def value(name: str, seed: int) -> Judged:
        recipe = variants[name]
        first = next(one for one in variants if unordered(variants[one]) == unordered(recipe))
        tokenizer = trained(variants[first], seed, folder / "tokenizers" / place(first, seed))
        tokenizer = reordered(tokenizer, recipe)
        return judge(plan, tokenizer, seed, text, folder / "lessons" / place(name, seed))

    for seed, name in watch(work, f"variants of {model.name}"):
        part = folder / "parts" / f"{place(name, seed)}.json"
        found[name].append(kept(part, partial(value, name, seed)))
    return found


def unordered(recipe: TokenizerRecipe) -> TokenizerRecipe:
    """Return a recipe without the order in which codes are read, which training does not see."""
    return replace(recipe, tokenizer=replace(recipe.tokenizer, language_order="coarse_to_fine"))


def trained(recipe: TokenizerRecipe, seed: int, folder: Path) -> Tokenizer:
    """Train a tokenizer, go on with it or open it."""
    own = replace(
        recipe,
        train=replace(recipe.train, seed=seed),
        data=replace(recipe.data, seed=seed),
    )
    outcome = run(own, folder)
    if not outcome.finished:  # a signal: half a training must not be compared with whole ones
        raise KeyboardInterrupt
    return load(outcome.release / "tokenizer")


def reordered(tokenizer: Tokenizer, recipe: TokenizerRecipe) -> Tokenizer:
    """Return a trained tokenizer whose codes are read in the order of `recipe`."""
    ordered = recipe.build(begins=False).eval()
    ordered.load_state_dict(_network(tokenizer).state_dict())
    return ordered.to(distributed.setup())


def judge(
    plan: VariantPlan, tokenizer: Tokenizer, seed: int, text: TextTokenizer, folder: Path
) -> Judged:
    """Return what a tokenizer is worth; its language model learns in `folder`."""
    pictures = ScenePictures(plan.scenes, tokenizer.image_size, "heldout", SEED + seed)
    images, scenes = pictures.images(0, plan.scenes), pictures.scenes(0, plan.scenes)
    codes = tokenizer.encode(images.to(device_of(tokenizer)))
    decoded = tokenizer.decode(codes, steps=plan.steps, seed=seed).float().cpu()
    coarse = visible_mask(max(1, tokenizer.num_tokens // 2), tokenizer.num_tokens)
    once = tokenizer.decode(codes, steps=1, seed=seed).float().cpu()
    half = tokenizer.decode(codes, steps=1, visible=coarse, seed=seed).float().cpu()
    found = {
        "psnr": float(psnr(decoded, images).mean()),
        "once": float(psnr(once, images).mean()),
        "half": float(psnr(half, images).mean()),
        "exact": sum(read_back(decoded, scenes)) / plan.scenes,
        "parameters": float(sum(p.numel() for p in _network(tokenizer).parameters())),
    }
    return found | learned(plan, tokenizer, seed, text, folder)


def learned(
    plan: VariantPlan, tokenizer: Tokenizer, seed: int, text: TextTokenizer, folder: Path
) -> dict[str, float]:
    """Return what a language model makes of a tokenizer's codes, and what it costs."""
    pairs = described(tokenizer, text, folder.name, plan.pictures, plan.held_out)

    def examine(pupil: Any, vocabulary: Vocabulary) -> dict[str, float]:
        found = {"flops": flops(pupil, tokenizer.num_tokens)}
        if plan.drawn:
            found["shapes"] = drawn(pupil, vocabulary, tokenizer, text, plan.drawn, plan.steps)
        return found

    lesson = Lesson(plan.course, folder.name, pairs.fingerprint(), seed=seed)
    outcome = learn(lesson, pairs, folder, examine)
    return {"bits": outcome.bits * tokenizer.num_tokens, **outcome.scores}


def flops(pupil: nn.Module, num_tokens: int) -> float:
    """Return the FLOPs of one forward pass over the codes of an image."""
    frozen = copy.deepcopy(pupil).requires_grad_(False)  # the counter follows no weights to train
    device = next(frozen.parameters()).device
    ids = torch.zeros(1, num_tokens, dtype=torch.long, device=device)
    return counted(lambda: frozen(input_ids=ids, use_cache=False))


def figures_of(found: Mapping[str, Sequence[Judged]]) -> dict[str, Figure]:
    """Return `VARIANT.QUANTITY`, means over the seeds."""
    figures = {}
    for name, runs in found.items():
        for quantity in QUANTITIES:
            if quantity in runs[0]:
                one = mean([run[quantity] for run in runs])
                figures[f"{name}.{quantity}"] = as_share(one) if quantity in SHARES else one
    return figures


def differences(
    found: Mapping[str, Sequence[Judged]], bases: Mapping[str, str], models: int = 1
) -> dict[str, dict[str, Figure]]:
    """Return what each variant of `bases` has more than its base, seed by seed.

    By variant and quantity; a verdict tells of so many `models`. How much seeds scatter is taken of
    all variants together: three seeds of one say little of it. Intervals are so wide that those of
    all quantities and variants that a verdict looks at hold together with 95 % (Bonferroni).
    """
    apart: dict[str, dict[str, Figure]] = {name: {} for name in bases}
    for quantity in MEASURED:
        table = {
            name: [run[quantity] for run in runs]
            for name, runs in found.items()
            if quantity in runs[0]
        }
        known = {name: base for name, base in bases.items() if {name, base} <= table.keys()}
        if known:
            for name, figure in contrasts(table, known, len(TOLD) * len(bases) * models).items():
                apart[name][quantity] = figure
    return apart


def base_of(plan: VariantPlan, model: Model) -> TokenizerRecipe:
    """Return how the plan trains the network of a model."""
    network: Any = _network(model.tokenizer).config
    size = min(plan.codes, network.quantizer.codebook_size)
    network = replace(network, quantizer=replace(network.quantizer, codebook_size=size))
    taught = {"objective": plan.objective, "train": plan.train, "data": plan.data}
    return replace(shortened(), tokenizer=network, **taught)


def _network(tokenizer: Tokenizer) -> Any:
    if not isinstance(tokenizer, nn.Module):
        raise UserError("this probe trains networks; give a model whose tokenizer is one")
    return tokenizer
