"""How evaluation shows itself: a JSON file, a table and a progress bar."""

from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import track
from rich.table import Table

from ddt_llama.config import save_json
from ddt_llama.evaluation.intervals import Figure, flat

Item = TypeVar("Item")


def write_figures(path: Path, figures: Mapping[str, Figure]) -> None:
    """Write figures as one flat JSON object of dotted keys, all or nothing.

    Each figure has `.low` and `.high` beside it; a bound that is not known is null.
    """
    save_json(path, flat(figures))


def figures_table(figures: Mapping[str, Figure], title: str) -> Table:
    """Return a table of figures for the terminal."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right", style="dim")
    for name, figure in figures.items():
        exact = figure.low == figure.high == figure.value
        bounds = "" if exact else f"{_number(figure.low)} to {_number(figure.high)}"
        table.add_row(name, _number(figure.value), bounds)
    return table


def print_figures(figures: Mapping[str, Figure], title: str) -> None:
    """Print the table of figures to the terminal."""
    Console().print(figures_table(figures, title))


def watch(items: Iterable[Item], what: str, *, total: int | None = None) -> Iterator[Item]:
    """Yield the items with a progress bar on standard error, where that is a terminal."""
    console = Console(stderr=True)
    length = total if total is not None or not isinstance(items, Sized) else len(items)
    yield from track(
        items,
        description=what,
        total=length,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _number(value: float) -> str:
    if value.is_integer() and abs(value) > 1:  # a count; a share of exactly 1 is written 1.000
        return f"{value:.0f}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"
