"""Do image tokens help a language model with text, or do they stand in its way?

The same small language model learns the same captions in the same order: alone, each followed by
the codes of its picture from one model after another, and each followed by the codes of another
caption's picture. No code stands before a caption, so nothing is told; what differs is what the
same weights learn beside the text. Whatever stands beside it, a caption weighs less in the loss and
shares its weights with another language; with another's codes that is all, with its own there is
something to learn of what the words mean. Every caption ends with a mark, so that its end is to be
known in all cases. Held-out captions alone are measured. Source: DDT-LLaMA, which reports that text
perplexity falls with DDT tokens and rises with spatial ones.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from ddt_llama.evaluation.intervals import Figure, mean
from ddt_llama.generation.model import Model
from ddt_llama.probes.base import Outcome, Plot, between, closed, told
from ddt_llama.probes.learn import Learned, Plan, learn_all
from ddt_llama.probes.sequences import Sequences, unseen
from ddt_llama.probes.sources import captions_of, encoded, scenes_to_learn, text_of

ALONE = "text alone"
LEGEND = (
    "CONDITION.bits, perplexity: of an id of held-out captions; gap: bits an id more than after "
    "text alone (below 0: codes help); to_others: bits an id more than beside the codes of other "
    "pictures (below 0: it helps that they are the picture's own); A less B: A minus B."
)
Texts = Sequence[Int[Tensor, " _"]]


def synergy(plan: Plan, models: Sequence[Model], folder: Path) -> Outcome:
    """Learn captions alone and beside codes with every seed; compare what captions then cost.

    Raises UserError where no model brings a text tokenizer.
    """
    text = text_of(models)
    texts = [torch.tensor([*one, text.size]) for one in captions_of(text, plan.pictures)]
    codes = {
        model.name: model.tokenizer.to_language(
            encoded(
                model.tokenizer,
                scenes_to_learn(plan.pictures, model.tokenizer.image_size),
                model.name,
                folder,
            )
        )
        for model in models
    }
    alphabet = max(model.tokenizer.codebook_size for model in models)
    sources = conditions(texts, text.size + 1, codes, alphabet, plan.held_out)
    done = learn_all(plan, sources, ("native",), folder)
    learned = {
        source.name: [done[source.name, "native", s] for s in plan.seeds] for source in sources
    }
    apart = between({name: more(learned, beside(name), of_others(name)) for name in codes})
    figures = gaps(learned, tuple(codes))
    figures |= {f"{pair}.to_others": figure for pair, figure in apart.items()}
    notes = f"Held out: {len(sources[0].held_out)} captions that do not occur in training."
    lines = {name: [run.curve for run in runs] for name, runs in learned.items()}
    title = f"held-out captions, {len(plan.seeds)} seeds"
    plots = {title: Plot.of_seeds(lines, "captions seen", "bits an id of text")}
    return Outcome(figures, verdict(plan, tuple(codes), figures, apart), plots, notes=notes)


def beside(model: str) -> str:
    """Return the name of captions with the codes of their own pictures."""
    return f"text + {model}"


def of_others(model: str) -> str:
    """Return the name of captions with the codes of other pictures."""
    return f"text + {model} of other pictures"


def conditions(
    texts: Texts,
    text_size: int,
    codes: Mapping[str, Int[Tensor, "n _"]],
    alphabet: int,
    held_out: int,
) -> list[Sequences]:
    """Return captions alone, before their codes, and before others'; held out: unseen captions.

    All have one alphabet, text and `alphabet` codes, so that all begin from the same network.
    """
    kept = unseen(texts[:-held_out], texts[-held_out:])
    learned = texts[:-held_out]
    found = [Sequences(ALONE, text_size + alphabet, tuple(learned), kept)]
    for name, rows in codes.items():
        own = rows[:-held_out]
        for told_by, followed in ((beside(name), own), (of_others(name), own.roll(1, 0))):
            pairs = tuple(
                torch.cat([one, text_size + row])
                for one, row in zip(learned, followed, strict=True)
            )
            found.append(Sequences(told_by, text_size + alphabet, pairs, kept))
    return found


def more(learned: Mapping[str, Sequence[Learned]], one: str, other: str) -> list[float]:
    """Return how many bits an id more one condition costs than another, seed by seed."""
    return [a.bits - b.bits for a, b in zip(learned[one], learned[other], strict=True)]


def gaps(learned: Mapping[str, Sequence[Learned]], models: Sequence[str]) -> dict[str, Figure]:
    """Return bits and perplexity of an id of text, and what codes beside it add, seed by seed.

    `gap`: more than text alone; `to_others`: more than beside the codes of other pictures.
    """
    figures = {}
    for name, runs in learned.items():
        figures[f"{name}.bits"] = mean([run.bits for run in runs])
        figures[f"{name}.perplexity"] = mean([2**run.bits for run in runs])
        if name != ALONE:
            figures[f"{name}.gap"] = mean(more(learned, name, ALONE))
    for model in models:
        figures[f"{beside(model)}.to_others"] = mean(more(learned, beside(model), of_others(model)))
    return figures


def verdict(
    plan: Plan,
    models: Sequence[str],
    figures: Mapping[str, Figure],
    apart: Mapping[str, Figure],
) -> str:
    """Say in a sentence what codes do to text, what their meaning does, and how models differ."""
    each = []
    for model in models:
        gap, own = (figures[f"{beside(model)}.{name}"] for name in ("gap", "to_others"))
        does = "helps" if own.high < 0 else "hurts" if own.low > 0 else "is not seen to matter"
        each.append(
            f"of {model} it {does} that they are the picture's own ({told(own, 3, sign='+')} bits "
            f"an id; in all, text weighing less beside codes, {told(gap, 3, sign='+')})"
        )
    bits = figures[f"{ALONE}.bits"].value
    sentence = (
        f"After {plan.course.effort()}, of codes beside captions ({bits:.3f} bits an id alone): "
        f"{'; '.join(each)}"
    )
    return closed(sentence, apart, 3, "what their meaning does: ")
