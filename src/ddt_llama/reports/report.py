"""One self-contained page for a training run: samples, curves, figures, configuration.

Reads the run folder only (config.json, environment.json, metrics.jsonl, samples/, and evaluation
results kept as *.json in evaluation/), so a report can be made anywhere, during the run or later.
"""

import math
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from ddt_llama.config import UserError, flatten, load_json, replace_file
from ddt_llama.reports.figures import tables
from ddt_llama.reports.page import figure, page, section, table
from ddt_llama.reports.plots import Curves, check_plots, panels, plot, read_metrics

REPORT = "report.html"
PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp")
LATEST = 2  # sample pictures shown open; the others are folded away
EARLIER = 12


def report(run_folder: Path) -> Path:
    """Write report.html into a run folder, all or nothing, and return its path.

    Raises UserError where the folder is absent or holds no metrics.jsonl.
    """
    check_plots()
    path = run_folder / REPORT
    replace_file(path, report_page(run_folder).encode())
    return path


def report_page(run_folder: Path) -> str:
    """Return the page of a run as HTML."""
    metrics = run_folder / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError(f"{run_folder}: no metrics.jsonl there; give the folder of a training run")
    curves = read_metrics(metrics)
    name = run_folder.resolve().name
    config = _json(run_folder / "config.json")
    return page(
        f"{name}: training report",
        [
            f"<header><h1>{escape(name)}</h1>{_facts(curves)}</header>",
            _samples(run_folder / "samples"),
            section("Curves", "Against the step; long curves are averaged.", _plots(curves)),
            *_evaluations(run_folder / "evaluation"),
            section("Configuration", "Every field of the run.", _fields(config)),
            section("Environment", "", _fields(_json(run_folder / "environment.json"))),
        ],
    )


def _json(path: Path) -> Mapping[str, Any]:
    found = load_json(path) if path.is_file() else {}
    if not isinstance(found, Mapping):
        raise UserError(f"{path}: holds no fields; delete it, or put the run's own back")
    return found


def _facts(curves: Curves) -> str:
    """Return the last value of every quantity: the first screen of a run."""
    if not curves:
        return '<p class="soft">Nothing was measured yet.</p>'
    last = max(steps[-1] for steps, _ in curves.values())
    cells = [("step", f"{last:,.0f}")]
    cells += [(name, f"{values[-1]:.4g}") for name, (_, values) in curves.items()]
    facts = "".join(f"<div><span>{escape(n)}</span>{escape(v)}</div>" for n, v in cells)
    return f'<div class="facts">{facts}</div>'


def _samples(folder: Path) -> str:
    if not folder.is_dir():
        return ""
    files = [f for f in folder.rglob("*") if f.suffix.lower() in PICTURES]
    files.sort(key=_natural)
    newest = files[::-1]
    shown = [figure(f, f.relative_to(folder).as_posix()) for f in newest[:LATEST]]
    if not shown:
        return ""
    content = f'<div class="wide">{"".join(shown)}</div>'
    rest = newest[LATEST:]
    if rest:
        # Evenly through the run: the development is what the earlier ones show.
        stride = math.ceil(len(rest) / EARLIER)
        old = "".join(figure(f, f.relative_to(folder).as_posix()) for f in rest[::stride])
        content += (
            f'<details><summary>earlier samples</summary><div class="wide">{old}</div></details>'
        )
    return section("Samples", "The newest first.", content)


def _natural(path: Path) -> list[tuple[int, str]]:
    """Return a sort key in which step-900 comes before step-1000."""
    pieces = re.split(r"(\d+)", path.as_posix())
    return [(int(p), "") if p.isdigit() else (-1, p) for p in pieces]


def _plots(curves: Curves) -> str:
    drawings = [f"<div>{plot(some, title)}</div>" for title, some in panels(curves).items()]
    return f'<div class="plots">{"".join(drawings)}</div>' if drawings else ""


def _evaluations(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return [
        section(f"Figures: {file.stem}", "With 95 % intervals.", tables(load_json(file)))
        for file in sorted(folder.glob("*.json"))
    ]


def _fields(data: Mapping[str, Any]) -> str:
    flat = flatten(data)
    rows = [[escape(name), f"<code>{escape(str(value))}</code>"] for name, value in flat.items()]
    content = table(["field", "value"], rows, numbers_from=2)
    return f"<details><summary>show</summary>{content}</details>" if rows else ""
