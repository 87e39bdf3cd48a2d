"""Does the order of the tokens matter? The paper's first claim, with what it leaves open.

The same small language model learns the same sequences three times: in native order, under one
fixed permutation, and under a fresh one for every sequence. By the chain rule a fixed permutation
leaves as many bits in all: what it costs is how much harder a causal model learns them with so much
training. The paper says that it costs DDT tokens much, as text, and spatial tokens little. The
fresh one says what order is worth at all: it hides which symbol stands where. Source: DDT-LLaMA.

Texts are packed into rows of one length, so that one permutation means the same for all of them.
Where one model's codes come in several native orders, the shuffled ones are learned once: any
permutation of one is as good a permutation of another.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from ddt_llama.evaluation.intervals import Figure, mean
from ddt_llama.probes.base import Outcome, Plot, between, closed, percent, told
from ddt_llama.probes.learn import Learned, Plan, learn_all
from ddt_llama.probes.orders import Order
from ddt_llama.probes.sequences import Sequences, match, measured_on, packed
from ddt_llama.probes.sources import TIMESTEPS

ORDERS: tuple[Order, ...] = ("native", "fixed", "fresh")
NEAR_HALF = 0.05  # of a training: a point so far from its middle is none of it
ROW = 64  # symbols of a row of packed text, where no picture says how many
LEGEND = (
    "SOURCE.ORDER: held-out bits a token, learned in that order; gap: bits a token more than in "
    "native order, seed by seed; half_way: the same after half of the training; gap_share: the gap "
    "over the bits in native order; per_bit: the extra bits of a sequence over the bits of an "
    "image; A less B: A minus B. The bare name of a model is the order in which its language model "
    "reads, 'coarse to fine' and 'fine to coarse' are the order of the timesteps. The paper "
    "expects large gaps of DDT tokens and captions, and a small one of spatial tokens."
)
Lessons = Mapping[tuple[str, Order, int], Learned]


def shuffle(plan: Plan, sources: Sequence[Sequences], folder: Path) -> Outcome:
    """Learn every source in every order with every seed, and compare."""
    row = max((len(one.held_out[0]) for one in sources if one.even), default=ROW)
    sources = [one if one.even else packed(one, row) for one in sources]
    done: dict[tuple[str, Order, int], Learned] = {}
    for one in sources:
        twin = next(
            other for other in sources if match(one, other, anagrams)
        )  # at the latest itself
        done |= learn_all(plan, [one], ORDERS if twin is one else ORDERS[:1], folder)
        for order, seed in product(ORDERS[1:], plan.seeds):
            done[one.name, order, seed] = done[twin.name, order, seed]
    figures: dict[str, Figure] = {}
    for one in sources:
        figures |= gaps(one, done, plan.seeds)
    apart = between(
        {
            one.name: per_bit(one, one.bits, costs(one, done, plan.seeds))
            for one in sources
            if one.bits is not None
        }
    )
    figures |= {f"{name}.fixed.per_bit": figure for name, figure in apart.items()}
    of_all = between({one.name: shares(one, done, plan.seeds) for one in sources})
    figures |= {f"{name}.fixed.gap_share": figure for name, figure in of_all.items()}
    others = {
        f"{a} less {b}": apart[f"{a} less {b}"]
        for a, b in combinations([one.name for one in sources if one.bits is not None], 2)
        if owner(a) != owner(b)
    }
    sentence = verdict(plan, sources, figures, others)
    plots = plots_of(sources, done, plan.seeds)
    return Outcome(figures, sentence, plots, notes=measured_on(sources))


def owner(source: str) -> str:
    """Return the name of the model whose codes a source holds, in whatever order.

    >>> owner("my nano coarse to fine"), owner("my nano")
    ('my nano', 'my nano')
    """
    for order in TIMESTEPS:
        source = source.removesuffix(f" {order}")
    return source


def anagrams(one: Int[Tensor, " _"], other: Int[Tensor, " _"]) -> bool:
    """Say whether two sequences are the same but for the order of their symbols."""
    return torch.equal(one.sort().values, other.sort().values)


def costs(
    source: Sequences, done: Lessons, seeds: Sequence[int], order: Order = "fixed", point: int = -1
) -> list[float]:
    """Return what an order costs beside the native one in bits a symbol, seed by seed.

    Seeds share weights and data. `point` of the curve: -1 is the end of training.
    """
    curves = [[done[source.name, one, seed].curve for one in ("native", order)] for seed in seeds]
    return [other[point][1] - native[point][1] for native, other in curves]


def shares(
    source: Sequences, done: Lessons, seeds: Sequence[int], order: Order = "fixed"
) -> list[float]:
    """Return what an order costs over the bits in native order, seed by seed."""
    native = [done[source.name, "native", seed].bits for seed in seeds]
    return [gap / one for gap, one in zip(costs(source, done, seeds, order), native, strict=True)]


def per_bit(source: Sequences, bits: float, costs: Sequence[float]) -> list[float]:
    """Return the bits that an order costs a whole sequence, over those of an image."""
    return [source.mean_length / bits * cost for cost in costs]


def gaps(source: Sequences, done: Lessons, seeds: Sequence[int]) -> dict[str, Figure]:
    """Return bits a symbol in every order, and what an order costs beside the native one.

    `half_way` is the cost after half of the training, where it was measured near there.
    """
    figures = {}
    for order in ORDERS:
        figures[f"{source.name}.{order}"] = mean(
            [done[source.name, order, seed].bits for seed in seeds]
        )
    seen = [sequences for sequences, _ in done[source.name, "native", seeds[0]].curve]
    middle = min(range(len(seen)), key=lambda point: abs(seen[point] - seen[-1] / 2))
    for order in ORDERS[1:]:
        gap = costs(source, done, seeds, order)
        figures[f"{source.name}.{order}.gap"] = mean(gap)
        if abs(seen[middle] / seen[-1] - 0.5) < NEAR_HALF:
            figures[f"{source.name}.{order}.half_way"] = mean(
                costs(source, done, seeds, order, middle)
            )
        figures[f"{source.name}.{order}.gap_share"] = mean(shares(source, done, seeds, order))
        if source.bits is not None:
            figures[f"{source.name}.{order}.per_bit"] = mean(per_bit(source, source.bits, gap))
    return figures


def verdict(
    plan: Plan,
    sources: Sequence[Sequences],
    figures: Mapping[str, Figure],
    apart: Mapping[str, Figure],
) -> str:
    """Say in a sentence what a fixed permutation costs each source, and how they differ."""
    each = [
        f"{source.name} {told(figures[f'{source.name}.fixed.gap'])} bits a token, "
        f"{percent(figures[f'{source.name}.fixed.gap_share'])} of what it takes"
        for source in sources
    ]
    sentence = f"After {plan.course.effort()} one fixed permutation costs {'; '.join(each)}"
    return closed(sentence, apart, 3, "per bit of an image ")


def plots_of(sources: Sequence[Sequences], done: Lessons, seeds: Sequence[int]) -> dict[str, Plot]:
    """Return held-out bits a token over the sequences seen, and what one permutation costs."""
    x = "sequences seen"
    plots: dict[str, Plot] = {}
    cost = {}
    for source in sources:
        lines = {
            order: [done[source.name, order, seed].curve for seed in seeds] for order in ORDERS
        }
        plots[f"{source.name}, {len(seeds)} seeds"] = Plot.of_seeds(lines, x, "bits a token")
        cost[source.name] = [
            [(seen, other - one) for (seen, one), (_, other) in zip(native, fixed, strict=True)]
            for native, fixed in zip(lines["native"], lines["fixed"], strict=True)
        ]
    title = f"what one fixed permutation costs, {len(seeds)} seeds"
    return {title: Plot.of_seeds(cost, x, "bits a token"), **plots}
