"""Would a finite scalar quantizer serve the spatial tokenizer better than the moving codebook?

FSQ (Mentzer et al. 2023, arXiv 2309.15505) bounds every channel and rounds it to one of a few
levels: nothing to keep alive, and no commitment. For every seed the same network learns with each
quantizer from nothing; told are PSNR and exact held-out scenes, the share of the codes in use, and
what the lesson of the probes costs on the codes. The moving codebook is read twice: nearest codes,
and with the `rate` of the recipe, which training does not see.

    python scripts/fsq_study.py --out DIR --seeds 0 1 2
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from ddt_llama.checkpoint import load_into, load_tensors
from ddt_llama.config import save_json
from ddt_llama.evaluation.intervals import flat, mean
from ddt_llama.evaluation.metrics import psnr
from ddt_llama.evaluation.pictures import ScenePictures
from ddt_llama.evaluation.reconstruction import read_back
from ddt_llama.probes.base import SEED, kept, told
from ddt_llama.probes.learn import Course, Lesson, learn
from ddt_llama.probes.sequences import of_codes
from ddt_llama.probes.sources import encoded, scenes_to_learn
from ddt_llama.recipes.rivals import spatial_nano
from ddt_llama.recipes.run import run
from ddt_llama.recipes.tokenizer import SpatialRecipe
from ddt_llama.tokenizer import SpatialTokenizer
from ddt_llama.tokenizer.quantizer import Quantized, Quantizer, QuantizerConfig
from ddt_llama.tokenizer.spatial import SpatialTokenizerConfig

LEVELS = (8, 8, 8, 6, 5)  # the paper's for about 2^14 codes
SLACK = 1e-3  # how far bounds lie outside of the outer levels


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
        """Return features within their levels, not rounded."""
        half = (self.levels - 1) * (1 + SLACK) / 2
        offset = (self.levels % 2 == 0) / 2
        return torch.tanh(features.float() + torch.atanh(offset / half)) * half - offset

    def nearest(self, unit: Tensor) -> Tensor:
        """Return the code of each feature (not of unit length)."""
        places = self.bounded(unit).round().long() + self.levels // 2
        return (places * self.steps).sum(-1)

    def forward(
        self, features: Tensor, rounding: float = 1.0, slips: Tensor | None = None
    ) -> Quantized:
        """Round, all the way or a share of it; there is nothing to commit to."""
        bounded = self.bounded(features) / (self.levels // 2)
        codes = self.nearest(features)
        moved = (self.look_up(codes) - bounded).detach()
        return Quantized(bounded + rounding * moved, codes, bounded.new_zeros(()))

    @torch.no_grad()
    def update(self, features: Tensor, codes: Tensor, seed: int) -> int:
        """Count; no code moves or dies."""
        self.count_usage(codes)
        return 0


class WithLevels(SpatialTokenizer):
    """The spatial tokenizer with levels instead of a codebook."""

    def __init__(self, config: SpatialTokenizerConfig) -> None:
        super().__init__(config)
        self.quantizer = FiniteScalar(self.num_tokens)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the codes of images, in raster order."""
        return self.quantizer.nearest(self.features(images))


@dataclass(frozen=True)
class LevelsRecipe(SpatialRecipe):
    """The recipe of a spatial tokenizer with levels."""

    def build(self, begins: bool = True) -> SpatialTokenizer:
        """Return the network with random weights."""
        return WithLevels(self.tokenizer)


def recipe_of(kind: str, seed: int, steps: int, compiled: bool) -> SpatialRecipe:
    """Return the shortened training of the spatial nano with one kind of quantizer."""
    recipe = spatial_nano()
    quantizer = recipe.tokenizer.quantizer
    if kind == "levels":
        quantizer = QuantizerConfig(math.prod(LEVELS), len(LEVELS))
    train = replace(
        recipe.train,
        steps=steps,
        batch=16,
        seed=seed,
        ema=0.99,
        compile=compiled,
        sample_every=steps,
        keep=1,
        tensorboard=False,
    )
    return (LevelsRecipe if kind == "levels" else SpatialRecipe)(
        f"spatial_{kind}",
        tokenizer=replace(recipe.tokenizer, quantizer=quantizer),
        objective=replace(recipe.objective, round_from=200, round_until=400),
        train=train,
        data=replace(recipe.data, seed=seed),
    )


@torch.no_grad()
def fidelity(tokenizer: Any, seed: int, scenes: int) -> dict[str, float]:
    """Return PSNR and the share of exact scenes of held-out ones."""
    pictures = ScenePictures(scenes, tokenizer.image_size, "heldout", SEED + seed)
    images = pictures.images(0, scenes)
    decoded = tokenizer.decode(tokenizer.encode(images))
    right = read_back(decoded, pictures.scenes(0, scenes))
    return {"psnr": float(psnr(decoded, images).mean()), "exact": sum(right) / scenes}


def main(
    out: Path,
    seeds: tuple[int, ...] = (0, 1, 2),
    steps: int = 1000,
    lesson_steps: int = 600,
    pictures: int = 20_000,
    held_out: int = 512,
    scenes: int = 256,
    compile: bool = True,
) -> None:
    """Train and measure every quantizer with every seed; write figures.json."""
    course = Course()
    course = replace(course, train=replace(course.train, steps=lesson_steps, compile=compile))
    found: dict[str, list[dict[str, float]]] = {}
    for seed in seeds:
        for kind in ("codebook", "levels"):
            recipe = recipe_of(kind, seed, steps, compile)
            outcome = run(recipe, out / "tokenizers" / f"{kind}-{seed}")
            if not outcome.finished:
                raise KeyboardInterrupt
            tokenizer = recipe.build().eval()
            source = outcome.release / "tokenizer" / "model.safetensors"
            load_into(tokenizer, load_tensors(source), source)
            for rate in (0.0, recipe.tokenizer.quantizer.rate) if kind == "codebook" else (0.0,):
                name = f"{kind}, rate {rate:g}" if kind == "codebook" else kind
                config = tokenizer.quantizer.config
                tokenizer.quantizer.config = replace(config, rate=rate)

                def value(tokenizer: Any = tokenizer, name: str = name, seed: int = seed) -> Any:
                    place = f"{name}-{seed}".replace(", ", "-").replace(" ", "-")
                    codes = encoded(tokenizer, scenes_to_learn(pictures), place, out)
                    size = tokenizer.codebook_size
                    rows = of_codes(name, codes, size, held_out)
                    lesson = Lesson(course, name, rows.fingerprint(), seed=seed)
                    bits = learn(lesson, rows, out / "lessons" / place).bits
                    used = len(codes.unique()) / size
                    own = {"bits": bits * tokenizer.num_tokens, "used": used}
                    return own | fidelity(tokenizer, seed, scenes)

                part = out / "parts" / f"{name}-{seed}.json"
                found.setdefault(name, []).append(kept(part, value))
    figures = {
        f"{name}.{quantity}": mean([one[quantity] for one in runs])
        for name, runs in found.items()
        for quantity in runs[0]
    }
    base = "codebook, rate 0"
    for name in (one for one in found if one != base):
        for quantity in found[base][0]:
            paired = zip(found[name], found[base], strict=True)
            apart = mean([one[quantity] - other[quantity] for one, other in paired])
            figures[f"{name} less {base}.{quantity}"] = apart
    save_json(out / "figures.json", flat(figures))
    for name, figure in figures.items():
        print(f"{name}: {told(figure, 4)}")


if __name__ == "__main__":
    tyro.cli(main)
