"""How uncertain is the next token, along the sequence? Selftok's picture of a proper order.

One model an order learns the same sequences natively, with stride 2 and 3, and reversed. Where the
tokens form a chain, each telling what the next needs to know, uncertainty falls along the sequence,
and within each of the two or three passes of a stride. Source: Selftok-Zero, the figure of entropy
by position. Entropy is that of the model's own prediction; how right it was, the surprise, is drawn
beside it, and so is the entropy of each place alone, without what stands before: tokens that know
nothing of each other may fall in that, too. Late places of captions are those of long captions
only; each place counts as often as there is a token. Codes that are others' read from the other end
are not learned twice: they are those, reversed.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from ddt_llama.evaluation.intervals import Figure, mean, setting
from ddt_llama.probes.base import Outcome, Plot, between, closed, told
from ddt_llama.probes.learn import Learned, Plan, learn_all, smoothed
from ddt_llama.probes.orders import Order
from ddt_llama.probes.sequences import Sequences, match, measured_on

ORDERS: tuple[Order, ...] = ("native", "stride-2", "stride-3", "reversed")
SEGMENTS: Mapping[Order, int] = {"native": 1, "stride-2": 2, "stride-3": 3, "reversed": 1}
LEGEND = (
    "SOURCE.ORDER.entropy: of the model's prediction in bits, mean of all tokens; bits: held-out "
    "bits a token, so how right it was; slope: bits that entropy rises from the begin to the end "
    "of the sequence, or of each pass of a stride, and falls where negative; alone: of each place "
    "without what stands before; A less B: A minus B."
)


def entropy(plan: Plan, sources: Sequence[Sequences], folder: Path) -> Outcome:
    """Learn every source in its orders, and see how entropy runs along it."""
    sources = without_mirrors(sources)
    done: dict[tuple[str, Order, int], Learned] = {}
    for one in sources:
        done |= learn_all(plan, [one], orders_of(one), folder)
    figures: dict[str, Figure] = {}
    plots: dict[str, Plot] = {}
    slopes: dict[str, list[float]] = {}
    for one in sources:
        entropies, surprises = {}, {}
        often = tokens_at(one)
        for order in orders_of(one):
            runs = [done[one.name, order, seed] for seed in plan.seeds]
            name = f"{one.name}.{order}"
            figures[f"{name}.entropy"] = mean(
                [float(np.average(run.entropy, weights=often)) for run in runs]
            )
            figures[f"{name}.bits"] = mean([run.bits for run in runs])
            falls = [slope(run.entropy, often, SEGMENTS[order]) for run in runs]
            figures[f"{name}.slope"] = mean(falls)
            if order == "native" and one.bits is not None:
                slopes[one.name] = falls
            entropies[order] = [along(run.entropy) for run in runs]
            surprises[order] = [along(run.by_place) for run in runs]
        by_itself = alone(one)[: len(often)]
        often = often[: len(by_itself)]
        entropies["each place alone"] = [along(by_itself)]
        figures[f"{one.name}.alone.entropy"] = setting(float(np.average(by_itself, weights=often)))
        figures[f"{one.name}.alone.slope"] = setting(slope(by_itself, often, 1))
        x, many = "step of the sequence", f"{len(plan.seeds)} seeds"
        y = "entropy of the prediction in bits"
        plots[f"{one.name}, {many}"] = Plot.of_seeds(entropies, x, y)
        plots[f"{one.name}, surprise, {many}"] = Plot.of_seeds(surprises, x, "bits a token")
    apart = between(slopes)
    figures |= {f"{name}.native.slope": figure for name, figure in apart.items()}
    sentence = verdict(plan, sources, figures, apart)
    return Outcome(figures, sentence, plots, notes=measured_on(sources))


def tokens_at(source: Sequences) -> list[int]:
    """Return how many held-out sequences reach each step."""
    longest = max(map(len, source.held_out))
    return [sum(len(row) > step for row in source.held_out) for step in range(longest)]


def alone(source: Sequences) -> list[float]:
    """Return the entropy in bits of the symbols at each place, counted over the training.

    Counts of n symbols show too little of it, about (kinds - 1) / 2n nats, which are added (Miller
    1955).
    """
    found = []
    for place in range(max(map(len, source.train))):
        seen = torch.stack([row[place] for row in source.train if len(row) > place])
        counts = torch.bincount(seen).double()
        lacking = (int((counts > 0).sum()) - 1) / (2 * len(seen))
        nats = float(torch.special.entr(counts / len(seen)).sum()) + lacking
        found.append(nats / math.log(2))
    return found


def mirror(one: Int[Tensor, " _"], other: Int[Tensor, " _"]) -> bool:
    """Say whether a sequence is another, read from the end."""
    return torch.equal(one, other.flip(0))


def without_mirrors(sources: Sequence[Sequences]) -> list[Sequences]:
    """Return the sources that are not another one before them, read from the end."""
    kept: list[Sequences] = []
    for one in sources:
        if not any(match(one, other, mirror) for other in kept):
            kept.append(one)
    return kept


def orders_of(source: Sequences) -> tuple[Order, ...]:
    """Return all orders for sequences of one length, for others the native one.

    The passes of a stride end elsewhere in every sequence of another length.
    """
    return ORDERS if source.even else ORDERS[:1]


def along(row: Sequence[float]) -> list[tuple[float, float]]:
    """Return a row by step, smoothed to some 32 points."""
    together = smoothed(row, max(1, len(row) // 32))
    width = len(row) / len(together)
    return [(width * (place + 0.5), value) for place, value in enumerate(together)]


def slope(values: Sequence[float], often: Sequence[int], segments: int) -> float:
    """Return how many bits entropy rises from the begin to the end of a segment, mean of all.

    Least squares within each of `segments` equal parts, a step counting as `often` as there is a
    token; negative where it falls. The first symbol of a sequence, of which nothing can be known,
    is left out.

    >>> slope([9.0, 1.0, 2.0, 3.0], [4, 4, 4, 4], 1)
    2.0
    """
    rises = []
    parts = np.array_split(np.column_stack([values, often]), segments)
    for number, part in enumerate(parts):
        kept, weight = (part[1:] if number == 0 else part).T
        if len(kept) > 1:
            at = np.linspace(-0.5, 0.5, len(kept))
            at = at - np.average(at, weights=weight)
            rises.append(float((weight * at * kept).sum() / (weight * at * at).sum()))
    return float(np.mean(rises)) if rises else 0.0


def verdict(
    plan: Plan,
    sources: Sequence[Sequences],
    figures: Mapping[str, Figure],
    apart: Mapping[str, Figure],
) -> str:
    """Say in a sentence whether entropy falls along the native order, and the passes of strides."""
    each = []
    for source in sources:
        one = figures[f"{source.name}.native.slope"]
        way = "falls" if one.high < 0 else "rises" if one.low > 0 else "is not seen to fall or rise"
        by_itself = figures[f"{source.name}.alone.slope"].value
        words = (
            f"of {source.name} {way} ({told(one, sign='+')} bits from begin to end, that of each "
            f"place alone {by_itself:+.2f}"
        )
        strides = [order for order in orders_of(source) if order.startswith("stride")]
        if strides:
            slopes = [told(figures[f"{source.name}.{one}.slope"], sign="+") for one in strides]
            words += (
                f"; within the passes of strides 2 and 3 {' and '.join(slopes)}; from the other "
            )
            words += f"end {told(figures[f'{source.name}.reversed.slope'], sign='+')}"
        each.append(f"{words})")
    sentence = f"After {plan.course.effort()} the entropy of the next token {'; '.join(each)}"
    return closed(sentence, apart, what="slopes: ")
