"""Do image tokens help a language model with text, or do they stand in its way?

The same small language model learns the same captions in the same order: alone, each followed by
the codes of its picture from one model after another, and each followed by noise of as many
symbols as each model has codes, of as many kinds: the more symbols stand beside it, the less a
caption weighs in the loss, whatever they are, so codes are judged against noise. No code stands
before a caption, so nothing is told; what differs is what the same weights learn beside the text.
Every caption ends with a mark, so that its end is to be known in all cases. Held-out captions alone
are measured. Source: DDT-LLaMA, which reports that text perplexity falls with DDT tokens and rises
with spatial ones.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Generator, Tensor

from ddt_llama.evaluation.intervals import Figure, mean
from ddt_llama.generation.model import Model
from ddt_llama.probes.base import SEED, Outcome, Plot, between, closed, over_seeds, told
from ddt_llama.probes.learn import Learned, Plan, learn_all
from ddt_llama.probes.sequences import Sequences, unseen
from ddt_llama.probes.sources import captions_of, encoded, text_of

ALONE = "text alone"
Texts = Sequence[Int[Tensor, " _"]]


def synergy(plan: Plan, models: Sequence[Model], folder: Path) -> Outcome:
    """Learn captions alone and beside codes with every seed; compare what captions then cost.

    Raises UserError where no model brings a text tokenizer.
    """
    text = text_of(models)
    texts = [torch.tensor([*one, text.size]) for one in captions_of(text, plan.pictures)]
    codes = {
        model.name: model.tokenizer.to_language(encoded(model.tokenizer, plan.pictures, model.name))
        for model in models
    }
    sizes = {model.name: model.tokenizer.codebook_size for model in models}
    sources = conditions(texts, text.size + 1, codes, sizes, plan.held_out)
    done = learn_all(plan, sources, ("native",), folder)
    learned = {
        source.name: [done[source.name, "native", s] for s in plan.seeds] for source in sources
    }
    noises = {name: noise_of(rows.shape[1], sizes[name]) for name, rows in codes.items()}
    apart = between({name: [run.bits for run in learned[f"text + {name}"]] for name in codes})
    figures = gaps(learned, noises) | {f"{name}.bits": figure for name, figure in apart.items()}
    notes = f"Held out: {len(sources[0].held_out)} captions that do not occur in training."
    curves = {name: over_seeds([run.curve for run in runs]) for name, runs in learned.items()}
    title = f"held-out captions, mean of {len(plan.seeds)} seeds"
    plots = {title: Plot(curves, "captions seen", "bits an id of text")}
    return Outcome(figures, verdict(plan, noises, figures, apart), plots, notes=notes)


def conditions(
    texts: Texts,
    text_size: int,
    codes: Mapping[str, Int[Tensor, "n _"]],
    codebook_sizes: Mapping[str, int],
    held_out: int,
) -> list[Sequences]:
    """Return captions alone, before codes, and before as much noise; held out: unseen captions.

    All have one alphabet, so that all begin from the same network.
    """
    alphabet = max(codebook_sizes.values())
    followed = {f"text + {name}": rows for name, rows in codes.items()}
    for length, size in sorted({(codes[name].shape[1], codebook_sizes[name]) for name in codes}):
        generator = Generator().manual_seed(SEED)
        noise = torch.randint(size, (len(texts), length), generator=generator)
        followed[noise_of(length, size)] = noise
    kept = unseen(texts[:-held_out], texts[-held_out:])
    found = [Sequences(ALONE, text_size + alphabet, tuple(texts[:-held_out]), kept)]
    for name, rows in followed.items():
        pairs = tuple(
            torch.cat([one, text_size + row])
            for one, row in zip(texts[:-held_out], rows[:-held_out], strict=True)
        )
        found.append(Sequences(name, text_size + alphabet, pairs, kept))
    return found


def noise_of(length: int, size: int) -> str:
    """Return the name of captions beside so many random symbols of so many kinds.

    >>> noise_of(64, 16384)
    'text + 64 symbols of noise of 16384 kinds'
    """
    return f"text + {length} symbols of noise of {size} kinds"


def gaps(learned: Mapping[str, Sequence[Learned]], noises: Mapping[str, str]) -> dict[str, Figure]:
    """Return bits and perplexity of an id of text, and what codes beside it add, seed by seed.

    `gap`: more than text alone; `to_noise`: more than beside as much noise, whose condition
    `noises` names by model.
    """
    figures = {}
    for name, runs in learned.items():
        figures[f"{name}.bits"] = mean([run.bits for run in runs])
        figures[f"{name}.perplexity"] = mean([2**run.bits for run in runs])
        if name != ALONE:
            pairs = zip(runs, learned[ALONE], strict=True)
            figures[f"{name}.gap"] = mean([run.bits - alone.bits for run, alone in pairs])
    for model, noise in noises.items():
        name = f"text + {model}"
        pairs = zip(learned[name], learned[noise], strict=True)
        figures[f"{name}.to_noise"] = mean([run.bits - other.bits for run, other in pairs])
    return figures


def verdict(
    plan: Plan,
    models: Iterable[str],
    figures: Mapping[str, Figure],
    apart: Mapping[str, Figure],
) -> str:
    """Say in a sentence what codes do to text that noise does not, and how models differ."""
    each = []
    for model in models:
        one, alone = (figures[f"text + {model}.{name}"] for name in ("to_noise", "gap"))
        does = "help" if one.high < 0 else "hurt" if one.low > 0 else "neither help nor hurt"
        each.append(
            f"those of {model} {does} ({told(one, 3, sign='+')} bits an id; against text alone "
            f"{told(alone, 3, sign='+')})"
        )
    bits = figures[f"{ALONE}.bits"].value
    sentence = (
        f"After {plan.lesson.effort()}, beside captions ({bits:.3f} bits an id alone) and against "
        f"as much noise, codes: {'; '.join(each)}"
    )
    return closed(sentence, apart, 3)
