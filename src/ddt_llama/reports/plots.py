"""Curves of a run as inline SVG, drawn from metrics.jsonl alone.

The SVG carries no colour for text and axes but the page's own (`currentColor`), so that one drawing
reads on light and dark; matplotlib is imported only when a curve is drawn.
"""

import importlib.util
import io
import json
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from ddt_llama.config import UserError, replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curves = dict[str, tuple[list[float], list[float]]]
Scale = Literal["", "x", "xy"]  # which axes are logarithmic

POINTS = 600  # a curve: more than a plot has pixels across
INK = "#010203"  # stands for the page's text colour until the SVG is written
COLOURS = ("#3b7dd8", "#d9822b", "#4a9d5b", "#b0559d", "#8a6d3b", "#6b7280")
DASHES = ("-", "--", ":")  # colours alone are lost in print
DPI = 300  # as journals ask
LEGEND_LINE = 80  # characters that have room below a plot
TITLE_LINE, AXIS_LINE = 46, 26  # above it, and beside it
SHEET_LINE, ROW_LINE = 66, 32  # above and beside a plot of rows
FEW = 6  # places of an axis whose numbers have room, up to six digits each
NOT_CURVES = frozenset({"step", "time", "seconds", "rank"})


def check_plots() -> None:
    """Raise UserError where matplotlib, an extra, is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("plots need matplotlib; pip install 'ddt-llama[train]'")


def read_metrics(path: Path) -> Curves:
    """Read metrics.jsonl: for each quantity the steps and values at which it was written.

    Where a step occurs twice (a run was stopped and went on from an older checkpoint) the later
    line wins. A last line cut short by a crash is skipped; any other broken line is a UserError.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = f"cannot be read ({error})"
        raise UserError(f"{path}: {reason}; give the folder of a training run") from None
    points: dict[str, dict[float, float]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number}: not JSON; mend or delete the line") from None
        _add(points, row)
    return {name: _columns(values) for name, values in points.items()}


def _add(points: dict[str, dict[float, float]], row: object) -> None:
    if not isinstance(row, dict) or not isinstance(row.get("step"), int | float):
        return
    step = float(row["step"])
    for name, value in row.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if name not in NOT_CURVES and is_number and math.isfinite(value):
            points.setdefault(name, {})[step] = float(value)


def _columns(values: Mapping[float, float]) -> tuple[list[float], list[float]]:
    steps = sorted(values)
    return steps, [values[step] for step in steps]


def thin(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Average neighbours so that at most POINTS points remain; the mean of the curve is kept."""
    size = -(-len(steps) // POINTS)
    if size <= 1:
        return list(steps), list(values)
    starts = range(0, len(steps), size)
    return (
        [math.fsum(steps[i : i + size]) / len(steps[i : i + size]) for i in starts],
        [math.fsum(values[i : i + size]) / len(values[i : i + size]) for i in starts],
    )


def plot(curves: Curves, title: str) -> str:
    """Draw curves over the step in one small plot and return it as an `<svg>` element."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    with _style(INK, salt=title):
        only = next(iter(curves)) if len(curves) == 1 else ""
        full = title if only in ("", title) else f"{title.partition(' (')[0]}.{only}"
        figure = _draw(curves, full, INK)
        if len(curves) > 1:
            figure.axes[0].legend(frameon=False, fontsize=8)
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return _inline(buffer.getvalue(), title)


def save_plot(
    path: Path,
    curves: Curves,
    title: str,
    x: str = "",
    y: str = "",
    bands: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    log: Scale = "",
    laws: Mapping[str, tuple[list[float], list[float]]] = MappingProxyType({}),
) -> None:
    """Draw curves and write them as a PNG on white, all or nothing; `x` and `y` name the axes.

    Axes are linear, so that curves of several plots can be compared, where `log` does not name
    them. `bands` are low and high values about the curves of their names; `laws` what a law says of
    them, thin lines of the same colours.
    """
    from matplotlib.ticker import LogLocator

    with _style("black", salt=title):
        figure = _draw(curves, title, "black")
        (axes,) = figure.axes
        axes.set(xlabel=x, ylabel=textwrap.fill(y, AXIS_LINE))
        axes.set(**{f"{axis}scale": "log" if axis in log else "linear" for axis in "xy"})
        places = sorted({step for steps, _ in curves.values() for step in steps})
        if not log and len(places) <= FEW:
            axes.set_xticks(places)
        elif not log:
            axes.locator_params(axis="x", nbins=FEW)
        if "y" in log:
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
        for index, (name, (steps, _)) in enumerate(curves.items()):
            colour = COLOURS[index % len(COLOURS)]
            if bands and name in bands:
                axes.fill_between(steps, *bands[name], color=colour, alpha=0.18, lw=0)
            if name in laws:
                axes.plot(*laws[name], color=colour, lw=0.6)
        if len(curves) > 1:
            _legend_below(figure, list(curves))
        _save_png(path, figure)


def save_intervals(path: Path, rows: Mapping[str, tuple[float, float, float]], title: str) -> None:
    """Draw (value, low, high) of each row, a dot on its interval, beside a line at 0; as a PNG."""
    from matplotlib.figure import Figure

    with _style("black", salt=title):
        names = [textwrap.fill(row, ROW_LINE) for row in rows]
        lines = sum(1 + name.count("\n") for name in names)
        figure = Figure(figsize=(5.2, 0.9 + 0.24 * lines), layout="constrained")
        figure.suptitle(textwrap.fill(title, SHEET_LINE), x=0.01, ha="left", fontsize=10)
        axes = figure.subplots()
        for place, (value, low, high) in enumerate(rows.values()):
            axes.plot([low, high], [place, place], color=COLOURS[0], lw=1.6)
            axes.plot(value, place, color=COLOURS[0], marker="o", ms=4)
        axes.axvline(0, color="black", lw=0.7)
        axes.set_yticks(range(len(rows)), labels=names)
        axes.invert_yaxis()  # the first row above
        _finish(axes, "", "black")
        _save_png(path, figure)


def _save_png(path: Path, figure: "Figure") -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    figure.set_dpi(DPI)
    FigureCanvasAgg(figure).print_png(buffer)
    replace_file(path, buffer.getvalue())


def _style(ink: str, salt: str) -> AbstractContextManager[None]:
    import matplotlib as mpl

    keys = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9}
    return mpl.rc_context(settings | dict.fromkeys(keys, ink))


def _draw(curves: Curves, title: str, ink: str) -> "Figure":
    """Draw into a new figure; the value axis is logarithmic over more than a factor of 20."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 2.7), layout="constrained")
    axes = figure.subplots()
    for index, (name, (steps, values)) in enumerate(curves.items()):
        x, y = thin(steps, values)
        marker = "o" if len(x) == 1 else None
        turn, place = divmod(index, len(COLOURS))
        colour, dash = COLOURS[place], DASHES[(index + turn) % len(DASHES)]
        axes.plot(x, y, dash, color=colour, lw=1.2, label=name, marker=marker, ms=3)
    seen = [v for _, values in curves.values() for v in values]
    if seen and min(seen) > 0 and max(seen) / min(seen) > 20:
        axes.set_yscale("log")
    _finish(axes, title, ink)
    return figure


def _legend_below(figure: "Figure", names: Sequence[str]) -> None:
    """Make the figure higher by a legend that covers no curve."""
    columns = max(1, min(len(names), LEGEND_LINE // (8 + max(map(len, names)))))
    figure.set_figheight(figure.get_figheight() + 0.18 * math.ceil(len(names) / columns))
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def _finish(axes: Any, title: str, ink: str) -> None:
    axes.set_title(textwrap.fill(title, TITLE_LINE), loc="left", fontsize=10)
    axes.grid(alpha=0.18, color=ink, lw=0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _inline(svg: str, title: str) -> str:
    """Cut the XML head, take the page's ink and font, and make ids unique to this plot."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace(INK, "currentColor").replace("fill: #ffffff", "fill: none")
    prefix = re.sub(r"\W", "_", title)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = svg.replace('href="#', f'href="#{prefix}-').replace("url(#", f"url(#{prefix}-")
    return re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px; font-family: inherit", svg)


def panels(curves: Curves) -> dict[str, Curves]:
    """Sort quantities into plots by title, those of the loss first.

    Names with a common beginning (up to the last dot or slash) share a plot as long as their sizes
    are within a factor of 10, so that none is flat beside another, and colours last.
    """
    plots: dict[str, Curves] = {}
    for name, curve in curves.items():
        head, _, part = name.replace("/", ".").rpartition(".")
        head = head or name
        number = 1
        while not _has_room(plots.get(_title(head, number), {}), curve):
            number += 1
        plots.setdefault(_title(head, number), {})[part] = curve
    titles = sorted(plots, key=lambda title: "loss" not in title)  # a stable sort
    return {title: plots[title] for title in titles}


def _title(head: str, number: int) -> str:
    return head if number == 1 else f"{head} ({number})"


def _has_room(some: Curves, curve: tuple[list[float], list[float]]) -> bool:
    sizes = [max(map(abs, values)) for _, values in [*some.values(), curve]]
    return len(some) < len(COLOURS) and max(sizes) <= 10 * min(sizes)
