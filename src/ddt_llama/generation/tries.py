"""Draw, look, and draw again: of several tries at a picture the one most like its plan.

A part of `programs`. The judge is the model itself, so a try costs a description more than a
picture.
"""

from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

from jaxtyping import Int
from torch import Tensor

from ddt_llama.generation.settings import Settings, retry_seed
from ddt_llama.generation.work import Program


def best_tries(
    write: Callable[[Sequence[int], Sequence[int]], Program[Int[Tensor, "r k"]]],
    describe: Callable[[Int[Tensor, "r k"]], Program[list[str]]],
    plans: Sequence[str],
    seeds: Sequence[int],
    settings: Settings,
) -> Program[Int[Tensor, "b k"]]:
    """Return codes for each plan, drawn again while they are not read as it, `tries` times at most.

    `write(rows, seeds)` gives codes of some of the plans, `describe` what they show. A row's tries
    depend on its own plan and seed only; of equally like ones the first is kept.
    """
    kept = yield from write(range(len(plans)), seeds)
    seen = yield from describe(kept)
    likest = [likeness(*pair) for pair in zip(seen, plans, strict=True)]
    for attempt in range(1, settings.tries):
        rows = [row for row, like in enumerate(likest) if like < 1]
        if not rows:
            break
        tried = yield from write(rows, [retry_seed(seeds[row], attempt) for row in rows])
        seen = yield from describe(tried)
        for row, codes, told in zip(rows, tried, seen, strict=True):
            like = likeness(told, plans[row])
            if like > likest[row]:
                kept[row], likest[row] = codes, like
    return kept


def likeness(text: str, other: str) -> float:
    """Return the share of words that two lists have in common and in order: 1 for the same list.

    What stands between commas may come in any order.
    """
    pair = [" , ".join(sorted(part.strip() for part in one.split(","))) for one in (text, other)]
    return SequenceMatcher(None, *(one.split() for one in pair), autojunk=False).ratio()
