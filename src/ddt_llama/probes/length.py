"""How many tokens should an image have?

The tokenizer of each model is trained anew with 8, 16, 32, 64 and 128 tokens, everything else the
same: what more tokens give in fidelity, and what they cost a language model that has to write them.
Networks differ by two rows a token alone.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ddt_llama.evaluation.intervals import Figure
from ddt_llama.generation.model import Model
from ddt_llama.probes.base import Outcome, Plot, percent, told
from ddt_llama.probes.variants import LEGEND as OF_VARIANTS
from ddt_llama.probes.variants import (
    MEASURED,
    QUANTITIES,
    VariantPlan,
    base_of,
    figures_of,
    judged,
)

LEGEND = OF_VARIANTS
LENGTHS = (8, 16, 32, 64, 128)


def length(plan: VariantPlan, models: Sequence[Model], folder: Path) -> Outcome:
    """Train each tokenizer in every length with every seed."""
    figures: dict[str, Figure] = {}
    plots: dict[str, Plot] = {}
    told = []
    for model in models:
        base = base_of(plan, model)
        variants = {
            f"{count} tokens": replace(base, tokenizer=replace(base.tokenizer, num_tokens=count))
            for count in LENGTHS
        }
        found = judged(plan, variants, model, folder)
        own = figures_of(found)
        figures |= {f"{model.name}.{name}": figure for name, figure in own.items()}
        told.append(f"{model.name}: {verdict(own)}")
        for quantity in (one for one in MEASURED if f"{LENGTHS[0]} tokens.{one}" in own):
            lines = [
                [
                    (float(count), runs[seed][quantity])
                    for count, runs in zip(LENGTHS, found.values(), strict=True)
                ]
                for seed in range(len(plan.seeds))
            ]
            title = f"{QUANTITIES[quantity]}, {len(plan.seeds)} seeds"
            plots[f"{model.name}: {title}"] = Plot.of_seeds(
                {"": lines}, "tokens an image", QUANTITIES[quantity]
            )
    return Outcome(figures, f"{'; '.join(told)}.", plots)


def verdict(figures: dict[str, Figure]) -> str:
    """Say what each length reaches."""
    parts = []
    for count in LENGTHS:
        dB = figures[f"{count} tokens.psnr"]
        part = f"{count} tokens give {told(dB, 1)} dB"
        if (shapes := figures.get(f"{count} tokens.shapes")) is not None:
            part += f" and {percent(shapes)} of the objects"
        parts.append(part)
    return ", ".join(parts)
