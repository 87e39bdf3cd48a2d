"""Tables of measured figures, as HTML, from the flat dotted keys that evaluation writes.

`name`, `name.low` and `name.high` become one cell. Names that end in a number, such as
`reconstruction.psnr.16`, share one table with the numbers as columns; the rest is one row a name.
"""

from collections.abc import Mapping
from html import escape

from ddt_llama.reports.page import table

DECIBELS = ("psnr",)
WORDS = {"psnr": "PSNR (dB)", "ssim": "SSIM", "exact": "read back exactly"}


def cell(figures: Mapping[str, float | None], name: str) -> str:
    """Return a figure and, softer, its interval; a dash where it was not measured."""
    value, interval = _texts(figures, name)
    return f'{value}<br><span class="soft">{interval}</span>' if interval else value


def _texts(figures: Mapping[str, float | None], name: str) -> tuple[str, str]:
    """Return the value and its interval; no interval where a number is known, not measured."""
    value, low, high = (figures.get(name + end) for end in ("", ".low", ".high"))
    if value is None:
        return "–", ""
    places = _places(name, value)
    text = f"{value:.{places}f}"
    if low is None or high is None or low == high:
        return text, ""
    return text, f"{low:.{places}f} to {high:.{places}f}"


def tables(figures: Mapping[str, float | None]) -> str:
    """Return all figures: first one table a group of numbered names, then the single ones."""
    names = [name for name in figures if not name.endswith((".low", ".high"))]
    numbered: dict[str, dict[str, list[int]]] = {}
    single: list[str] = []
    for name in names:
        stem, _, last = name.rpartition(".")
        if stem and last.isdigit():
            group, _, quantity = stem.rpartition(".")
            numbered.setdefault(group, {}).setdefault(quantity, []).append(int(last))
        else:
            single.append(name)
    parts = [_numbered(figures, group, numbered[group]) for group in numbered]
    rows = [[escape(name), *_texts(figures, name)] for name in single]
    return "\n".join([*parts, table(["figure", "value", "95 % interval"], rows)])


def _numbered(
    figures: Mapping[str, float | None], group: str, quantities: Mapping[str, list[int]]
) -> str:
    columns = sorted({number for numbers in quantities.values() for number in numbers})
    prefix = f"{group}." if group else ""
    rows = []
    for quantity in quantities:
        cells = [cell(figures, f"{prefix}{quantity}.{n}") for n in columns]
        rows.append([escape(WORDS.get(quantity, quantity)), *cells])
    units = {"visible": "tokens", "reconstruction": "steps"}
    unit = units.get(group.rpartition(".")[2], "")
    title = group.replace(".", ", ") if group else "figures"
    return f"<h3>{escape(title)}</h3>{table([unit, *map(str, columns)], rows)}"


def _places(name: str, value: float) -> int:
    if any(part in DECIBELS for part in name.split(".")):
        return 2
    if value == int(value) and abs(value) > 1:
        return 0
    return 3 if abs(value) <= 10 else 1
