"""Suite `reconstruction`: how much of a picture survives encoding and decoding.

Measures the image tokenizer alone: PSNR and SSIM against the input picture at several numbers of
steps and of visible tokens, the share of scenes that the verifier reads back exactly, and how much
of the codebook is in use.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ddt_llama.config import UserError, check_range
from ddt_llama.evaluation.intervals import Figure, jackknife, mean, proportion, setting
from ddt_llama.evaluation.metrics import psnr, ssim
from ddt_llama.evaluation.pictures import (
    EVALUATION_SEED,
    Pictures,
    ScenePictures,
    batches,
    check_seed,
)
from ddt_llama.evaluation.result import watch
from ddt_llama.generation.settings import check_guidance
from ddt_llama.shapes.scene import Scene
from ddt_llama.shapes.verify import matches, read
from ddt_llama.tokenizer.base import Tokenizer

GROUPS = 20  # of pictures, for the jackknife of the codebook figures


@dataclass(frozen=True)
class ReconstructionSuite:
    """Says what to measure.

    `steps`: numbers of decoding steps (0: the renderer), with `whole` also as many as there are
    tokens (the paper's loop); one step alone where a tokenizer decodes in one pass. `visible`:
    numbers of tokens, counted from the coarse end (None: 1, 4, 8, 16, ... all), decoded in
    `visible_steps`.
    `codebook_scenes`: pictures encoded to see which codes are in use.
    """

    scenes: int = 1000
    steps: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    whole: bool = True
    visible: tuple[int, ...] | None = None
    visible_steps: int = 8
    codebook_scenes: int = 10_000
    guidance_scale: float = 1.0
    batch_size: int = 64
    seed: int = EVALUATION_SEED

    def __post_init__(self) -> None:
        """Refuse numbers that measure nothing."""
        check_range(self, 1, math.inf, "scenes", "codebook_scenes", "batch_size")
        check_range(self, 0, math.inf, "visible_steps")
        if not self.steps or min(self.steps) < 0:
            raise UserError(
                f"steps are {self.steps}; give one or more numbers from 0 on (0 is the renderer)"
            )
        check_seed(self.seed)
        check_guidance(self.guidance_scale)

    def run(self, tokenizer: Tokenizer, pictures: Pictures | None = None) -> dict[str, Figure]:
        """Measure a tokenizer on held-out scenes, or on `pictures` (then `exact` only for scenes).

        Keys: `reconstruction.{psnr,ssim,exact}.STEPS`, `reconstruction.visible.{...}.TOKENS`,
        `codebook.{used,perplexity}`. Means have Student's t intervals over pictures, shares
        Wilson's, codebook figures those of a jackknife over 20 groups of pictures.
        """
        if pictures is None:
            shown: Pictures = ScenePictures(self.scenes, tokenizer.image_size, seed=self.seed)
            # Scenes of the kind the codebook was made for, which no training stream has drawn.
            many: Pictures = replace(shown, count=self.codebook_scenes, split="train")
        else:
            shown = many = pictures
        figures = self._quality(tokenizer, shown)
        figures |= self._codebook(tokenizer, many)
        return figures | {
            "reconstruction.scenes": setting(min(len(shown), self.scenes)),
            "reconstruction.guidance_scale": setting(self.guidance_scale),
            "reconstruction.visible_steps": setting(self.visible_steps),
        }

    def _decodings(self, tokenizer: Tokenizer) -> dict[str, tuple[int, int | None]]:
        """Return for each group of figures the steps and the visible tokens that it needs."""
        num_tokens = tokenizer.num_tokens
        visible = self.visible or useful_levels(tokenizer)
        if max(visible) > num_tokens or min(visible) < 0:
            raise UserError(f"visible is {visible}; this tokenizer has {num_tokens} tokens")
        wanted: dict[str, tuple[int, int | None]] = {}
        counts = {*self.steps, *([num_tokens] if self.whole else [])}
        for count in useful_steps(tokenizer, sorted(counts)):
            wanted[f"reconstruction.{{}}.{count}"] = (count, None)
        for count in visible:
            wanted[f"reconstruction.visible.{{}}.{count}"] = (self.visible_steps, count)
        return wanted

    def _quality(self, tokenizer: Tokenizer, pictures: Pictures) -> dict[str, Figure]:
        decodings = self._decodings(tokenizer)
        values: dict[str, list[float]] = defaultdict(list)
        exact: dict[str, list[bool]] = defaultdict(list)
        ranges = list(batches(min(len(pictures), self.scenes), self.batch_size))
        for start, stop in watch(ranges, "reconstruct"):
            images = pictures.images(start, stop)
            scenes = pictures.scenes(start, stop)
            codes = tokenizer.encode(images.to(device_of(tokenizer)))
            for key, (steps, visible) in decodings.items():
                decoded = tokenizer.decode(
                    codes,
                    steps=steps,
                    visible=visible,
                    seed=[self.seed + i for i in range(start, stop)],
                    guidance_scale=self.guidance_scale,
                )
                decoded = decoded.float().cpu()
                values[key.format("psnr")] += psnr(decoded, images).tolist()
                values[key.format("ssim")] += ssim(decoded, images).tolist()
                if scenes is not None:
                    exact[key.format("exact")] += read_back(decoded, scenes)
        means = {name: mean(numbers) for name, numbers in values.items()}
        return means | {name: proportion(outcomes) for name, outcomes in exact.items()}

    def _codebook(self, tokenizer: Tokenizer, pictures: Pictures) -> dict[str, Figure]:
        size = tokenizer.codebook_size
        count = min(len(pictures), self.codebook_scenes)
        groups = min(GROUPS, count)
        counts = torch.zeros(groups, size, dtype=torch.int64)
        for start, stop in watch(list(batches(count, self.batch_size)), "encode"):
            codes = tokenizer.encode(pictures.images(start, stop).to(device_of(tokenizer))).cpu()
            for row, picture in zip(codes, range(start, stop), strict=True):
                counts[picture % groups] += torch.bincount(row, minlength=size)
        figures = {"codebook.pictures": setting(count)}
        if groups < 2:
            return figures
        bounded = {
            "codebook.used": (jackknife(counts, share_used), 1.0),
            "codebook.perplexity": (jackknife(counts, perplexity), float(size)),
        }
        for name, (figure, highest) in bounded.items():
            low, high = max(figure.low, 0.0), min(figure.high, highest)
            figures[name] = Figure(figure.value, low, high)
        return figures


def useful_levels(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return numbers of visible tokens to show: few to all, or all where a prefix is no picture."""
    count = tokenizer.num_tokens
    return default_levels(count) if tokenizer.prefixes else (count,)


def useful_steps(tokenizer: Tokenizer, steps: Sequence[int]) -> tuple[int, ...]:
    """Return `steps`, or 1 alone where decoding is one pass."""
    return tuple(steps) if tokenizer.refines else (1,)


def default_levels(num_tokens: int) -> tuple[int, ...]:
    """Return 1, 4, 8, 16, ... up to all tokens.

    >>> default_levels(32)
    (1, 4, 8, 16, 32)
    """
    levels = [1, 4]
    while levels[-1] < num_tokens:
        levels.append(levels[-1] * 2)
    return tuple(sorted({min(level, num_tokens) for level in levels}))


def read_back(images: Float[Tensor, "b 3 h w"], scenes: Sequence[Scene]) -> list[bool]:
    """Say for each picture whether the verifier reads exactly this scene in it."""
    return [matches(found, scene) for found, scene in zip(read(images), scenes, strict=True)]


def share_used(counts: Int[Tensor, " v"]) -> float:
    """Return the share of codebook entries that occur at least once."""
    return (counts > 0).double().mean().item()


def perplexity(counts: Int[Tensor, " v"]) -> float:
    """Return exp of the entropy of the code frequencies: entries in effective use, 1 to v."""
    shares = counts.double() / counts.sum()
    return torch.special.entr(shares).sum().exp().item()


def device_of(tokenizer: Tokenizer) -> torch.device:
    """Return where a tokenizer computes; the CPU, unless it is a module with weights elsewhere."""
    weights = next(tokenizer.parameters(), None) if isinstance(tokenizer, nn.Module) else None
    return torch.device("cpu") if weights is None else weights.device
