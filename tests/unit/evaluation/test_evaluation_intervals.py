"""Intervals against published values, limits and simulated coverage."""

import math
import random
import statistics

import pytest
import torch

from ddt_llama.config import UserError
from ddt_llama.evaluation.intervals import (
    Figure,
    clustered_proportion,
    contrasts,
    difference,
    flat,
    jackknife,
    mean,
    mean_of,
    proportion,
    setting,
    wilson,
)


def test_wilson_matches_published_values() -> None:
    # Newcombe 1998, table I, method 3: 81/263, 15/148, 0/20, 1/29.
    for successes, count, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        figure = proportion([i < successes for i in range(count)])
        assert figure.value == successes / count
        assert (figure.low, figure.high) == pytest.approx((low, high), abs=6e-5)


def test_wilson_is_symmetric_and_shrinks_with_the_count() -> None:
    few, many = wilson(0.3, 50), wilson(0.3, 5000)
    mirrored = wilson(0.7, 50)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((few.low, few.high))
    assert few.low < many.low < 0.3 < many.high < few.high


def test_nothing_measured_knows_nothing() -> None:
    figure = proportion([])
    assert math.isnan(figure.value)
    assert (figure.low, figure.high) == (0.0, 1.0)
    assert math.isnan(mean([]).low)


def test_clusters_of_one_are_independent_trials() -> None:
    outcomes = [i % 3 == 0 for i in range(90)]
    clusters = [[outcome] for outcome in outcomes]
    assert clustered_proportion(clusters) == proportion(outcomes)


def test_clusters_of_equal_outcomes_count_once() -> None:
    first = [i % 3 == 0 for i in range(90)]
    figure = clustered_proportion([[outcome] * 4 for outcome in first])
    assert figure.low == pytest.approx(proportion(first).low, abs=2e-3)
    assert figure.high == pytest.approx(proportion(first).high, abs=2e-3)


def test_clusters_that_all_succeed_count_once() -> None:
    assert clustered_proportion([[True] * 4] * 25) == wilson(1.0, 25)


def test_clustered_value_weighs_clusters_equally() -> None:
    assert clustered_proportion([[True], [False, False, False]]).value == 0.5


def test_clustered_interval_covers_the_truth() -> None:
    """Prompts of easiness drawn from {0.4, 1.0}: the truth is 0.7."""
    rng = random.Random(0)
    inside = 0
    for _ in range(600):
        easiness = [rng.choice((0.4, 1.0)) for _ in range(60)]
        clusters = [[rng.random() < easy for _ in range(4)] for easy in easiness]
        figure = clustered_proportion(clusters)
        inside += figure.low <= 0.7 <= figure.high
    assert 0.92 <= inside / 600 <= 0.98


def test_mean_is_students_t() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    half = 2.7764451 * statistics.stdev(values) / math.sqrt(5)
    figure = mean(values)
    assert (figure.value, figure.low, figure.high) == pytest.approx((3, 3 - half, 3 + half))
    assert mean([2.0]).high == math.inf
    both = 3.4954059 * statistics.stdev(values) / math.sqrt(5)  # t of 4 at 1 - 0.025 / 2
    assert mean(values, comparisons=2).high == pytest.approx(3 + both)


def test_contrasts_take_chance_from_all_rows() -> None:
    table = {"base": [1.0, 2.0, 6.0], "a": [3.0, 3.0, 9.0], "same": [1.0, 2.0, 6.0]}
    found = contrasts(table, {"a": "base", "same": "base"})
    # Of two rows it is the interval of the paired differences 2, 1, 3.
    assert found["a"].value == 2.0
    assert found["a"].high == pytest.approx(mean([2.0, 1.0, 3.0]).high)
    assert found["same"] == Figure(0.0, 0.0, 0.0)
    more = {**table, "b": [2.0, 4.0, 7.0]}
    # A row like its base has no say: three rows, t of 4 degrees.
    half = 2.776445 * math.sqrt(2 * _mse([more["base"], more["a"], more["b"]]) / 3)
    assert contrasts(more, {"a": "base", "same": "base"})["a"].high == pytest.approx(2 + half)
    assert contrasts({"a": [1.0], "b": [2.0]}, {"b": "a"})["b"].high == math.inf
    even = {"base": [1.0, 2.0], "up": [1.5, 2.5], "odd": [0.0, 3.0]}
    assert contrasts(even, {"up": "base"})["up"].low < 0.5  # a tie alone is no certainty


def _mse(rows: list[list[float]]) -> float:
    table = torch.tensor(rows, dtype=torch.float64)
    rest = table - table.mean(0) - table.mean(1, keepdim=True) + table.mean()
    return float(rest.square().sum()) / ((table.shape[0] - 1) * (table.shape[1] - 1))


def test_contrasts_with_one_base_cover_the_truth_together() -> None:
    generator, hits = random.Random(0), 0
    bases = {str(n): "0" for n in range(1, 7)}
    for _ in range(400):
        seeds = [generator.gauss(0, 5) for _ in range(3)]
        table = {str(n): [n + of + generator.gauss(0, 2) for of in seeds] for n in range(7)}
        found = contrasts(table, bases, comparisons=6)
        hits += all(found[name].low <= int(name) <= found[name].high for name in bases)
    assert hits / 400 >= 0.94


def test_mean_of_figures_adds_in_square() -> None:
    figure = mean_of([Figure(0.5, 0.2, 0.6), Figure(0.7, 0.3, 0.8)])
    expected = (0.6, 0.6 - 0.5 / 2, 0.6 + math.hypot(0.1, 0.1) / 2)
    assert (figure.value, figure.low, figure.high) == pytest.approx(expected)


def test_a_difference_of_shares_is_newcombe_s() -> None:
    """Newcombe 1998, table II, by method 10: 56 of 70 less 48 of 80 is 0.2 (0.0524 to 0.3339)."""
    figure = difference(wilson(56 / 70, 70), wilson(48 / 80, 80))
    assert (figure.value, figure.low, figure.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def test_jackknife_of_a_mean_is_its_normal_interval() -> None:
    """For a mean of equal groups, the jackknife variance is the textbook one."""
    hits = [3, 5, 4, 6, 2, 5, 7, 4]
    counts = torch.tensor([[h, 10 - h] for h in hits])
    figure = jackknife(counts, lambda total: total[0].item() / total.sum().item())
    error = statistics.stdev([h / 10 for h in hits]) / math.sqrt(len(hits))
    assert figure.value == pytest.approx(0.45)
    assert figure.high - figure.value == pytest.approx(1.959964 * error, rel=1e-6)
    with pytest.raises(UserError, match="at least 2 groups"):
        jackknife(counts[:1], lambda total: 0.0)


def test_flat_writes_bounds_beside_values() -> None:
    rows = flat({"a.b": Figure(0.5, 0.4, 0.6), "n": setting(7)})
    assert rows == {"a.b": 0.5, "a.b.low": 0.4, "a.b.high": 0.6, "n": 7, "n.low": 7, "n.high": 7}
