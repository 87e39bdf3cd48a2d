"""Models side by side on one page, pictures first, and as a Markdown table.

Reads one folder: results.json (the dataclass `Comparison`) and the pictures that it names.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from ddt_llama.config import from_dict, load_json, replace_file, save_json, to_dict
from ddt_llama.reports.page import image, page, section, table

RESULTS = "results.json"
PAGE = "index.html"
TABLE = "README.md"
NOTHING = "–"  # what a model cannot do


@dataclass(frozen=True)
class Row:
    """A quantity: one cell a model, and one a difference; with 95 % intervals where there are."""

    label: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Shown:
    """What was asked, and the picture that each model made of it ("" for none).

    Paths are relative to the results folder; `original` is one too, where there is one.
    """

    words: str
    pictures: tuple[str, ...]
    original: str = ""


@dataclass(frozen=True)
class Comparison:
    """Everything that the page shows; pictures are in the order of `models`.

    Cells are, too, and go on in that of `differences`.
    """

    models: tuple[str, ...]
    about: str
    differences: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()
    drawn: tuple[Shown, ...] = ()
    edited: tuple[Shown, ...] = ()
    rebuilt: tuple[Shown, ...] = ()


def save_comparison(folder: Path, comparison: Comparison) -> Path:
    """Write results.json, README.md and index.html, each all or nothing; return the page's path."""
    save_json(folder / RESULTS, to_dict(comparison))
    replace_file(folder / TABLE, markdown(comparison).encode())
    replace_file(folder / PAGE, comparison_page(folder).encode())
    return folder / PAGE


def markdown(comparison: Comparison) -> str:
    """Return the table alone, with what was measured above it."""
    heads = ["", *comparison.models, *comparison.differences]
    lines = [f"# {', '.join(comparison.models)}", "", comparison.about, ""]
    lines += [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    lines += [f"| {' | '.join([row.label, *row.cells])} |" for row in comparison.rows]
    return "\n".join(lines) + "\n"


def comparison_page(folder: Path) -> str:
    """Return the HTML page of a results folder, its pictures inlined.

    Raises UserError where results.json or a picture that it names is missing.
    """
    found = from_dict(Comparison, load_json(folder / RESULTS))
    figures = table(
        ["", *found.models, *found.differences],
        [[escape(text) for text in (row.label, *row.cells)] for row in found.rows],
    )
    title = ", ".join(found.models)
    return page(
        title,
        [
            f"<header><h1>{escape(title)}</h1><p>{escape(found.about)}</p></header>",
            section("Drawn", "The same prompts and seeds.", _grid(folder, found, found.drawn)),
            section("Edited", "The source first.", _grid(folder, found, found.edited)),
            section("Rebuilt", "The original first.", _grid(folder, found, found.rebuilt)),
            section("Figures", "Brackets hold 95 % intervals.", figures),
        ],
    )


def _grid(folder: Path, found: Comparison, shown: Sequence[Shown]) -> str:
    if not shown:
        return ""
    first = [""] if any(one.original for one in shown) else []
    style = f'class="row" style="--columns:{len(found.models) + len(first)}"'
    heads = "".join(f"<span>{escape(name)}</span>" for name in [*first, *found.models])
    rows = [f"<div {style}>{heads}</div>"]
    for one in shown:
        paths = [*([one.original] if first else []), *one.pictures]
        cells = (
            f"<div>{image(folder / path, one.words) if path else NOTHING}</div>" for path in paths
        )
        words = f"<p>{escape(one.words)}</p>" if one.words else ""
        rows.append(f"{words}<div {style}>{''.join(cells)}</div>")
    return "\n".join(rows)
