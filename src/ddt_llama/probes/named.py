"""The probes that exist, by name, and the one way to carry one out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ddt_llama.config import UserError
from ddt_llama.evaluation.pictures import ScenePictures
from ddt_llama.evaluation.reconstruction import batches, device_of
from ddt_llama.evaluation.result import watch
from ddt_llama.generation.model import Model
from ddt_llama.probes.base import Outcome, close_folder, open_folder
from ddt_llama.probes.entropy import entropy
from ddt_llama.probes.learn import Lesson, Plan
from ddt_llama.probes.sequences import Sequences, of_codes, of_texts
from ddt_llama.probes.shuffle import shuffle
from ddt_llama.shapes.captions import caption
from ddt_llama.tokenizer import Tokenizer

SEED = 3_000_017  # of scenes that neither training nor evaluation looks at
ENCODED_AT_ONCE = 64


@dataclass(frozen=True)
class Data:
    """How many scenes of the shapes world the sequences come from."""

    pictures: int = 20_000
    held_out: int = 512


@dataclass(frozen=True)
class Begun:
    """What belongs to one probe folder: probe, models, data and settings."""

    probe: str
    models: tuple[str, ...]
    data: Data
    settings: Any


FULL, QUICK = Data(), Data(512, 128)
# A probe: its settings, how it is carried out, and the settings of a run of minutes.
PROBES: dict[str, tuple[Any, Callable[[Any, Sequence[Sequences], Path], Outcome]]] = {
    "shuffle": (Plan(), shuffle),
    "entropy": (Plan(), entropy),
}


def carry_out(name: str, models: Sequence[Model], out: Path, quick: bool = False) -> Outcome:
    """Carry a probe out in the folder `out`, or go on with it; returns its outcome.

    `quick` is a run of minutes that proves the machinery, not the claim: one step in thirty, one
    picture in forty. Raises UserError for an unknown probe, models of one name, and a folder of
    another probe.
    """
    check_name(name)
    if not models:
        raise UserError("no model was given; give at least one")
    names = tuple(model.name for model in models)
    if twice := [one for one in names if names.count(one) > 1]:
        raise UserError(f"two models are named {twice[0]!r}; give models of different names")
    settings, action = PROBES[name]
    data = QUICK if quick else FULL
    if quick:
        settings = replace(settings, lesson=shortened(settings.lesson))
    open_folder(out, Begun(name, names, data, settings))
    outcome = action(settings, sources_of(models, data), out)
    if quick:
        outcome = replace(outcome, verdict=f"(Quick: proves the machinery only.) {outcome.verdict}")
    close_folder(out, outcome, f"{name}: {', '.join(names)}")
    return outcome


def check_name(name: str) -> None:
    """Raise UserError for an unknown probe."""
    if name not in PROBES:
        raise UserError(f"unknown probe {name!r}; the probes are: {', '.join(PROBES)}")


def shortened(lesson: Lesson) -> Lesson:
    """Return a lesson of a thirtieth of the steps."""
    steps = lesson.train.steps // 30
    optim = replace(lesson.train.optim, warmup=steps // 4)
    return replace(
        lesson,
        train=replace(lesson.train, steps=steps, batch=16, sample_every=steps // 2, optim=optim),
    )


def sources_of(models: Sequence[Model], data: Data) -> list[Sequences]:
    """Return the codes of the same scenes from every model, and their captions as ids of text."""
    sources = [
        of_codes(
            model.name,
            language_codes(model.tokenizer, data.pictures, model.name),
            model.tokenizer.codebook_size,
            data.held_out,
        )
        for model in models
    ]
    text = next((model.text for model in models if model.text is not None), None)
    if text is not None:
        scenes = ScenePictures(data.pictures, 64, "train", SEED).scenes(0, data.pictures)
        told = [caption(scene, SEED, index) for index, scene in enumerate(scenes)]
        rows = [text.encode(one) for one in told]
        sources.append(of_texts("captions", rows, text.size, data.held_out))
    return sources


def language_codes(tokenizer: Tokenizer, count: int, name: str) -> Int[Tensor, "n k"]:
    """Return the codes of `count` scenes in the order that a language model reads."""
    pictures = ScenePictures(count, tokenizer.image_size, "train", SEED)
    parts = []
    for start, stop in watch(list(batches(count, ENCODED_AT_ONCE)), f"encode by {name}"):
        images = pictures.images(start, stop).to(device_of(tokenizer))
        parts.append(tokenizer.to_language(tokenizer.encode(images)).cpu())
    return torch.cat(parts)
