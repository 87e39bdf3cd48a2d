"""Which of the choices in a DDT tokenizer matter? One at a time is made otherwise.

Every variant is trained and judged as the tokenizer "as it is", with the same seeds; differences
are taken seed by seed. A prediction of the velocity cannot learn from the network's own answers:
its base is the variant without them. Tokens that do not start in cells of a grid have no rows to be
written by: their base is what is written coarse to fine, as they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ddt_llama.evaluation.intervals import Figure
from ddt_llama.generation.model import Model
from ddt_llama.probes.base import Outcome
from ddt_llama.probes.variants import LEGEND as OF_VARIANTS
from ddt_llama.probes.variants import (
    MEASURED,
    QUANTITIES,
    TOLD,
    VariantPlan,
    base_of,
    differences,
    figures_of,
    judged,
)
from ddt_llama.recipes.sizes import EARLY_PIECES
from ddt_llama.recipes.tokenizer import TokenizerRecipe
from ddt_llama.tokenizer.encoder import Start

LEGEND = f"{OF_VARIANTS} more: than its base, seed by seed."
BASE = "as it is"
UNTOLD = "without own answers"  # the network's own, which it learns from in training
VELOCITY = "velocity"  # without own answers, too: it cannot learn from them
STARTS: Mapping[Start, str] = {
    "spatial": "in place",
    "pyramid": "as a pyramid",
    "normal": "anywhere",
}
ORDERS = {
    "coarse_to_fine": "coarse to fine",
    "fine_to_coarse": "fine to coarse",
    "raster": "in raster order",
}


def variants_of(base: TokenizerRecipe) -> dict[str, TokenizerRecipe]:
    """Return the recipe as it is, and with one thing changed, by what is changed."""
    network, objective = base.tokenizer, base.objective

    def changed(**fields: Any) -> TokenizerRecipe:
        return replace(base, tokenizer=replace(network, **fields))

    def taught(**fields: Any) -> TokenizerRecipe:
        return replace(base, objective=replace(objective, **fields))

    def started(start: Start) -> TokenizerRecipe:
        order = network.language_order
        if order == "raster" and start != "spatial":  # these have no rows
            order = "coarse_to_fine"
        return changed(
            encoder=replace(network.encoder, queries=start),
            decoder=replace(network.decoder, positions=start),
            language_order=order,
        )

    linear = network.pieces == (1.0,)
    hidden, static = objective.hide_fine > 0, network.decoder.token_stream == "static"
    velocity = replace(taught(own=0.0), tokenizer=replace(network, prediction="velocity"))
    return {
        BASE: base,
        **{
            f"written {told}": changed(language_order=order)
            for order, told in ORDERS.items()
            if order != network.language_order
        },
        f"k(t) {'early' if linear else 'linear'}": changed(
            pieces=EARLY_PIECES if linear else (1.0,)
        ),
        UNTOLD: taught(own=0.0),
        VELOCITY: velocity,
        f"gradients {'not ' if objective.balance else ''}weighed": taught(
            balance=not objective.balance
        ),
        f"fine end {'never' if hidden else 'sometimes'} hidden": taught(
            hide_fine=0.0 if hidden else 0.2
        ),
        f"token stream {'sees' if static else 'does not see'} x_t": changed(
            decoder=replace(network.decoder, token_stream="joint" if static else "static")
        ),
        **{
            f"queries start {told}": started(start)
            for start, told in STARTS.items()
            if start != network.encoder.queries
        },
    }


def ablate(plan: VariantPlan, models: Sequence[Model], folder: Path) -> Outcome:
    """Train every variant of each model's tokenizer with every seed, and compare."""
    figures: dict[str, Figure] = {}
    rows: dict[str, dict[str, Figure]] = {}
    told = []
    for model in models:
        variants = variants_of(base_of(plan, model))
        found = judged(plan, variants, model, folder)
        bases = {name: base_name(name, variants) for name in variants if name != BASE}
        apart = differences(found, bases, len(models))
        own = figures_of(found) | {
            f"{name}.{quantity}.more": figure
            for name, row in apart.items()
            for quantity, figure in row.items()
        }
        figures |= {f"{model.name}.{name}": figure for name, figure in own.items()}
        named = {label(name, bases[name]): row for name, row in apart.items()}
        told.append(f"{model.name} {verdict(named)}")
        for quantity in MEASURED:
            shown = {name: row[quantity] for name, row in named.items() if quantity in row}
            if shown:
                rows[f"{model.name}: {QUANTITIES[quantity]}, more than its base"] = shown
    after = f"After {plan.train.steps} steps of a tokenizer, {len(plan.seeds)} seeds"
    notes = (
        "Differences: how much seeds scatter is taken of all variants together, as if they "
        "scattered alike, and the intervals of all that the verdict looks at hold together."
    )
    return Outcome(figures, f"{after}: {'; '.join(told)}.", rows=rows, notes=notes)


def base_name(name: str, variants: Mapping[str, TokenizerRecipe]) -> str:
    """Return the variant that differs from another one in what its name says alone."""
    if name == VELOCITY:
        return UNTOLD
    written = f"written {ORDERS[variants[name].tokenizer.language_order]}"
    return written if written in variants and written != name else BASE


def label(name: str, base: str) -> str:
    """Return a variant with its base, where that is another one than most have."""
    return name if base == BASE else f"{name} (base: {base})"


def verdict(apart: Mapping[str, Mapping[str, Figure]]) -> str:
    """Say which changes are clearly seen, in what, and which are not."""
    parts, unseen = [], []
    for name, row in apart.items():
        seen = []
        for quantity, (unit, scale) in TOLD.items():
            one = row.get(quantity)
            if one is not None and (one.low > 0 or one.high < 0):
                value, low, high = (scale * x for x in (one.value, one.low, one.high))
                seen.append(f"{value:+.1f} {unit} ({low:+.1f} to {high:+.1f})")
        if seen:
            parts.append(f"{name} {' and '.join(seen)}")
        else:
            unseen.append(name)
    if unseen:
        parts.append(f"not told apart: {', '.join(unseen)}")
    return "; ".join(parts)
