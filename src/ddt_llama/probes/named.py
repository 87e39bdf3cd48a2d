"""The probes that exist, by name, and the one way to carry one out."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from ddt_llama.config import UserError, override
from ddt_llama.generation.model import Model
from ddt_llama.probes.ablate import ablate
from ddt_llama.probes.base import (
    Outcome,
    check_names,
    close_folder,
    fingerprint,
    forget_folder,
    open_folder,
)
from ddt_llama.probes.entropy import entropy
from ddt_llama.probes.learn import Plan
from ddt_llama.probes.length import length
from ddt_llama.probes.levels import LevelPlan
from ddt_llama.probes.prefix import prefix
from ddt_llama.probes.scaling import ScalingPlan, scaling
from ddt_llama.probes.sequences import Sequences
from ddt_llama.probes.shuffle import shuffle
from ddt_llama.probes.sources import sources_of, text_of
from ddt_llama.probes.swap import swap
from ddt_llama.probes.synergy import synergy
from ddt_llama.probes.variants import VariantPlan, each_can_vary
from ddt_llama.reports.plots import check_plots


@dataclass(frozen=True)
class Begun:
    """What belongs to one probe folder: probe, models, their fingerprints, settings.

    Those of a model are of its tokenizers of images and of text, and its decoding steps.
    """

    probe: str
    models: tuple[str, ...]
    fingerprints: tuple[str, ...]
    steps: tuple[int, ...]
    plan: Any


class Probe(NamedTuple):
    """Settings, which know a `quick` variant of themselves, and how the probe is carried out.

    The docstring of the module of its name says what is asked, at the head of its page, too, and
    its LEGEND above the table what the names of the figures mean.
    `check` refuses models that cannot do what is asked, before anything is written.
    """

    plan: Any
    action: Callable[[Any, Sequence[Model], Path], Outcome]
    check: Callable[[Sequence[Model]], object] = check_names


def each_has_text(models: Sequence[Model]) -> None:
    """Raise UserError for a model without a text tokenizer."""
    for model in models:
        text_of([model])


def on_sequences(
    action: Callable[[Plan, Sequence[Sequences], Path], Outcome],
) -> Callable[[Plan, Sequence[Model], Path], Outcome]:
    """Return a probe of sequences as a probe of the models that they come from."""

    def of_models(plan: Plan, models: Sequence[Model], folder: Path) -> Outcome:
        outcome = action(plan, sources_of(models, plan.pictures, plan.held_out, folder), folder)
        if any(model.text is not None for model in models):
            return outcome
        missing = "No model has a language: there are no captions to compare with."
        return replace(outcome, notes=f"{outcome.notes} {missing}".strip())

    return of_models


PROBES = {
    "shuffle": Probe(Plan(), on_sequences(shuffle)),
    "entropy": Probe(Plan(), on_sequences(entropy)),
    "prefix": Probe(LevelPlan(), prefix),
    "swap": Probe(LevelPlan(), swap),
    "synergy": Probe(Plan(), synergy, text_of),
    "length": Probe(VariantPlan(), length, each_can_vary),
    "ablate": Probe(VariantPlan(), ablate, each_can_vary),
    "scaling": Probe(ScalingPlan(), scaling, each_has_text),
}


def carry_out(
    name: str,
    models: Sequence[Model],
    out: Path,
    quick: bool = False,
    changes: Mapping[str, Any] | None = None,
) -> Outcome:
    """Carry a probe out in the folder `out`, or go on with it; returns its outcome.

    `quick` is a run of minutes that proves the machinery, not the claim; `changes` are fields of
    the plan, e.g. `{"course.train.steps": 2000}`. Raises UserError for an unknown probe or field,
    models of one name, and a folder of another probe; KeyboardInterrupt where a signal ends it.
    """
    check_name(name)
    check_plots()
    names = check_names(models)
    plan, action, check = PROBES[name]
    check(models)
    if quick:
        plan = plan.quick()
    plan = override(plan, changes or {})
    letters = fingerprints(models)
    check_different(names, list(zip(*letters, strict=True)))
    open_folder(out, Begun(name, names, *letters, plan))
    try:
        outcome = action(plan, models, out)
    except (UserError, KeyboardInterrupt):
        forget_folder(out)
        raise
    if quick:
        outcome = replace(outcome, verdict=f"(Quick: proves the machinery only.) {outcome.verdict}")
    module = import_module(f"ddt_llama.probes.{name}")
    question = inspect.getdoc(module) or ""
    close_folder(out, outcome, f"{name}: {', '.join(names)}", plan.about(), question, module.LEGEND)
    return outcome


def fingerprints(models: Sequence[Model]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return letters that stand for the tokenizers of each model, and its decoding steps."""
    letters = (
        fingerprint(model.tokenizer, getattr(model.tokenizer, "config", None), model.text)
        for model in models
    )
    return tuple(letters), tuple(model.settings.steps for model in models)


def check_different(names: Sequence[str], measured: Sequence[object]) -> None:
    """Raise UserError where two models are one to a probe: all that it measures is the same."""
    for place, (name, one) in enumerate(zip(names, measured, strict=True)):
        if one in measured[:place]:
            twin = names[measured.index(one)]
            raise UserError(f"{twin} and {name} have the same tokenizers; give one of them")


def check_name(name: str) -> None:
    """Raise UserError for an unknown probe."""
    if name not in PROBES:
        raise UserError(f"unknown probe {name!r}; the probes are: {', '.join(PROBES)}")
