"""How uncertain is the next token, along the sequence? Selftok's picture of a proper order.

One model an order learns the same sequences natively, with stride 2 and 3, and reversed. Where the
tokens form a chain, each telling what the next needs to know, uncertainty falls along the sequence,
and within each of the two or three passes of a stride. Source: Selftok-Zero, the figure of entropy
by position. Late places of captions are those of long captions only. Codes that are others' read
from the other end are not learned twice: they are those, reversed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from ddt_llama.evaluation.intervals import Figure, mean
from ddt_llama.probes.base import Outcome, Plot, between, closed, told
from ddt_llama.probes.learn import Learned, Plan, learn_all, smoothed
from ddt_llama.probes.orders import Order
from ddt_llama.probes.sequences import Sequences
from ddt_llama.reports.plots import Curves

ORDERS: tuple[Order, ...] = ("native", "stride-2", "stride-3", "reversed")
SEGMENTS: Mapping[Order, int] = {"native": 1, "stride-2": 2, "stride-3": 3, "reversed": 1}


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
        curves: Curves = {}
        for order in orders_of(one):
            rows = [done[one.name, order, seed].entropy for seed in plan.seeds]
            name = f"{one.name}.{order}"
            figures[f"{name}.entropy"] = mean([float(np.mean(row)) for row in rows])
            falls = [slope(row, SEGMENTS[order]) for row in rows]
            figures[f"{name}.slope"] = mean(falls)
            if order == "native" and one.bits is not None:
                slopes[one.name] = falls
            together = smoothed(np.mean(rows, axis=0).tolist(), max(1, len(rows[0]) // 32))
            width = len(rows[0]) / len(together)
            curves[order] = ([width * (i + 0.5) for i in range(len(together))], together)
        plots[f"{one.name}, mean of {len(plan.seeds)} seeds"] = Plot(
            curves, "step of the sequence", "entropy of the prediction in bits"
        )
    apart = between(slopes)
    figures |= {f"{name}.native.slope": figure for name, figure in apart.items()}
    return Outcome(figures, verdict(plan, sources, figures, apart), plots)


def without_mirrors(sources: Sequence[Sequences]) -> list[Sequences]:
    """Return the sources that are not another one before them, read from the end."""
    kept: list[Sequences] = []
    for one in sources:
        if not any(mirror(one, other) for other in kept):
            kept.append(one)
    return kept


def mirror(one: Sequences, other: Sequences) -> bool:
    """Say whether two sources are the same sequences, read from either end."""
    return all(
        len(rows) == len(others)
        and all(torch.equal(a, b.flip(0)) for a, b in zip(rows, others, strict=True))
        for rows, others in ((one.held_out, other.held_out), (one.train, other.train))
    )


def orders_of(source: Sequences) -> tuple[Order, ...]:
    """Return all orders for sequences of one length, for others the native one.

    The passes of a stride end elsewhere in every sequence of another length.
    """
    return ORDERS if source.even else ORDERS[:1]


def slope(values: Sequence[float], segments: int) -> float:
    """Return how many bits entropy rises from the begin to the end of a segment, mean of all.

    Least squares within each of `segments` equal parts; negative where it falls. The first symbol
    of a sequence, of which nothing can be known, is left out.
    """
    rises = []
    for number, part in enumerate(np.array_split(np.asarray(values), segments)):
        kept = part[1:] if number == 0 else part
        if len(kept) > 1:
            at = np.linspace(-0.5, 0.5, len(kept))
            rises.append(float((at * kept).sum() / (at * at).sum()))
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
        way = "falls" if one.high < 0 else "rises" if one.low > 0 else "neither falls nor rises"
        words = f"of {source.name} {way} ({told(one, sign='+')} bits from begin to end"
        strides = [order for order in orders_of(source) if order.startswith("stride")]
        if strides:
            slopes = [told(figures[f"{source.name}.{one}.slope"], sign="+") for one in strides]
            words += f"; within the passes of strides 2 and 3 {' and '.join(slopes)}"
        each.append(f"{words})")
    sentence = f"After {plan.lesson.effort()} the entropy of the next token {'; '.join(each)}"
    return closed(sentence, apart, what="slopes: ")
