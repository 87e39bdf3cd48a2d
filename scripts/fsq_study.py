"""Would a finite scalar quantizer serve the spatial tokenizer better than the moving codebook?

FSQ (Mentzer et al. 2023, arXiv 2309.15505) bounds every channel and rounds it to one of a few
levels: nothing to keep alive, and no commitment. For every seed the same network learns from the
same data with each quantizer from nothing (other random numbers to begin with, and rounded only
when the codes of the codebook that nothing uses have been replaced); told are PSNR and exact
held-out scenes, the share of the codes in use, and what the lesson of the probes costs on the
codes. Both are read at several rates (a common code instead of a near one, `Quantizer.cheapest`),
which training does not see: fewer bits for a worse picture.

    python scripts/fsq_study.py --out DIR --seeds 0 1 2
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from ddt_llama.checkpoint import load_into, load_tensors, save_release
from ddt_llama.config import save_json, to_dict
from ddt_llama.evaluation.intervals import flat, mean
from ddt_llama.evaluation.metrics import psnr
from ddt_llama.evaluation.pictures import ScenePictures
from ddt_llama.evaluation.reconstruction import read_back
from ddt_llama.probes.base import SEED, between, kept, open_folder, told
from ddt_llama.probes.learn import Course, Lesson, learn
from ddt_llama.probes.sequences import of_codes
from ddt_llama.probes.sources import encoded, scenes_to_learn
from ddt_llama.recipes.rivals import spatial_nano
from ddt_llama.recipes.run import run
from ddt_llama.recipes.tokenizer import SpatialRecipe
from ddt_llama.reports.plots import save_plot
from ddt_llama.tokenizer import SpatialTokenizer
from ddt_llama.tokenizer.quantizer import Quantized, Quantizer, QuantizerConfig
from ddt_llama.tokenizer.spatial import SpatialTokenizerConfig

LEVELS = (8, 8, 8, 6, 5)  # the paper's for about 2^14 codes
SLACK = 1e-3  # how far bounds lie outside of the outer levels
QUANTITIES = ("psnr", "exact", "bits", "used")
Kind = Literal["codebook", "levels"]


class FiniteScalar(Quantizer):
    """Each channel rounded to one of its levels; a code is the product of all."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__(QuantizerConfig(math.prod(LEVELS), len(LEVELS)), num_tokens)
        levels = torch.tensor(LEVELS)
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("steps", torch.cumprod(levels, 0) // levels, persistent=False)
        places = torch.arange(math.prod(LEVELS))[:, None] // self.steps % levels
        self.codebook.copy_((places - levels // 2) / (levels // 2))

    def bounded(self, features: Tensor) -> Tensor:
        """Return features between the outer levels, which are about -1 and 1."""
        half = (self.levels - 1) * (1 + SLACK) / 2
        offset = (self.levels % 2 == 0) / 2
        inside = torch.tanh(features.float() + torch.atanh(offset / half)) * half - offset
        return inside / (self.levels // 2)

    def nearest(self, unit: Tensor) -> Tensor:
        """Return the code of bounded features."""
        places = (unit * (self.levels // 2)).round().long() + self.levels // 2
        return (places * self.steps).sum(-1)

    def cheapest(self, unit: Tensor) -> Tensor:
        """Return the code with the least squared distance + `rate` x length."""
        if not self.config.rate:
            return self.nearest(unit)
        cost = (self.codebook.square().sum(-1) + self.config.rate * self.lengths) / 2
        return self._best(unit, cost)

    def forward(
        self, features: Tensor, rounding: float = 1.0, slips: Tensor | None = None
    ) -> Quantized:
        """Round, all the way or a share of it; there is nothing to commit to."""
        bounded = self.bounded(features)
        codes = self.nearest(bounded.detach())
        moved = (self.look_up(codes) - bounded).detach()
        return Quantized(bounded + rounding * moved, codes, bounded.new_zeros(()))

    @torch.no_grad()
    def update(self, features: Tensor, codes: Tensor, seed: int) -> int:
        """Count, for the lengths of codes; none moves or dies."""
        self.count_usage(codes)
        counts = torch.bincount(codes.flatten(), minlength=len(self.counts)).float()
        self.counts.lerp_(counts, 1 - self.config.decay)
        self.weigh(self.counts)
        return 0


class WithLevels(SpatialTokenizer):
    """The spatial tokenizer with levels instead of a codebook."""

    def __init__(self, config: SpatialTokenizerConfig) -> None:
        super().__init__(config)
        self.quantizer = FiniteScalar(self.num_tokens)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the codes of images, in raster order."""
        return self.quantizer.cheapest(self.quantizer.bounded(self.features(images)))

    def save(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write a release that the program refuses to take for a spatial tokenizer."""
        config = {"kind": "spatial with levels", **to_dict(self.config)}
        save_release(folder, self.state_dict(), config, dtype)


@dataclass(frozen=True)
class LevelsRecipe(SpatialRecipe):
    """The recipe of a spatial tokenizer with levels."""

    def build(self, begins: bool = True) -> SpatialTokenizer:
        """Return the network with random weights."""
        return WithLevels(self.tokenizer)


@dataclass(frozen=True)
class Study:
    """What is trained and measured; `rates` of 0 are plain rounding.

    A rate is worth other distances with either quantizer, so each has several.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 1000
    round_from: int = 500
    round_until: int = 700
    lesson_steps: int = 600
    pictures: int = 20_000
    held_out: int = 512
    scenes: int = 256
    codebook_rates: tuple[float, ...] = (0.0, 0.005)
    levels_rates: tuple[float, ...] = (0.0, 0.005, 0.02)
    compile: bool = True

    def readings(self) -> list[tuple[Kind, float]]:
        """Return every quantizer with each of its rates."""
        return [
            *product(("codebook",), self.codebook_rates),
            *product(("levels",), self.levels_rates),
        ]

    def recipe(self, kind: Kind, seed: int) -> SpatialRecipe:
        """Return the shortened training of the spatial nano with one kind of quantizer."""
        recipe = spatial_nano()
        quantizer = recipe.tokenizer.quantizer
        if kind == "levels":
            quantizer = QuantizerConfig(math.prod(LEVELS), len(LEVELS))
        objective = replace(
            recipe.objective, round_from=self.round_from, round_until=self.round_until
        )
        train = replace(
            recipe.train,
            steps=self.steps,
            batch=16,
            seed=seed,
            ema=0.99,
            compile=self.compile,
            sample_every=self.steps,
            keep=1,
            tensorboard=False,
        )
        return (LevelsRecipe if kind == "levels" else SpatialRecipe)(
            f"spatial_{kind}",
            tokenizer=replace(recipe.tokenizer, quantizer=quantizer),
            objective=objective,
            train=train,
            data=replace(recipe.data, seed=seed),
        )

    def course(self) -> Course:
        """Return the lesson of the probes."""
        course = Course()
        train = replace(course.train, steps=self.lesson_steps, compile=self.compile)
        return replace(course, train=train)


@torch.no_grad()
def fidelity(tokenizer: Any, seed: int, scenes: int) -> dict[str, float]:
    """Return PSNR and the share of exact scenes of held-out ones."""
    pictures = ScenePictures(scenes, tokenizer.image_size, "heldout", SEED + seed)
    images = pictures.images(0, scenes)
    decoded = tokenizer.decode(tokenizer.encode(images))
    right = read_back(decoded, pictures.scenes(0, scenes))
    return {"psnr": float(psnr(decoded, images).mean()), "exact": sum(right) / scenes}


def measured(study: Study, kind: Kind, rate: float, seed: int, out: Path) -> dict[str, float]:
    """Train a quantizer or open it, read it at a rate, and have its codes learned."""
    recipe = study.recipe(kind, seed)
    outcome = run(recipe, out / "tokenizers" / f"{kind}-{seed}")
    if not outcome.finished:
        raise KeyboardInterrupt
    tokenizer: Any = recipe.build().eval()
    source = outcome.release / "tokenizer" / "model.safetensors"
    load_into(tokenizer, load_tensors(source), source)
    tokenizer.quantizer.config = replace(tokenizer.quantizer.config, rate=rate)
    name = f"{kind}-{rate:g}-{seed}"
    codes = encoded(tokenizer, scenes_to_learn(study.pictures), name, out)
    rows = of_codes(name, codes, tokenizer.codebook_size, study.held_out)
    lesson = Lesson(study.course(), name, rows.fingerprint(), seed=seed)
    bits = learn(lesson, rows, out / "lessons" / name).bits * tokenizer.num_tokens
    used = len(codes.unique()) / tokenizer.codebook_size
    return {"bits": bits, "used": used} | fidelity(tokenizer, seed, study.scenes)


def main(out: Path, study: tyro.conf.OmitArgPrefixes[Study]) -> None:
    """Train and measure every quantizer with every seed; write figures.json and a plot."""
    open_folder(out, study)
    found: dict[str, list[dict[str, float]]] = {}
    for seed, (kind, rate) in product(study.seeds, study.readings()):
        part = out / "parts" / f"{kind}-{rate:g}-{seed}.json"
        one = kept(part, partial(measured, study, kind, rate, seed, out))
        found.setdefault(f"{kind}, rate {rate:g}", []).append(one)
    figures = {
        f"{name}.{quantity}": mean([one[quantity] for one in runs])
        for name, runs in found.items()
        for quantity in QUANTITIES
    }
    for quantity in QUANTITIES:
        apart = between({name: [one[quantity] for one in runs] for name, runs in found.items()})
        figures |= {f"{name}.{quantity}": figure for name, figure in apart.items()}
    save_json(out / "figures.json", flat(figures))
    curves = {
        kind: tuple(
            [figures[f"{name}.{axis}"].value for name in found if name.startswith(kind)]
            for axis in ("bits", "psnr")
        )
        for kind in ("codebook", "levels")
    }
    title = f"What codes give for what they cost, at several rates, {len(study.seeds)} seeds"
    x, y = "bits of an image to the language model of the lesson", "PSNR in dB"
    save_plot(out / "psnr-and-bits.png", curves, title, x, y)
    for name, figure in figures.items():
        print(f"{name}: {told(figure, 4)}")


if __name__ == "__main__":
    tyro.cli(main)
