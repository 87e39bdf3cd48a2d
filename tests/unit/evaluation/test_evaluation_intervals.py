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
    flat,
    jackknife,
    mean,
    mean_of,
    pooled_means,
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


def test_pooled_means_share_their_scatter() -> None:
    rows = {"a": [1.0, 2.0, 3.0], "b": [10.0, 14.0, 12.0], "same": [5.0, 5.0, 5.0]}
    found = pooled_means(rows)
    half = 2.776445 * math.sqrt((2 + 8) / 4 / 3)  # t of 4 degrees; squares 2 and 8
    for name, centre in (("a", 2.0), ("b", 12.0)):
        assert found[name].value == centre
        assert found[name].high - centre == pytest.approx(half, rel=1e-5)
        assert centre - found[name].low == pytest.approx(half, rel=1e-5)
    assert found["same"] == Figure(5.0, 5.0, 5.0)
    alone = pooled_means({"a": rows["a"]}, comparisons=4)["a"]
    assert alone == mean(rows["a"], comparisons=4)
    assert pooled_means({"a": [1.0]})["a"].high == math.inf


def test_pooled_intervals_cover_the_truth_together() -> None:
    generator, hits = random.Random(0), 0
    for _ in range(400):
        rows = {str(n): [generator.gauss(n, 2) for _ in range(3)] for n in range(5)}
        found = pooled_means(rows, comparisons=5)
        hits += all(found[str(n)].low <= n <= found[str(n)].high for n in range(5))
    assert hits / 400 >= 0.93


def test_mean_of_figures_adds_in_square() -> None:
    figure = mean_of([Figure(0.5, 0.2, 0.6), Figure(0.7, 0.3, 0.8)])
    expected = (0.6, 0.6 - 0.5 / 2, 0.6 + math.hypot(0.1, 0.1) / 2)
    assert (figure.value, figure.low, figure.high) == pytest.approx(expected)


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
