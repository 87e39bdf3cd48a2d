"""What do the first tokens hold? Pictures decoded from a growing share, from either end.

Tokens tied to timesteps should give back a whole picture at every level, the coarse first: counts
and colours early, forms late. A spatial token gives back its square, row by row in the order of its
codes; the rest is the bare background of the scene, which is made known to it. What is no clear
object counts as one of its colour at its place, without shape and size. An attribute is back where
it is half of the way from what another scene has of it to all right, a picture at 20 dB: the same
for all tokenizers. Source: DDT-LLaMA, the figure of progressive reconstruction, and Selftok; 32
levels, the same noise at all.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddt_llama.data.images import to_pil
from ddt_llama.evaluation.intervals import Figure, mean
from ddt_llama.evaluation.metrics import psnr
from ddt_llama.evaluation.result import watch
from ddt_llama.generation.model import Model
from ddt_llama.probes.base import Line, Outcome, Plot, as_share, between, kept, percent, points
from ddt_llama.probes.levels import SHOWN_PICTURES, LevelPlan, Subjects
from ddt_llama.reports.pictures import sheet
from ddt_llama.shapes.judge import PLACE_TOLERANCE
from ddt_llama.shapes.scene import Object, Scene
from ddt_llama.shapes.verify import Blob, glimpse
from ddt_llama.tokenizer.base import visible_mask

ENDS = ("coarse", "fine")  # which end of the tokens is kept: the last indices or the first
NEAR = 20.0  # dB at which a picture is back
ATTRIBUTES = ("count", "colour", "shape", "size", "position")
TOGETHER = "attributes"
LEGEND = (
    "MODEL.END.QUANTITY.PERCENT: with so many percent of the tokens, from the coarse or the fine "
    "end; psnr in dB, the others as the share of the attributes that is verified; back: the share "
    "of the tokens from which on the quantity stays back (no such row: with some seed it never "
    "is); A less B: A minus B."
)
# End -> quantity -> value at each level; "chance" -> quantity -> what another scene shows of it.
Measured = Mapping[str, Mapping[str, Any]]


def prefix(plan: LevelPlan, models: Sequence[Model], folder: Path) -> Outcome:
    """Decode from either end at every level with every seed; see what is back when."""
    figures: dict[str, Figure] = {}
    plots: dict[str, Plot] = {}
    pictures = {}
    sentences = []
    everything: dict[str, tuple[list[float], list[Measured]]] = {}
    for model in models:
        measured: list[Measured] = []
        for seed in watch(plan.seeds, f"prefixes of {model.name}"):
            path = folder / "parts" / f"{model.name}-{seed}.json"
            measured.append(kept(path, lambda m=model, s=seed: measure(m, plan, s)))
        shares = plan.shares(model.tokenizer.num_tokens)
        found = figures_of(shares, measured)
        figures |= {f"{model.name}.{name}": figure for name, figure in found.items()}
        plots |= plots_of(model.name, shares, measured)
        pictures[f"{model.name}, from the coarse end above, from the fine end below"] = strip(
            model, plan
        )
        sentences.append(f"{model.name}: {verdict(found, model.tokenizer.prefixes)}")
        everything[model.name] = shares, measured
    for name in ("psnr", *ATTRIBUTES, TOGETHER):
        backs = {
            model: [back(one, shares, "coarse", name) for one in rows]
            for model, (shares, rows) in everything.items()
        }
        known = {model: row for model, row in backs.items() if math.inf not in row}
        for pair, apart in between(known).items():
            figures[f"{pair}.coarse.{name}.back"] = apart
            if name == TOGETHER:
                sentences.append(f"{pair}, mean of the attributes {points(apart)}")
    return Outcome(figures, f"{'; '.join(sentences)}.", plots, pictures)


def measure(model: Model, plan: LevelPlan, seed: int) -> dict[str, Any]:
    """Return PSNR in dB and verified attributes at each level, means over the scenes of a seed.

    "chance": the attributes that a scene shares with the next one.
    """
    subjects = Subjects.of(model, plan, seed)
    measured: dict[str, Any] = {end: {name: [] for name in ("psnr", *ATTRIBUTES)} for end in ENDS}
    for end in ENDS:
        for count in plan.counts(model.tokenizer.num_tokens):
            images = subjects.decode(subjects.codes, mask_of(end, count, subjects.codes.shape[1]))
            measured[end]["psnr"].append(float(psnr(images, subjects.images).mean()))
            pairs = zip(glimpse(images), subjects.scenes, strict=True)
            shares = np.mean([attributes(found, wanted) for found, wanted in pairs], axis=0)
            for name, share in zip(ATTRIBUTES, shares, strict=True):
                measured[end][name].append(float(share))
    others = [*subjects.scenes[1:], subjects.scenes[0]]
    pairs = zip(others, subjects.scenes, strict=True)
    shares = np.mean([attributes(other.objects, scene) for other, scene in pairs], axis=0)
    measured["chance"] = dict(zip(ATTRIBUTES, shares.tolist(), strict=True))
    return measured


def mask_of(end: str, count: int, num_tokens: int) -> torch.Tensor:
    """Return which tokens are kept: `count` from the coarse or from the fine end."""
    if end == "coarse":
        return visible_mask(count, num_tokens)
    return ~visible_mask(num_tokens - count, num_tokens)


def attributes(found: Sequence[Object | Blob] | None, wanted: Scene) -> list[float]:
    """Return how much of each of `ATTRIBUTES` a picture shows, 0 to 1; nothing without a ground.

    Count is right or wrong. Of colours, shapes and sizes it is the share of the objects that have a
    partner of the same one, wherever it stands; of positions, of those with a partner within
    `PLACE_TOLERANCE`, whatever it is. Objects too many count as objects without a partner.
    """
    if found is None:
        return [0.0] * len(ATTRIBUTES)
    total = max(len(found), len(wanted.objects), 1)
    shares = [float(len(found) == len(wanted.objects))]
    for name in ("colour", "shape", "size"):
        shown, asked = (
            Counter(getattr(item, name) for item in items) for items in (found, wanted.objects)
        )
        shares.append((shown & asked).total() / total)
    left_places = [(item.x, item.y) for item in found]
    close = 0
    for item in wanted.objects:
        near = [
            place
            for place in left_places
            if max(abs(place[0] - item.x), abs(place[1] - item.y)) <= PLACE_TOLERANCE
        ]
        if near:
            left_places.remove(near[0])
            close += 1
    return [*shares, close / total]


def figures_of(shares: Sequence[float], measured: Sequence[Measured]) -> dict[str, Figure]:
    """Return `END.QUANTITY.PERCENT` at quarters of the levels, and `END.QUANTITY.back`.

    `shares` are those of the tokens at each level. `back` is the share of the tokens from which on
    a quantity stays back; there is none where with some seed it never is.
    """
    figures = {}
    quarters = [round(len(shares) * part / 4) - 1 for part in (1, 2, 3, 4)]
    for end in ENDS:
        for name in ("psnr", *ATTRIBUTES):
            rows = [one[end][name] for one in measured]
            for level in sorted({max(0, level) for level in quarters}):
                part = round(100 * shares[level])
                reached = mean([row[level] for row in rows])
                figures[f"{end}.{name}.{part}"] = reached if name == "psnr" else as_share(reached)
            backs = [back(one, shares, end, name) for one in measured]
            if math.inf not in backs:
                figures[f"{end}.{name}.back"] = as_share(mean(backs))
    return figures


def back(measured: Measured, shares: Sequence[float], end: str, name: str) -> float:
    """Return with which share of the tokens from an end a quantity is back, to stay, or inf.

    Of `TOGETHER` it is the mean of the attributes.
    """
    if name == TOGETHER:
        return sum(back(measured, shares, end, one) for one in ATTRIBUTES) / len(ATTRIBUTES)
    chance = measured["chance"]
    border = NEAR if name == "psnr" else (chance[name] + 1) / 2
    return stays(measured[end][name], shares, border)


def stays(values: Sequence[float], shares: Sequence[float], border: float) -> float:
    """Return the share from which on values are at least `border`, or inf.

    Between two shares values are taken to grow evenly.

    >>> stays([0.6, 0.4, 0.6, 1.0], [0.25, 0.5, 0.75, 1.0], 0.5), stays([0.6, 0.4], [0.5, 1.0], 0.5)
    (0.625, inf)
    """
    first = 1 + max((level for level, value in enumerate(values) if value < border), default=-1)
    if first == len(values):
        return math.inf
    if not first:
        return shares[0]
    before, after = values[first - 1], values[first]
    part = (after - border) / (after - before)
    return shares[first] - part * (shares[first] - shares[first - 1])


def verdict(figures: Mapping[str, Figure], prefixes: bool) -> str:
    """Say with how many tokens from the coarse end the picture and each attribute are back.

    `prefixes`: whether the tokenizer has such an end.
    """
    backs = {name: figures.get(f"coarse.{name}.back") for name in ("psnr", *ATTRIBUTES)}
    parts = [f"{name} {'never' if one is None else percent(one)}" for name, one in backs.items()]
    end = "the coarse end" if prefixes else "the last row, the rest being background"
    return f"with these shares of its tokens, from {end}, are back: {', '.join(parts)}"


def plots_of(name: str, shares: Sequence[float], measured: Sequence[Measured]) -> dict[str, Plot]:
    """Return PSNR from both ends, and the attributes from each, over the percent of the tokens."""
    levels = [100 * share for share in shares]

    def lines(end: str, quantity: str) -> list[Line]:
        return [list(zip(levels, one[end][quantity], strict=True)) for one in measured]

    x, many = "percent of the tokens", f"{len(measured)} seeds"
    fidelity = {f"from the {end} end": lines(end, "psnr") for end in ENDS}
    plots = {f"{name}, fidelity, {many}": Plot.of_seeds(fidelity, x, "PSNR in dB")}
    for end in ENDS:
        curves = {one: lines(end, one) for one in ATTRIBUTES}
        plots[f"{name}, from the {end} end, {many}"] = Plot.of_seeds(
            curves, f"{x}, from the {end} end", "share of attributes verified"
        )
    return plots


def strip(model: Model, plan: LevelPlan) -> Any:
    """Return pictures of the first seed, level by level, the originals in the last column."""
    subjects = Subjects.of(model, plan, plan.seeds[0], SHOWN_PICTURES)
    number = model.tokenizer.num_tokens
    counts, shown = plan.counts(number), plan.shown(number)
    rows = []
    for end in ENDS:
        masks = [mask_of(end, counts[level], number) for level in shown]
        columns = [subjects.decode(subjects.codes, mask) for mask in masks]
        rows.append(torch.stack([*columns, subjects.images], dim=1).flatten(0, 1))
    return sheet(to_pil(torch.cat(rows)), len(shown) + 1)
