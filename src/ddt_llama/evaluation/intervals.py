"""Figures with 95 % intervals: shares, means, means of shares, and statistics of counts.

Every published number of this project is a `Figure`. The method is named in each function; all are
closed form, so a figure is a pure function of the outcomes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from ddt_llama.config import UserError

Z = 1.959963984540054  # 97.5 % quantile of the standard normal


@dataclass(frozen=True)
class Figure:
    """A measured value and its 95 % interval."""

    value: float
    low: float
    high: float


def setting(value: int | float) -> Figure:
    """Record a known number (a count, a guidance scale) beside the figures: no uncertainty."""
    return Figure(float(value), float(value), float(value))


def wilson(share: float, count: int | float) -> Figure:
    """Bound a share of `count` independent trials by Wilson's score interval (1927).

    `count` may be fractional (an effective sample size). With no trials the interval is [0, 1].
    """
    if count <= 0:
        return Figure(math.nan, 0.0, 1.0)
    scale = 1 + Z**2 / count
    centre = (share + Z**2 / (2 * count)) / scale
    half = Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2)) / scale
    # Rounding may put a bound on the wrong side of a share of exactly 0 or 1.
    return Figure(share, max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share)))


def proportion(outcomes: Sequence[bool]) -> Figure:
    """Bound the share of true among independent outcomes (Wilson)."""
    if not outcomes:
        return wilson(0.0, 0)
    return wilson(sum(map(bool, outcomes)) / len(outcomes), len(outcomes))


def clustered_proportion(clusters: Sequence[Sequence[bool]]) -> Figure:
    """Bound a share where outcomes come in clusters (images drawn from one prompt).

    The value is the mean of the cluster means. The interval is Wilson's at the effective sample
    size p (1 - p) / Var, where Var is the variance of the mean over clusters: images of one prompt
    tend to fail together, and counting them as independent would make the interval too narrow
    (Korn and Graubard 1998). The effective size is kept between the number of clusters and the
    number of outcomes; at 0 or 1, where Var says nothing, it is the number of clusters.
    """
    means = [sum(map(bool, cluster)) / len(cluster) for cluster in clusters if cluster]
    if not means:
        return wilson(0.0, 0)
    share = sum(means) / len(means)
    total = sum(map(len, clusters))
    if len(means) == 1 or share in (0.0, 1.0):
        return wilson(share, len(means))
    variance = sum((m - share) ** 2 for m in means) / (len(means) - 1) / len(means)
    size = total if variance == 0 else share * (1 - share) / variance
    return wilson(share, min(max(size, len(means)), total))


def mean(values: Sequence[float], comparisons: int = 1) -> Figure:
    """Bound the mean of independent values by Student's t (normal for many values).

    With `comparisons` > 1 the interval is wider, so that so many hold together (Bonferroni).
    """
    if not values:
        return Figure(math.nan, math.nan, math.nan)
    from scipy.special import stdtrit

    count = len(values)
    centre = math.fsum(values) / count
    if count == 1:
        return Figure(centre, -math.inf, math.inf)
    variance = math.fsum((v - centre) ** 2 for v in values) / (count - 1)
    half = float(stdtrit(count - 1, 1 - 0.025 / comparisons)) * math.sqrt(variance / count)
    return Figure(centre, centre - half, centre + half)


def contrasts(
    table: Mapping[str, Sequence[float]], bases: Mapping[str, str], comparisons: int = 1
) -> dict[str, Figure]:
    """Bound what rows of `bases` have more than their bases, of values paired by column (seed).

    A two-way analysis of variance: a value is the sum of what its row, its column and chance give,
    and chance scatters alike in all rows, which together say by how much, whatever base they share:
    half = t sqrt(2 MSE / columns), (rows - 1)(columns - 1) degrees. A row that equals its base in
    every column is the same by construction: it has no width, and no say. `comparisons` as in
    `mean`.
    """
    from scipy.special import stdtrit

    same = {name for name, base in bases.items() if list(table[name]) == list(table[base])}
    rows = [list(row) for name, row in table.items() if name not in same]
    seeds, half = len(rows[0]), math.inf
    degrees = (len(rows) - 1) * (seeds - 1)
    if degrees:
        columns = [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]
        whole = math.fsum(columns) / seeds
        rest = [
            value - math.fsum(row) / seeds - column + whole
            for row in rows
            for value, column in zip(row, columns, strict=True)
        ]
        error = math.fsum(one * one for one in rest) / degrees
        half = float(stdtrit(degrees, 1 - 0.025 / comparisons)) * math.sqrt(2 * error / seeds)
    found = {}
    for name, base in bases.items():
        pairs = zip(table[name], table[base], strict=True)
        more = math.fsum(one - other for one, other in pairs) / seeds
        width = 0.0 if name in same else half
        found[name] = Figure(more, more - width, more + width)
    return found


def mean_of(figures: Sequence[Figure]) -> Figure:
    """Combine independent figures with equal weight (square-and-add, Zou and Donner 2008).

    low = mean - sqrt(sum of (value_i - low_i)^2) / n, and likewise above.
    """
    count = len(figures)
    if count == 0:
        return Figure(math.nan, math.nan, math.nan)
    centre = math.fsum(f.value for f in figures) / count
    below = math.sqrt(math.fsum((f.value - f.low) ** 2 for f in figures)) / count
    above = math.sqrt(math.fsum((f.high - f.value) ** 2 for f in figures)) / count
    return Figure(centre, centre - below, centre + above)


def difference(one: Figure, other: Figure) -> Figure:
    """Bound `one` minus `other` by square-and-add (Newcombe 1998, method 10; Zou and Donner 2008).

    Right for independent figures; figures of the same tasks vary together, and theirs is too wide.
    """
    less = one.value - other.value
    below = math.hypot(one.value - one.low, other.high - other.value)
    above = math.hypot(one.high - one.value, other.value - other.low)
    return Figure(less, less - below, less + above)


def jackknife(
    counts: Int[Tensor, "g v"], statistic: Callable[[Int[Tensor, " v"]], float]
) -> Figure:
    """Bound a statistic of summed counts by the delete-one-group jackknife over `g` groups.

    Var = (g - 1) / g * sum over groups of (statistic without the group - mean of those)^2, then
    normal. A bootstrap would be biased for "entries used": a resample always misses some.
    """
    groups = counts.shape[0]
    total = counts.sum(0)
    value = statistic(total)
    if groups < 2:
        raise UserError(f"a jackknife needs at least 2 groups, got {groups}; give more images")
    without = [statistic(total - counts[g]) for g in range(groups)]
    centre = math.fsum(without) / groups
    variance = (groups - 1) / groups * math.fsum((w - centre) ** 2 for w in without)
    half = Z * math.sqrt(variance)
    return Figure(value, value - half, value + half)


def flat(figures: Mapping[str, Figure]) -> dict[str, float]:
    """Flatten figures to dotted keys: `name`, `name.low`, `name.high`."""
    rows: dict[str, float] = {}
    for name, figure in figures.items():
        rows |= {name: figure.value, f"{name}.low": figure.low, f"{name}.high": figure.high}
    return rows
