"""The verb bench: how fast the fast paths are, on this machine."""

from pathlib import Path
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, Positional, arg

from ddt_llama.cli.kinds import WholeNumber


def bench(
    model: Annotated[Positional[str], arg(metavar="MODEL", help_behavior_hint="")] = "nano",
    *,
    quick: FlagCreatePairsOff[bool] = False,
    rounds: WholeNumber = None,
    json: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None,
) -> None:
    """Time encoding, decoding, drawing and training, each against the plain way in the same run.

    Ratios are medians of rounds in which both take turns, between the lowest and the highest. On a
    busy machine they say little: let nothing else run.

    Example: ddt bench nano --quick --json bench.json

    Args:
        model: nano (comes with the program), a folder of ddt train or ddt publish, or a hub name.
        quick: One round and smaller batches, in a minute or so: proves that every line is measured.
        rounds: How many; six unless given, the least for which the extremes bound a median (95 %).
        json: Write the figures to this file, too.
    """
    from ddt_llama.cli.places import check_file
    from ddt_llama.evaluation.result import print_figures, write_figures
    from ddt_llama.generation import load
    from ddt_llama.recipes.bench import measure, shown

    if json is not None:
        check_file(json, ".json")
    opened = load(model)
    figures = measure(opened, quick=quick, rounds=rounds)
    print_figures(figures, f"{opened.name} on {opened.device}")
    print("\n" + "\n".join(f"{end:<16} {told}" for end, told in shown(figures)))
    if json is not None:
        write_figures(json, figures)
        print(json)
