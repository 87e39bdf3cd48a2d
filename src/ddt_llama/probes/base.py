"""What every probe leaves behind, and how it is told."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from itertools import combinations
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from ddt_llama.config import (
    UserError,
    check_folder,
    flatten,
    load_json,
    replace_file,
    save_json,
    to_dict,
)
from ddt_llama.data.images import save_png
from ddt_llama.evaluation.intervals import Figure, flat, mean
from ddt_llama.generation.model import Model
from ddt_llama.language.text import TextTokenizer
from ddt_llama.reports.plots import Curves, Scale, save_intervals, save_plot
from ddt_llama.runs import record_environment, told_environment

FIGURES = "figures.json"
CURVES = "metrics.jsonl"  # every point and row of every plot
ENVIRONMENT = "environment.json"
ONE_TRAINING = (
    "One training of each tokenizer, and one choice of held-out scenes: what others would change "
    "is not in the intervals."
)
SEED = 3_000_017  # of scenes that neither training nor evaluation looks at
LAST_SEED = 10**9
NO_NAMES = ("captions",)  # of models: figures of texts have it
SHOWN = 3  # settings that an error names


Line = Sequence[tuple[float, float]]  # points (x, y)


class Plot(NamedTuple):
    """Curves by name, what their x is and what their y, and the least and most at each point.

    `log`: which axes are logarithmic; a power law is a line where both are. `laws`: what a law says
    of the curves of the same names.
    """

    curves: Curves
    x: str
    y: str
    bands: Mapping[str, tuple[list[float], list[float]]] = MappingProxyType({})
    log: Scale = ""
    laws: Mapping[str, tuple[list[float], list[float]]] = MappingProxyType({})

    @classmethod
    def of_seeds(cls, lines: Mapping[str, Sequence[Line]], x: str, y: str) -> "Plot":
        """Return the mean and the range of several lines under each name, which share their x."""
        curves: Curves = {}
        bands = {}
        for name, several in lines.items():
            at = [float(point) for point, _ in several[0]]
            values = np.array([[value for _, value in line] for line in several])
            curves[name] = at, values.mean(0).tolist()
            bands[name] = values.min(0).tolist(), values.max(0).tolist()
        return cls(curves, x, y, bands)


@dataclass(frozen=True)
class Outcome:
    """Figures by name, the plots and pictures that show them, and one sentence.

    `rows` are plots of figures with their intervals, such as differences, below each other; `notes`
    is what there is to say of how it was measured, beside the plan.
    """

    figures: Mapping[str, Figure]
    verdict: str
    plots: Mapping[str, Plot] = field(default_factory=dict)
    pictures: Mapping[str, Image.Image] = field(default_factory=dict)
    rows: Mapping[str, Mapping[str, Figure]] = field(default_factory=dict)
    notes: str = ""


def between(values: Mapping[str, Sequence[float]]) -> dict[str, Figure]:
    """Return "A less B" for every two names, from values that are paired (by seed)."""
    return {
        f"{a} less {b}": mean([x - y for x, y in zip(values[a], values[b], strict=True)])
        for a, b in combinations(values, 2)
    }


def told(figure: Figure, digits: int = 2, sign: str = "") -> str:
    """Write a figure and its interval: "0.31 (0.25 to 0.37)"; `sign` "+" shows it of each."""
    return _written(figure, lambda x: f"{x:{sign}.{digits}f}")


def as_share(figure: Figure) -> Figure:
    """Return a share with its interval cut at 0 and 1: Student's t may go where no share is.

    That of one value, which has none, stays so.
    """
    if not (math.isfinite(figure.low) and math.isfinite(figure.high)):
        return figure
    return Figure(figure.value, max(0.0, figure.low), min(1.0, figure.high))


def percent(figure: Figure) -> str:
    """Write a share and its interval: "31 % (25 to 37)"."""
    return _written(figure, lambda x: f"{100 * x:.0f}", " %")


def points(difference: Figure) -> str:
    """Write a difference of shares and its interval: "-31 points (-37 to -25)"."""
    return _written(difference, lambda x: f"{100 * x:+.0f}", " points")


def _written(figure: Figure, write: Callable[[float], str], unit: str = "") -> str:
    value = f"{write(figure.value)}{unit}"
    if math.isinf(figure.low):
        return f"{value} (one seed: no interval)"
    return f"{value} ({write(figure.low)} to {write(figure.high)})"


def closed(sentence: str, apart: Mapping[str, Figure], digits: int = 2, what: str = "") -> str:
    """Return a sentence with the differences of `between` at its end, where there are any."""
    pairs = ", ".join(f"{name} {told(one, digits, sign='+')}" for name, one in apart.items())
    return f"{sentence}; {what}{pairs}." if pairs else f"{sentence}."


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise UserError for no seed, for one given twice, and for what is none."""
    if not seeds or len(set(seeds)) < len(seeds) or not 0 <= min(seeds) <= max(seeds) <= LAST_SEED:
        raise UserError(
            f"seeds: given {tuple(seeds)}; give one or more different ones from 0 to {LAST_SEED}"
        )


def check_held_out(held_out: int, pictures: int) -> None:
    """Raise UserError unless some of the pictures are held out, and some are not."""
    if not 0 < held_out < pictures:
        raise UserError(
            f"held_out: given {held_out} of {pictures} pictures; leave some of each, with "
            "--held-out or --pictures"
        )


def check_names(models: Sequence[Model]) -> tuple[str, ...]:
    """Return the names of models; UserError for no model, and for two of one name."""
    if not models:
        raise UserError("no model was given; give at least one")
    names = tuple(model.name for model in models)
    if twice := [one for one in names if names.count(one) > 1]:
        raise UserError(f"two models are named {twice[0]!r}; give models of different names")
    if odd := [one for one in names if Path(one).name != one]:
        raise UserError(f"model name {odd[0]!r}: files are named after it; rename it, without '/'")
    if odd := [one for one in names if one in NO_NAMES or not one.strip() or not one.isprintable()]:
        raise UserError(f"model name {odd[0]!r}: it would name other figures, too; rename it")
    return names


def fingerprint(*parts: object) -> str:
    """Return letters that stand for weights of networks and settings: trained further, others.

    A text tokenizer counts by what it makes of text; what is none of these by its type alone.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(type(part).__name__.encode())
        if is_dataclass(part):
            digest.update(json.dumps(to_dict(part), sort_keys=True).encode())
        if isinstance(part, str):
            digest.update(part.encode())
        if isinstance(part, TextTokenizer):
            digest.update(part.to_json().encode())
        tensors = part.state_dict() if isinstance(part, nn.Module) else {}
        for name, tensor in tensors.items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def kept(path: Path, measure: Callable[[], Any]) -> Any:
    """Return what `measure` returned (JSON), or what it returned before the probe was stopped."""
    if not path.is_file():
        save_json(path, measure())
    return load_json(path)


def open_folder(folder: Path, config: object) -> None:
    """Begin a measurement in `folder`, or go on with the same one.

    Raises UserError where another one was begun, or other things lie there.
    """
    described = folder / "config.json"
    if described.is_file():
        saved, now = load_json(described), flatten(config)
        before = flatten(saved) if isinstance(saved, dict) else {}
        if before != now:
            names = [one for one in {**now, **before} if before.get(one) != now.get(one)]
            others = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            changed = ", ".join(
                f"{one} was {json.dumps(before.get(one))}, now {json.dumps(now.get(one))}"
                for one in names[:SHOWN]
            )
            raise UserError(
                f"{folder}: another probe, or one of other models, weights or settings, was begun "
                f"here ({changed}{others}); choose another folder with --out"
            )
        record_environment(folder / ENVIRONMENT)
        return
    # A dot-file may be the first one here, of a start that was killed while it wrote it.
    if folder.exists() and (
        not folder.is_dir() or any(not item.name.startswith(".") for item in folder.iterdir())
    ):
        raise UserError(f"{folder}: exists and is no probe; choose another folder with --out")
    check_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); choose another with --out"
        ) from None
    save_json(described, to_dict(config))
    record_environment(folder / ENVIRONMENT)


def forget_folder(folder: Path) -> None:
    """Remove a folder in which nothing was measured, so that another start may differ."""
    if {item.name for item in folder.iterdir()} == {"config.json", ENVIRONMENT}:
        (folder / ENVIRONMENT).unlink()
        (folder / "config.json").unlink()
        folder.rmdir()


def close_folder(
    folder: Path, outcome: Outcome, title: str, about: str, question: str = "", legend: str = ""
) -> None:
    """Write figures, table, plots, pictures and verdict.

    `question` is what was asked, `about` how it was measured, `legend` what the figures' names say.
    """
    shown = [*outcome.plots, *outcome.rows, *outcome.pictures]
    files = dict(zip(shown, pictured(shown), strict=True))
    for name, plot in outcome.plots.items():
        save_plot(folder / files[name], title=name, **plot._asdict())
    for name, rows in outcome.rows.items():
        values = {row: (one.value, one.low, one.high) for row, one in rows.items()}
        save_intervals(folder / files[name], values, name)
    for name, picture in outcome.pictures.items():
        save_png(picture, folder / files[name])
    bands = any(plot.bands for plot in outcome.plots.values())
    last = f"{'Bands in plots are the range of the seeds. ' * bands}All settings: config.json."
    ran = told_environment(folder / ENVIRONMENT)
    about = " ".join(part for part in (about, outcome.notes, ran, last) if part)
    page = [f"# {title}", "", outcome.verdict, "", *([question, ""] if question else []), about, ""]
    page += [f"Names of the figures: {legend}", ""] if legend else []
    page += [*table(outcome.figures), ""]
    page += [f"![{name}]({file})" for name, file in files.items()]
    replace_file(folder / "README.md", ("\n".join(page) + "\n").encode())
    points = [
        {"plot": name, "curve": curve, plot.x: x, plot.y: y}
        | {bound: side[place] for bound, side in zip(("least", "most"), band, strict=False)}
        for name, plot in outcome.plots.items()
        for curve, line in plot.curves.items()
        for band in [plot.bands.get(curve, ())]
        for place, (x, y) in enumerate(zip(*line, strict=True))
    ]
    points += [
        {"plot": name, "law of": curve, plot.x: x, plot.y: y}
        for name, plot in outcome.plots.items()
        for curve, line in plot.laws.items()
        for x, y in zip(*line, strict=True)
    ]
    points += [
        {"plot": name, "row": row, "value": one.value, "low": one.low, "high": one.high}
        for name, rows in outcome.rows.items()
        for row, one in rows.items()
    ]
    replace_file(folder / CURVES, "".join(json.dumps(one) + "\n" for one in points).encode())
    save_json(folder / FIGURES, flat(outcome.figures))


def pictured(names: Sequence[str]) -> list[str]:
    """Return the files of plots and pictures, one each.

    >>> pictured(["A, 3 seeds", "a_b: loss", "a 3 seeds"])
    ['a-3-seeds.png', 'a_b-loss.png', 'a-3-seeds-2.png']
    """
    stems = [re.sub(r"\W+", "-", name.lower()).strip("-") for name in names]
    turns = [stems[:place].count(stem) for place, stem in enumerate(stems)]
    return [
        f"{stem}-{turn + 1}.png" if turn else f"{stem}.png"
        for stem, turn in zip(stems, turns, strict=True)
    ]


def table(figures: Mapping[str, Figure]) -> list[str]:
    """Return the lines of a Markdown table of figures with their intervals."""
    rows = ["| figure | value | 95 % interval |", "|---|---|---|"]
    for name, one in figures.items():
        bounded = f"{one.low:.4g} to {one.high:.4g}"
        interval = bounded if math.isfinite(one.low) else "one seed: none"
        rows.append(f"| {name} | {one.value:.4g} | {interval} |")
    return rows
