"""Does the order of the tokens matter? The paper's first claim, with what it leaves open.

The same small language model learns the same sequences three times: in native order, under one
fixed permutation, and under a fresh one for every sequence. Where the order carries structure that
a causal model lives on (text, the paper says DDT tokens), a fixed permutation costs bits; where
tokens stand beside each other without order (spatial tokens) it costs little. The fresh one says
what order is worth at all: it hides which symbol stands where. Source: DDT-LLaMA.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

from ddt_llama.evaluation.intervals import Figure, mean
from ddt_llama.probes.base import Outcome
from ddt_llama.probes.learn import Learned, Plan, learn_all
from ddt_llama.probes.orders import Order
from ddt_llama.probes.sequences import Sequences
from ddt_llama.reports.plots import Curves

ORDERS: tuple[Order, ...] = ("native", "fixed", "fresh")


def shuffle(plan: Plan, sources: Sequence[Sequences], folder: Path) -> Outcome:
    """Learn every source in every order with every seed, and compare."""
    done = learn_all(plan, sources, ORDERS, folder)
    figures: dict[str, Figure] = {}
    for one in sources:
        figures |= gaps(one, {key[1:]: value for key, value in done.items() if key[0] == one.name})
    figures |= between(sources, done, plan.seeds)
    return Outcome(figures, verdict(sources, figures), plots_of(sources, done, plan.seeds[0]))


def gaps(source: Sequences, learned: Mapping[tuple[Order, int], Learned]) -> dict[str, Figure]:
    """Return bits a symbol in every order, and what an order costs beside the native one.

    Gaps are taken seed by seed, which share weights and data. `per_bit` divides the bits that the
    order costs a whole sequence by the bits of an image.
    """
    seeds = sorted({seed for _, seed in learned})
    figures = {}
    for order in ORDERS:
        values = [learned[order, seed].bits for seed in seeds]
        figures[f"{source.name}.{order}"] = mean(values)
    for order in ORDERS[1:]:
        gap = [learned[order, seed].bits - learned["native", seed].bits for seed in seeds]
        figures[f"{source.name}.{order}.gap"] = mean(gap)
        native = [learned["native", seed].bits for seed in seeds]
        shares = [g / n for g, n in zip(gap, native, strict=True)]
        figures[f"{source.name}.{order}.gap_share"] = mean(shares)
        if source.bits is not None:
            scale = source.mean_length / source.bits
            figures[f"{source.name}.{order}.per_bit"] = mean([scale * g for g in gap])
    return figures


def between(
    sources: Sequence[Sequences],
    learned: Mapping[tuple[str, Order, int], Learned],
    seeds: Sequence[int],
) -> dict[str, Figure]:
    """Return how much more a fixed permutation costs one source of pictures than another.

    In bits per bit of an image, seed by seed, for every two of them.
    """

    def costs(source: Sequences, bits: float) -> list[float]:
        scale = source.mean_length / bits
        runs = [[learned[source.name, order, seed] for order in ORDERS[:2]] for seed in seeds]
        return [scale * (fixed.bits - native.bits) for native, fixed in runs]

    pictures = {one.name: costs(one, one.bits) for one in sources if one.bits is not None}
    return {
        f"{a} less {b}.fixed.per_bit": mean(
            [x - y for x, y in zip(pictures[a], pictures[b], strict=True)]
        )
        for a, b in combinations(pictures, 2)
    }


def verdict(sources: Sequence[Sequences], figures: Mapping[str, Figure]) -> str:
    """Say in one sentence what a fixed permutation costs each source."""
    told = []
    for source in sources:
        gap, share = (figures[f"{source.name}.fixed.{name}"] for name in ("gap", "gap_share"))
        told.append(
            f"{source.name} {gap.value:.2f} bits a token ({gap.low:.2f} to {gap.high:.2f}; "
            f"{100 * share.value:.0f} % of its {figures[f'{source.name}.native'].value:.2f})"
        )
    return f"One fixed permutation costs {', '.join(told)}."


def plots_of(
    sources: Sequence[Sequences],
    learned: Mapping[tuple[str, Order, int], Learned],
    seed: int,
) -> dict[str, Curves]:
    """Return a plot a source: held-out bits a token over the sequences seen, one seed."""
    plots: dict[str, Curves] = {}
    for source in sources:
        curves: Curves = {}
        for order in ORDERS:
            points = learned[source.name, order, seed].curve
            curves[order] = ([float(x) for x, _ in points], [y for _, y in points])
        plots[f"{source.name}, bits a token"] = curves
    return plots
