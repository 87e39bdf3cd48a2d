"""Ways to the same result, timed in turns in one process: a ratio is of one round, one machine."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ddt_llama.evaluation.intervals import Figure
from ddt_llama.evaluation.result import watch

ROUNDS = 6  # the least for which lowest to highest covers a median with 95 % (1 - 2 / 2^6)


@dataclass(frozen=True)
class Race:
    """Ways that take turns, by name, and which of them are compared: name -> (slow, fast)."""

    ways: Mapping[str, Callable[[], object]]
    ratios: Mapping[str, tuple[str, str]]
    seconds: Mapping[str, str]  # name -> way


def run(race: Race, device: torch.device, rounds: int, what: str) -> dict[str, Figure]:
    """Return ratios (slow / fast) and seconds: medians over `rounds`, bounds are the extremes.

    Every way is taken once before, so that all is warm.
    """
    for way in race.ways.values():
        way()
    times: dict[str, list[float]] = {name: [] for name in race.ways}
    for _ in watch(range(rounds), what):
        for name, way in race.ways.items():
            times[name].append(seconds(way, device))
    figures = {}
    for name, (slow, fast) in race.ratios.items():
        pairs = zip(times[slow], times[fast], strict=True)
        figures[name] = median([one / other for one, other in pairs])
    return figures | {name: median(times[way]) for name, way in race.seconds.items()}


def seconds(way: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call, until the device has done all."""
    start = time.perf_counter()
    way()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def median(values: Sequence[float]) -> Figure:
    """Return the median between the lowest and the highest; one value knows nothing of those."""
    if len(values) == 1:
        return Figure(values[0], -math.inf, math.inf)
    return Figure(statistics.median(values), min(values), max(values))
