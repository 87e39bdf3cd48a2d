"""How soon does a language model know which of several phrases is meant?

Trains small models from nothing on words alone: the description of a scene, then questions about
it, for which one phrase of the description has to be found. Every few steps: the share of answers
to unseen scenes that are right word by word, by kind of question ("place": what is at the top
left? "where": where is the red ring?). One run a start of the heads (at random, or looking back)
and rotary base. Writes metrics.json and binding.png.

    python scripts/binding_study.py --out experiments/0020-phrases
"""

import time
from collections import defaultdict
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from tqdm import tqdm

from ddt_llama.config import save_json
from ddt_llama.language import TextTokenizer, Vocabulary, backbone, collate, render
from ddt_llama.language.documents import IGNORED, Batch, Document, Text
from ddt_llama.language.heads import look_back
from ddt_llama.recipes.sizes import LANGUAGE_MUON
from ddt_llama.shapes.captions import description
from ddt_llama.shapes.questions import QuestionKind, question
from ddt_llama.shapes.scene import sample_scene
from ddt_llama.training.optim import Optimizer

ASKED: tuple[QuestionKind, ...] = ("list", "where", "relation", "place", "existence", "colour")
BASES = (10_000.0, 100.0)
TESTED = 0x7E57_0000  # scenes from this number on are not trained on
TESTS = 96


def lesson(number: int) -> tuple[Document, list[str]]:
    """Return a description with questions, and their kinds."""
    scene = sample_scene(0, number, min_objects=2)
    count = len(ASKED)
    asked = [question(scene, 0, count * number + n, kind) for n, kind in enumerate(ASKED)]
    asked = list({one.question: one for one in asked}.values())
    turns = tuple(((Text(one.question),), Text(one.reasoned)) for one in asked)
    first = (Text(description(scene)), *turns[0][0])
    return Document("ask", first, turns[0][1], turns[1:]), [one.kind for one in asked]


class School:
    """The words, and what is trained and tested on."""

    def __init__(self) -> None:
        """Train the text tokenizer."""
        said = [lesson(number)[0] for number in range(500)]
        texts = [part.text for one in said for part in one.given if isinstance(part, Text)]
        texts += [a.text for one in said for _, a in one.further if isinstance(a, Text)]
        self.text = TextTokenizer.train(texts, 512)
        self.vocabulary = Vocabulary(self.text.size, 16, 4)
        self.tests = [lesson(TESTED + number) for number in range(TESTS)]

    def batch(self, lessons: list[Document]) -> Batch:
        """Return ids and labels of lessons."""
        rows = [render(one, self.vocabulary, self.text) for one in lessons]
        return collate(rows, self.vocabulary.pad)

    @torch.no_grad()
    def right(self, model: Any) -> dict[str, float]:
        """Return the share of answers all of whose ids are the likeliest, by kind."""
        batch = self.batch([one for one, _ in self.tests])
        with torch.autocast("cpu", torch.bfloat16):
            best = model(batch.ids, use_cache=False).logits[:, :-1].argmax(-1)
        labels = batch.labels[:, 1:]
        shares: dict[str, list[bool]] = defaultdict(list)
        for row, (_, kinds) in enumerate(self.tests):
            places = (labels[row] != IGNORED).nonzero()[:, 0].tolist()
            answers: list[list[int]] = []
            for place in places:  # an answer is a run of supervised ids
                if answers and answers[-1][-1] == place - 1:
                    answers[-1].append(place)
                else:
                    answers.append([place])
            for kind, answer in zip(kinds, answers, strict=True):
                shares[kind].append(bool((best[row, answer] == labels[row, answer]).all()))
        return {kind: sum(each) / len(each) for kind, each in shares.items()}


def train(
    school: School, *, back: bool, base: float, steps: int, every: int
) -> list[dict[str, float]]:
    """Train one model and return what was right along the way."""
    shape = replace(backbone.nano(), rope_theta=base)
    model: Any = backbone.build(shape, school.vocabulary)
    if back:
        look_back(model)
    model.set_attn_implementation("eager")
    optimizer = Optimizer(model, replace(LANGUAGE_MUON, warmup=50, floor=1.0), steps)
    curve: list[dict[str, float]] = []
    began = time.perf_counter()
    for step in tqdm(range(steps), named(back, base)):
        batch = school.batch([lesson(32 * step + row)[0] for row in range(32)])
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch.ids, use_cache=False).logits.float()
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
        loss.backward()
        optimizer.clip(1.0)
        optimizer.step(step)
        if (step + 1) % every == 0:
            seconds = time.perf_counter() - began
            curve.append({"step": step + 1, "seconds": round(seconds, 1), **school.right(model)})
            tqdm.write(str({name: round(value, 3) for name, value in curve[-1].items()}))
    return curve


def named(back: bool, base: float) -> str:
    """Name a run."""
    return f"{'looking back' if back else 'random'}, base {base:,.0f}"


def main(out: Path, steps: int = 300, every: int = 25) -> None:
    """Train each start with each rotary base on the same lessons."""
    import matplotlib.pyplot as plt

    school = School()
    out.mkdir(parents=True, exist_ok=True)
    curves = {}
    for back, base in product((True, False), BASES):
        curve = train(school, back=back, base=base, steps=steps, every=every)
        curves[named(back, base)] = curve
        save_json(out / "metrics.json", curves)
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.6), sharey=True, layout="constrained")
    for axis, kind in zip(axes, ("place", "where", "relation"), strict=True):
        for name, curve in curves.items():
            axis.plot([row["step"] for row in curve], [row[kind] for row in curve], label=name)
        axis.set(title=kind, xlabel="steps of 32 documents", ylim=(0, 1))
    axes[0].set_ylabel("answers right")
    axes[0].legend()
    figure.savefig(out / "binding.png", dpi=120)


if __name__ == "__main__":
    tyro.cli(main)
