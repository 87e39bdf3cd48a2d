"""How does loss fall with the size of the language model and with the data?

Language models of four sizes learn to draw from three amounts of described pictures (descriptions,
then codes), each for as many passes. One plane through the logarithms of all says how fast, bits ~
N^-a D^-b (Kaplan et al. 2020, without a rest that no model learns: so few sizes cannot tell it;
codes with a larger rest have smaller exponents, which need not mean that they scale worse). How far
the plane misses the farthest point is told beside it: the intervals are those of the seeds alone.
More pictures are more steps, too. Each model then draws what training never held. Source:
DDT-LLaMA, the scaling study.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from ddt_llama.config import UserError, check_range
from ddt_llama.evaluation.intervals import Figure, mean
from ddt_llama.evaluation.result import watch
from ddt_llama.generation.model import Model
from ddt_llama.language import Vocabulary, backbone
from ddt_llama.language.backbone import BackboneConfig
from ddt_llama.probes.base import (
    ONE_TRAINING,
    Line,
    Outcome,
    Plot,
    as_share,
    between,
    check_seeds,
    percent,
    told,
)
from ddt_llama.probes.drawing import described, drawn
from ddt_llama.probes.learn import NANO, Course, Learned, Lesson, learn
from ddt_llama.probes.sources import text_of

EXPONENTS = ("size", "data")
LEGEND = (
    "MODEL.PARAMETERS.PICTURES.bits: held-out bits a code, of language models of so many "
    "parameters beside the rows of the vocabulary; shapes: share of the described objects that "
    "they draw; exponent: a and b of bits ~ N^-a D^-b; exponent.misfit: how far, as a share, that "
    "law misses the point it misses most; A less B: A minus B."
)
SIZES = tuple(
    replace(NANO, dim=dim, depth=depth, num_heads=4, num_kv_heads=4, mlp_dim=3 * dim)
    for dim, depth in ((64, 2), (96, 3), (128, 4), (192, 6))
)


@dataclass(frozen=True)
class ScalingPlan:
    """Shapes of the language models, amounts of described pictures, passes over them.

    Each model then draws `drawn` unseen scenes, none where 0.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    shapes: tuple[BackboneConfig, ...] = SIZES
    amounts: tuple[int, ...] = (1_000, 3_000, 9_000)
    passes: float = 2.0
    held_out: int = 512
    drawn: int = 96
    course: Course = field(default_factory=lambda: ScalingPlan.course_of_all())

    @staticmethod
    def course_of_all() -> Course:
        """Return what all sizes share; shape and steps are those of each."""
        return Course(look_back=True)

    def __post_init__(self) -> None:
        """Refuse one size or one amount, a slope needs two, and what each lesson has of its own."""
        check_seeds(self.seeds)
        check_range(self, 1, math.inf, "held_out")
        check_range(self, 0, math.inf, "drawn")
        if not 0 < self.passes < math.inf or min(self.amounts, default=0) < 1:
            raise UserError(
                f"passes {self.passes:g}, amounts {self.amounts}: allowed are passes above 0 and "
                "amounts of 1 or more"
            )
        sizes = {backbone.count_parameters(shape, Vocabulary(1, 1, 1)) for shape in self.shapes}
        for given, different in ((self.shapes, sizes), (self.amounts, set(self.amounts))):
            if not 2 <= len(given) == len(different):
                raise UserError("scaling needs two or more sizes and amounts, none of them twice")
        asked, own = self.course, ScalingPlan.course_of_all()
        for name, given, allowed in (
            ("course.shape", asked.shape, own.shape),
            ("course.train.steps", asked.train.steps, own.train.steps),
        ):
            if given != allowed:
                raise UserError(f"{name}: follows from shapes, amounts and passes; change those")

    def about(self) -> str:
        """Say in a sentence or two what is measured on what."""
        return (
            f"{len(self.seeds)} seeds of every language model, {len(self.shapes)} sizes, "
            f"{self.passes:g} passes over each amount, {self.held_out} held-out scenes, "
            f"{self.drawn} unseen scenes drawn by each. {ONE_TRAINING}"
        )

    def quick(self) -> "ScalingPlan":
        """Return a plan of two small models and hardly any data."""
        return replace(self, shapes=SIZES[:2], amounts=(128, 256), passes=1.0, held_out=64, drawn=4)

    def course_for(self, shape: BackboneConfig, amount: int) -> Course:
        """Return how one model learns."""
        train = self.course.train
        steps = max(2, round(self.passes * amount / train.samples_a_step))
        optim = replace(train.optim, warmup=min(train.optim.warmup, steps // 4))
        train = replace(train, steps=steps, sample_every=steps, optim=optim)
        return replace(self.course, shape=shape, train=train)


def scaling(plan: ScalingPlan, models: Sequence[Model], folder: Path) -> Outcome:
    """Train every size on every amount with every seed, on the codes of every model."""
    figures: dict[str, Figure] = {}
    plots: dict[str, Plot] = {}
    sentences = []
    powers: dict[str, dict[str, list[float]]] = {name: {} for name in EXPONENTS}
    passes = f"each seen {plan.passes:g} times"
    for model in models:
        done = learn_grid(plan, model, folder)
        sizes = [parameters(shape, model) for shape in plan.shapes]
        own = figures_of(plan, sizes, done)
        laws = fitted(plan, sizes, done)
        for name in EXPONENTS:
            values = [getattr(law, name) for law in laws]
            own[f"exponent.{name}"] = mean(values)
            powers[name][model.name] = values
        own["exponent.misfit"] = as_share(mean([law.misfit for law in laws]))
        figures |= {f"{model.name}.{name}": figure for name, figure in own.items()}
        plots |= plots_of(plan, sizes, done, laws, model.name)
        by_size, by_data = (figures[f"{model.name}.exponent.{x}"] for x in ("size", "data"))
        sentences.append(
            f"of {model.name} {trend(by_size, 'parameters beside the vocabulary')} and "
            f"{trend(by_data, 'pictures, ' + passes)}, a law that misses by up to "
            f"{percent(own['exponent.misfit'])}"
        )
    for name, values in powers.items():
        for pair, apart in between(values).items():
            figures[f"{pair}.exponent.{name}"] = apart
            sentences.append(f"{pair}, exponent of {name} {told(apart, 3, sign='+')}")
    return Outcome(figures, f"Bits a code {'; '.join(sentences)}.", plots)


Key = tuple[int, int, int]  # place of the shape, amount, seed


class Law(NamedTuple):
    """bits = scale N^-size D^-data; `misfit`: the largest |bits / law - 1|."""

    scale: float
    size: float
    data: float
    misfit: float

    @classmethod
    def through(cls, cells: Sequence[tuple[float, float]], bits: Sequence[float]) -> "Law":
        """Fit the bits of cells (N, D), by least squares of the logarithms.

        >>> cells = [(n, d) for n in (10, 100) for d in (8, 64)]
        >>> law = Law.through(cells, [3 * n**-0.5 * d**-0.25 for n, d in cells])
        >>> [round(x, 4) for x in law]
        [3.0, 0.5, 0.25, 0.0]
        """
        rows = np.array([(1.0, -math.log(n), -math.log(d)) for n, d in cells])
        found, *_ = np.linalg.lstsq(rows, np.log(bits), rcond=None)
        misfit = np.abs(np.exp(np.log(bits) - rows @ found) - 1).max()
        scale, size, data = found.tolist()
        return cls(math.exp(scale), size, data, float(misfit))

    def bits(self, size: float, data: float) -> float:
        """Return what the law says of N and D."""
        return self.scale * size**-self.size * data**-self.data


def learn_grid(plan: ScalingPlan, model: Model, folder: Path) -> dict[Key, Learned]:
    """Carry out every lesson on the codes of one model."""
    text = text_of([model])
    count = max(plan.amounts) + plan.held_out
    everything = described(model.tokenizer, text, model.name, count, plan.held_out, folder)

    def examine(pupil: Any, vocabulary: Vocabulary) -> dict[str, float]:
        if not plan.drawn:
            return {}
        steps = model.settings.steps
        share = drawn(pupil, vocabulary, model.tokenizer, text, plan.drawn, steps)
        return {"shapes": share}

    done: dict[Key, Learned] = {}
    grid = list(product(plan.seeds, range(len(plan.shapes)), plan.amounts))
    for seed, place, amount in watch(grid, f"lessons of {model.name}"):
        part = replace(everything, train=everything.train[:amount])
        course = plan.course_for(plan.shapes[place], amount)
        lesson = Lesson(course, model.name, part.fingerprint(), seed=seed)
        where = folder / "lessons" / f"{model.name}-{place}-{amount}-{seed}"
        done[place, amount, seed] = learn(lesson, part, where, examine)
    return done


def parameters(shape: BackboneConfig, model: Model) -> int:
    """Return the parameters of a lesson's model that are no rows of the vocabulary."""
    vocabulary = Vocabulary(1, model.tokenizer.codebook_size, model.tokenizer.num_tokens)
    rows = vocabulary.size * shape.dim * (1 if shape.tied else 2)
    return backbone.count_parameters(shape, vocabulary) - rows


def figures_of(
    plan: ScalingPlan, sizes: Sequence[int], done: Mapping[Key, Learned]
) -> dict[str, Figure]:
    """Return bits a code and share of described objects drawn of every size and amount."""
    figures = {}
    for place, amount in product(range(len(sizes)), plan.amounts):
        runs = [done[place, amount, seed] for seed in plan.seeds]
        name = f"{sizes[place]}.{amount}"
        figures[f"{name}.bits"] = mean([run.bits for run in runs])
        if plan.drawn:
            figures[f"{name}.shapes"] = as_share(mean([run.scores["shapes"] for run in runs]))
    return figures


def fitted(plan: ScalingPlan, sizes: Sequence[int], done: Mapping[Key, Learned]) -> list[Law]:
    """Return the law through all sizes and amounts, seed by seed."""
    grid = list(product(range(len(sizes)), plan.amounts))
    cells = [(sizes[place], amount) for place, amount in grid]
    return [
        Law.through(cells, [done[place, amount, seed].bits for place, amount in grid])
        for seed in plan.seeds
    ]


def trend(power: Figure, what: str) -> str:
    """Say how bits go with an amount, as far as the interval of the exponent allows."""
    way = "fall" if power.low > 0 else "rise" if power.high < 0 else "are not seen to change"
    return f"{way} with {what} (exponent {told(power, 3)})"


def plots_of(
    plan: ScalingPlan,
    sizes: Sequence[int],
    done: Mapping[Key, Learned],
    laws: Sequence[Law],
    name: str,
) -> dict[str, Plot]:
    """Return bits, beside them the mean law, and score over the parameters, a curve an amount."""

    def over_sizes(value: Callable[[Learned], float]) -> dict[str, list[Line]]:
        return {
            f"{amount} pictures": [
                [(size, value(done[place, amount, seed])) for place, size in enumerate(sizes)]
                for seed in plan.seeds
            ]
            for amount in plan.amounts
        }

    x = "parameters beside the vocabulary"
    loss = Plot.of_seeds(over_sizes(lambda run: run.bits), x, "bits a code")
    ends = [float(min(sizes)), float(max(sizes))]
    said = {
        f"{amount} pictures": (
            ends,
            [fmean(law.bits(size, amount) for law in laws) for size in ends],
        )
        for amount in plan.amounts
    }
    plots = {f"{name}, loss (thin: the law)": loss._replace(log="xy", laws=said)}
    if plan.drawn:
        score = over_sizes(lambda run: run.scores["shapes"])
        drawn = Plot.of_seeds(score, x, "share of described objects drawn")
        plots[f"{name}, drawn"] = drawn._replace(log="x")
    return plots
