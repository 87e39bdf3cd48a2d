"""What every probe leaves behind, and how it is told."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ddt_llama.config import UserError, load_json, replace_file, save_json, to_dict
from ddt_llama.evaluation.intervals import Figure, flat
from ddt_llama.reports.plots import Curves, save_plot

FINISHED = "figures.json"


@dataclass(frozen=True)
class Outcome:
    """Figures by name, the plots that show them, and one sentence."""

    figures: Mapping[str, Figure]
    verdict: str
    plots: Mapping[str, Curves] = field(default_factory=dict)


def open_folder(folder: Path, config: object) -> None:
    """Begin a probe in `folder`, or go on with the same one; UserError for another's folder."""
    described = folder / "config.json"
    if described.is_file():
        if load_json(described) != to_dict(config):
            raise UserError(
                f"{folder}: another probe, or one of other models or settings, was begun here; "
                "choose another folder with --out"
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is no probe; choose another folder with --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); choose another with --out"
        ) from None
    save_json(described, to_dict(config))


def close_folder(folder: Path, outcome: Outcome, title: str) -> None:
    """Write figures, table, plots and verdict."""
    files = {name: f"{re.sub('[^a-z0-9]+', '-', name.lower())}.png" for name in outcome.plots}
    for name, curves in outcome.plots.items():
        save_plot(folder / files[name], curves, name)
    page = [f"# {title}", "", outcome.verdict, "", *table(outcome.figures), ""]
    page += [f"![{name}]({file})" for name, file in files.items()]
    replace_file(folder / "README.md", ("\n".join(page) + "\n").encode())
    save_json(folder / FINISHED, flat(outcome.figures))


def table(figures: Mapping[str, Figure]) -> list[str]:
    """Return the lines of a Markdown table of figures with their intervals."""
    rows = ["| figure | value | 95 % interval |", "|---|---|---|"]
    for name, one in figures.items():
        exact = one.low == one.high
        rows.append(
            f"| {name} | {one.value:.4g} | {'' if exact else f'{one.low:.4g} to {one.high:.4g}'} |"
        )
    return rows
