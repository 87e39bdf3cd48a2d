"""Do image tokens help a language model with text, or do they stand in its way?

The same small language model learns the same captions in the same order: alone, each followed by
the codes of its picture from one model after another, and each followed by noise of as many
symbols as each model has codes: the more symbols stand beside it, the less a caption weighs in the
loss, whatever they are. No code stands before a caption, so nothing is told; what differs is what
the same weights learn beside the text. Held-out captions alone are measured. Source: DDT-LLaMA,
which reports that text perplexity falls with DDT tokens and rises with spatial ones.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Generator, Tensor

from ddt_llama.evaluation.intervals import Figure, mean
from ddt_llama.generation.model import Model
from ddt_llama.probes.base import SEED, Outcome
from ddt_llama.probes.learn import Learned, Plan, learn_all
from ddt_llama.probes.sequences import Sequences, unseen
from ddt_llama.probes.sources import captions_of, encoded, text_of
from ddt_llama.reports.plots import Curves

ALONE = "text alone"
Texts = Sequence[Int[Tensor, " _"]]


def synergy(plan: Plan, models: Sequence[Model], folder: Path) -> Outcome:
    """Learn captions alone and beside codes with every seed; compare what captions then cost.

    Raises UserError where no model brings a text tokenizer.
    """
    text = text_of(models)
    texts = [torch.tensor(one) for one in captions_of(text, plan.pictures)]
    codes = {
        model.name: model.tokenizer.to_language(encoded(model.tokenizer, plan.pictures, model.name))
        for model in models
    }
    alphabet = max(model.tokenizer.codebook_size for model in models)
    sources = conditions(texts, text.size, codes, alphabet, plan.held_out)
    done = learn_all(plan, sources, ("native",), folder)
    learned = {
        source.name: [done[source.name, "native", s] for s in plan.seeds] for source in sources
    }
    lengths = {f"text + {name}": rows.shape[1] for name, rows in codes.items()}
    figures = gaps(learned, lengths)
    return Outcome(figures, verdict(lengths, figures), plots_of(learned))


def conditions(
    texts: Texts,
    text_size: int,
    codes: Mapping[str, Int[Tensor, "n _"]],
    alphabet: int,
    held_out: int,
) -> list[Sequences]:
    """Return captions alone, before codes, and before as much noise; held out: unseen captions.

    All have one alphabet, so that all begin from the same network.
    """
    generator = Generator().manual_seed(SEED)
    followed = {f"text + {name}": rows for name, rows in codes.items()}
    for length in sorted({rows.shape[1] for rows in codes.values()}):
        noise = torch.randint(alphabet, (len(texts), length), generator=generator)
        followed[noise_of(length)] = noise
    kept = unseen(texts[:-held_out], texts[-held_out:])
    found = [Sequences(ALONE, text_size + alphabet, tuple(texts[:-held_out]), kept)]
    for name, rows in followed.items():
        pairs = tuple(
            torch.cat([one, text_size + row])
            for one, row in zip(texts[:-held_out], rows[:-held_out], strict=True)
        )
        found.append(Sequences(name, text_size + alphabet, pairs, kept))
    return found


def noise_of(length: int) -> str:
    """Return the name of captions beside so many random symbols."""
    return f"text + {length} of noise"


def gaps(learned: Mapping[str, Sequence[Learned]], lengths: Mapping[str, int]) -> dict[str, Figure]:
    """Return bits and perplexity of an id of text, and what codes beside it add, seed by seed.

    `gap`: more than text alone; `to_noise`: more than beside as many symbols of noise.
    """
    figures = {}
    for name, runs in learned.items():
        figures[f"{name}.bits"] = mean([run.bits for run in runs])
        figures[f"{name}.perplexity"] = mean([2**run.bits for run in runs])
        if name != ALONE:
            pairs = zip(runs, learned[ALONE], strict=True)
            figures[f"{name}.gap"] = mean([run.bits - alone.bits for run, alone in pairs])
    for name, length in lengths.items():
        pairs = zip(learned[name], learned[noise_of(length)], strict=True)
        figures[f"{name}.to_noise"] = mean([run.bits - noise.bits for run, noise in pairs])
    return figures


def verdict(names: Iterable[str], figures: Mapping[str, Figure]) -> str:
    """Say in one sentence what codes beside it do to text, and what noise does."""
    told = []
    for name in names:
        one, apart = figures[f"{name}.gap"], figures[f"{name}.to_noise"]
        does = "helps" if one.high < 0 else "hurts" if one.low > 0 else "neither helps nor hurts"
        beside = name.removeprefix("text + ")
        told.append(
            f"{beside} {does} ({one.value:+.3f} bits, {one.low:+.3f} to {one.high:+.3f}; against "
            f"as much noise {apart.value:+.3f}, {apart.low:+.3f} to {apart.high:+.3f})"
        )
    bits = figures[f"{ALONE}.bits"].value
    return f"Beside captions ({bits:.3f} bits an id alone) {'; '.join(told)}."


def plots_of(learned: Mapping[str, Sequence[Learned]]) -> dict[str, Curves]:
    """Return held-out bits an id over the captions seen, one seed."""
    curves: Curves = {}
    for name, runs in learned.items():
        seen, bits = zip(*runs[0].curve, strict=True)
        curves[name] = ([float(x) for x in seen], list(bits))
    return {"bits an id of text": curves}
