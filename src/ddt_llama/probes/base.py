"""What every probe leaves behind, and how it is told."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from ddt_llama.config import UserError, check_folder, load_json, replace_file, save_json, to_dict
from ddt_llama.data.images import save_png
from ddt_llama.evaluation.intervals import Figure, flat
from ddt_llama.generation.model import Model
from ddt_llama.reports.plots import Curves, save_intervals, save_plot

FINISHED = "figures.json"
ONE_TRAINING = (
    "One training of each tokenizer: differences between trainings are not in the intervals."
)
SEED = 3_000_017  # of scenes that neither training nor evaluation looks at


@dataclass(frozen=True)
class Outcome:
    """Figures by name, the plots and pictures that show them, and one sentence.

    `rows` are plots of figures with their intervals, such as differences, below each other.
    """

    figures: Mapping[str, Figure]
    verdict: str
    plots: Mapping[str, Curves] = field(default_factory=dict)
    pictures: Mapping[str, Image.Image] = field(default_factory=dict)
    rows: Mapping[str, Mapping[str, Figure]] = field(default_factory=dict)


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise UserError for no seed, and for one given twice."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds: given {tuple(seeds)}; give one or more different ones")


def check_names(models: Sequence[Model]) -> tuple[str, ...]:
    """Return the names of models; UserError for no model, and for two of one name."""
    if not models:
        raise UserError("no model was given; give at least one")
    names = tuple(model.name for model in models)
    if twice := [one for one in names if names.count(one) > 1]:
        raise UserError(f"two models are named {twice[0]!r}; give models of different names")
    return names


def fingerprint(*parts: object) -> str:
    """Return letters that stand for the weights of networks: trained further, others.

    What is no network counts by its type alone.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(type(part).__name__.encode())
        tensors = part.state_dict() if isinstance(part, nn.Module) else {}
        for name, tensor in tensors.items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def kept(path: Path, measure: Callable[[], Any]) -> Any:
    """Return what `measure` returned (JSON), or what it returned before the probe was stopped."""
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        save_json(path, measure())
    return load_json(path)


def open_folder(folder: Path, config: object) -> None:
    """Begin a measurement in `folder`, or go on with the same one.

    Raises UserError where another one was begun, or other things lie there.
    """
    described = folder / "config.json"
    if described.is_file():
        if load_json(described) != to_dict(config):
            raise UserError(
                f"{folder}: another probe, or one of other models, weights or settings, was begun "
                "here; choose another folder with --out"
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is no probe; choose another folder with --out")
    check_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); choose another with --out"
        ) from None
    save_json(described, to_dict(config))


def close_folder(folder: Path, outcome: Outcome, title: str, about: str) -> None:
    """Write figures, table, plots, pictures and verdict; `about` says how it was measured."""
    shown = [*outcome.plots, *outcome.rows, *outcome.pictures]
    files = {name: f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.png" for name in shown}
    for name, curves in outcome.plots.items():
        save_plot(folder / files[name], curves, name)
    for name, rows in outcome.rows.items():
        values = {row: (one.value, one.low, one.high) for row, one in rows.items()}
        save_intervals(folder / files[name], values, name)
    for name, picture in outcome.pictures.items():
        save_png(picture, folder / files[name])
    page = [f"# {title}", "", outcome.verdict, "", f"{about} All settings: config.json.", ""]
    page += [*table(outcome.figures), ""]
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
