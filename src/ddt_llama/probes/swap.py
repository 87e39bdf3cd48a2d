"""Half the tokens of one picture, half of another: a blend, or a collage?

Level by level the coarse tokens of A meet the fine ones of B. A tokenizer without a coarse end is
cut twice: codes of A spread over the picture as the coarse ends of others start, so that the tokens
differ and not the cut, and by rows, the first of A, as its language is written. The paper shows
that timestep tokens give one picture between both, spatial tokens a picture cut and pasted. Here
each region of the mixture is placed between A (1) and B (0); what varies from region to region is
collage, what all share is blend. A collage may be cut by content (the ground of A, the objects of
B) or in place, along the same lines in every picture, which is told beside it; so is that of pairs
on a ground of one colour, which a network that normalises whole pictures cannot confuse. Source:
DDT-LLaMA and Selftok, the figures of token swapping.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from ddt_llama.data.images import to_pil
from ddt_llama.evaluation.intervals import Figure, mean
from ddt_llama.evaluation.result import watch
from ddt_llama.generation.model import Model
from ddt_llama.probes.base import Line, Outcome, Plot, between, kept, told
from ddt_llama.probes.levels import SHOWN_PICTURES, LevelPlan, Subjects
from ddt_llama.reports.pictures import sheet
from ddt_llama.tokenizer import Tokenizer
from ddt_llama.tokenizer.base import visible_mask
from ddt_llama.tokenizer.schedule import raster_order

REGIONS = 8  # along one side, or more
MIXED = (0.1, 0.9)  # levels whose mean share of A lies between are told of
# What is told, and how.
TOLD = {
    "collage": "",
    "ground": "on one ground",
    "place": "in place",
    "neither": "neither A nor B",
}
SCALE = {
    "share": "share of A",
    "collage": "collage (1) or blend (0)",
    "place": "collage in place",
    "neither": "neither A nor B",
    "ground": "collage on one ground",
}
LEGEND = (
    "collage: 1 where each region is A's or B's, 0 where all are the same mixture; place: 1 where "
    "all pictures are cut along the same lines; neither: what is neither A's nor B's, in squared "
    "differences of the two (where it is large, the others say little); ground: collage of the "
    "pairs whose backgrounds have one colour. Means over the levels "
    "and pictures in which both have a part; by rows: the first codes are those of A, else they "
    "are spread or the coarsest; no such row: with some seed there is none; A less B "
    "of models: A minus B."
)


def swap(plan: LevelPlan, models: Sequence[Model], folder: Path) -> Outcome:
    """Mix pairs of pictures at every level with every seed; see how the regions side."""
    figures: dict[str, Figure] = {}
    plots: dict[str, Plot] = {}
    pictures = {}
    sentences = []
    collages = {}
    sides = max(sides_of(model.tokenizer.num_tokens) for model in models)
    cuts = [(model, rows) for model in models for rows in cuts_of(model.tokenizer)]
    for model, by_rows in cuts:
        subject = f"{model.name} by rows" if by_rows else model.name
        rows = []
        for seed in watch(plan.seeds, f"swaps of {subject}"):
            path = folder / "parts" / f"{subject}-{seed}.json"
            rows.append(
                kept(path, lambda m=model, r=by_rows, s=seed: measure(m, plan, s, sides, r))
            )
        seen = {name: [among_mixed(row, name) for row in rows] for name in TOLD}
        shares = plan.shares(model.tokenizer.num_tokens)
        plots[f"{subject}, mixed, {len(rows)} seeds"] = Plot.of_seeds(
            {
                label: over_levels(shares, [row[name] for row in rows])
                for name, label in SCALE.items()
                if any(over_levels(shares, [row[name] for row in rows]))
            },
            "percent of the tokens from A",
            "share",
        )
        pictures[f"{subject}, B (left) to A (right)"] = strip(model, plan, by_rows)
        if any(map(math.isnan, seen["collage"])):
            sentences.append(f"{subject} nowhere, as no level mixes both")
            continue
        found = {
            name: mean(values) for name, values in seen.items() if not any(map(math.isnan, values))
        }
        figures |= {f"{subject}.{name}": figure for name, figure in found.items()}
        collages[subject] = seen["collage"]
        words = [told(found["collage"])]
        words += [
            f"{label} {told(found[name])}"
            for name, label in TOLD.items()
            if name in found and label
        ]
        sentences.append(f"{subject} {', '.join(words)}")
    apart = between(collages)
    figures |= {f"{name}.collage": figure for name, figure in apart.items()}
    sentences += [f"{name} {told(figure, sign='+')}" for name, figure in apart.items()]
    verdict = f"Between collage (1) and blend (0) stands {'; '.join(sentences)}."
    return Outcome(figures, verdict, plots, pictures)


def measure(
    model: Model, plan: LevelPlan, seed: int, sides: int, by_rows: bool = False
) -> dict[str, list[float]]:
    """Return the figures of `regions` at each level, means over pairs of pictures."""
    subjects = Subjects.of(model, plan, seed)
    one, other = subjects.codes, subjects.codes.roll(1, 0)
    a, b = subjects.decode(one), subjects.decode(other)
    grounds = torch.tensor([scene.background for scene in subjects.scenes])
    same = grounds == grounds.roll(1)
    measured: dict[str, list[float]] = {name: [] for name in SCALE}
    for count in plan.counts(one.shape[1]):
        chosen = from_a(model.tokenizer, count, by_rows).to(one.device)
        mixture = subjects.decode(torch.where(chosen, one, other))
        found = regions(mixture, a, b, sides)
        alike = regions(mixture[same], a[same], b[same], sides)[1] if same.any() else math.nan
        for name, value in zip(SCALE, (*found, alike), strict=True):
            measured[name].append(value)
    return measured


def cuts_of(tokenizer: Tokenizer) -> tuple[bool, ...]:
    """Return whether codes are divided by rows: both ways, where there is no coarse end."""
    return (False,) if tokenizer.prefixes else (False, True)


def from_a(tokenizer: Tokenizer, count: int, by_rows: bool = False) -> Bool[Tensor, " k"]:
    """Return which codes are those of A.

    The `count` coarsest, or as many spread as these start; cut by rows the first ones.
    """
    if by_rows:
        return torch.arange(tokenizer.num_tokens) < count
    coarse = visible_mask(count, tokenizer.num_tokens)
    return coarse if tokenizer.prefixes else coarse[raster_order(tokenizer.num_tokens)]


def sides_of(num_tokens: int) -> int:
    """Return how many regions a side has: a power of two, no region larger than a token's cell.

    >>> sides_of(64), sides_of(128)
    (8, 16)
    """
    return max(REGIONS, 2 ** math.ceil(math.log2(num_tokens) / 2))


def regions(
    mixture: Float[Tensor, "b 3 h w"],
    a: Float[Tensor, "b 3 h w"],
    b: Float[Tensor, "b 3 h w"],
    sides: int = REGIONS,
) -> tuple[float, float, float, float]:
    """Return the first four figures of `SCALE`, means over pictures of `sides` x `sides` regions.

    A region of the mixture m is w A + (1 - w) B, w = <m - B, A - B> / |A - B|^2 within 0..1, and
    counts as much as A and B differ there (|A - B|^2). The share of A is the mean of w over all
    pictures, the others are of those in which both have a part. Collage is the variance of w over
    the regions as a share of the most that their mean allows, mean (1 - mean): 1 where each is A or
    B, 0 where all are the same mixture. Collage in place is the same of w averaged over the
    pictures: 1 where all are cut along the same lines. Neither is the part of
    |m - (w A + (1 - w) B)|^2 in |A - B|^2.
    """
    m, start, end = (cut(images, sides) for images in (mixture, b, a))
    along, offset = end - start, m - start
    weight = along.square().sum(-1)
    w = ((offset * along).sum(-1) / weight.clamp_min(1e-9)).clamp(0, 1)
    share, collage = spread(w, weight)
    mixed = (share > MIXED[0]) & (share < MIXED[1])
    if not mixed.any():
        return float(share.mean()), math.nan, math.nan, math.nan
    rest = (offset - w[..., None] * along).square().sum((-2, -1))
    neither = (rest / weight.sum(-1).clamp_min(1e-9))[mixed].mean()
    w, weight = w[mixed], weight[mixed]
    everywhere = weight.sum(0)
    _, place = spread((w * weight).sum(0) / everywhere.clamp_min(1e-9), everywhere)
    return float(share.mean()), float(collage[mixed].mean()), float(place), float(neither)


def spread(
    w: Float[Tensor, "*b r"], weight: Float[Tensor, "*b r"]
) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
    """Return the weighted mean of w and its variance as a share of mean (1 - mean)."""
    total = weight.sum(-1).clamp_min(1e-9)
    share = (w * weight).sum(-1) / total
    variance = ((w - share[..., None]).square() * weight).sum(-1) / total
    return share, variance / (share * (1 - share)).clamp_min(1e-9)


def cut(images: Float[Tensor, "b 3 h w"], sides: int) -> Float[Tensor, "b r p"]:
    """Cut images into `sides` x `sides` regions; sizes that leave a rest are stretched."""
    side = -(-images.shape[-1] // sides) * sides
    if side != images.shape[-1]:
        images = F.interpolate(images, size=(side, side), mode="nearest")
    return rearrange(images, "b c (y p) (x q) -> b (y x) (p q c)", y=sides, x=sides)


def among_mixed(row: Mapping[str, Sequence[float | None]], name: str) -> float:
    """Return the mean of a quantity over the levels at which both pictures have a part, or nan."""
    shares, values = (np.array(row[key], dtype=float) for key in ("share", name))
    mixed = (shares > MIXED[0]) & (shares < MIXED[1]) & np.isfinite(values)
    return float(values[mixed].mean()) if mixed.any() else math.nan


def over_levels(shares: Sequence[float], rows: Sequence[Sequence[float | None]]) -> list[Line]:
    """Return the points of each seed over the percent of tokens, where all seeds have a value."""
    values = np.array(rows, dtype=float)
    known = np.isfinite(values).all(0)
    percent = 100 * np.array(shares)[known]
    return [list(zip(percent.tolist(), row.tolist(), strict=True)) for row in values[:, known]]


def strip(model: Model, plan: LevelPlan, by_rows: bool = False) -> Any:
    """Return pairs of the first seed, level by level: B in the first column, A in the last."""
    subjects = Subjects.of(model, plan, plan.seeds[0], SHOWN_PICTURES)
    one, other = subjects.codes, subjects.codes.roll(1, 0)
    counts = plan.counts(one.shape[1])
    shown = [counts[level] for level in plan.shown(one.shape[1])[:-1]]
    masks = [from_a(model.tokenizer, count, by_rows).to(one.device) for count in shown]
    mixed = [subjects.decode(torch.where(mask, one, other)) for mask in masks]
    columns = [subjects.images.roll(1, 0), *mixed, subjects.images]
    return sheet(to_pil(torch.stack(columns, dim=1).flatten(0, 1)), len(columns))
