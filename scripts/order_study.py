"""In which order, and from which start, does a language model learn the codes of images fastest?

Trains the nano backbone on captions and codes of the shapes world, one run a setting, all on the
same documents in the same order, the loss on codes alone; reports nats a code on documents that no
run sees. Permuting a sequence changes no information in it, so the losses compare.
Writes metrics.jsonl and plot.png.

    python scripts/order_study.py raster+codebook coarse_to_fine+random --out experiments/0006-order
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, get_args

import matplotlib
import torch
import tyro
from matplotlib import pyplot
from torch import Tensor
from tqdm import tqdm

from ddt_llama.generation.release import find
from ddt_llama.language import TextTokenizer, Vocabulary, backbone, collate, documents, render
from ddt_llama.language.codes import place_codes
from ddt_llama.recipes import recipe_named
from ddt_llama.recipes.drafts import Picture
from ddt_llama.recipes.language import Coder
from ddt_llama.shapes.world import ShapesSource
from ddt_llama.tokenizer import TimestepTokenizer
from ddt_llama.tokenizer.schedule import LanguageOrder, TokenSchedule
from ddt_llama.training.language import NextToken
from ddt_llama.training.optim import Optimizer

UNSEEN = 512  # documents
CPU = torch.device("cpu")


class Documents:
    """Captions and codes (index order) of the first scenes of the shapes world."""

    def __init__(self, tokenizer: TimestepTokenizer, count: int) -> None:
        """Encode every scene once."""
        self.tokenizer = tokenizer
        self.source = ShapesSource(seed=0, max_objects=4)
        coder = Coder(tokenizer, CPU, bf16=False)
        rows: list[list[int]] = []
        for start in tqdm(range(0, count, 256), desc="encoding", unit_scale=256):
            scenes = [self.source.scene(i) for i in range(start, min(count, start + 256))]
            rows += coder([Picture(scene) for scene in scenes])
        self.codes = tokenizer.from_language(torch.tensor(rows))
        self.text = TextTokenizer.train([self.source[i].text for i in range(20_000)], 1024)
        self.vocabulary = Vocabulary(self.text.size, tokenizer.codebook_size, tokenizer.num_tokens)

    def batch(self, places: list[int], order: TokenSchedule) -> tuple[Tensor, ...]:
        """Return the documents at `places`, only codes supervised."""
        codes = order.to_language(self.codes[places]).tolist()
        rows = [
            render(documents.text_to_image(self.source[i].text, row), self.vocabulary, self.text)
            for i, row in zip(places, codes, strict=True)
        ]
        ids, labels, mask = collate(rows, self.vocabulary.pad, max(len(r.ids) for r in rows))
        return ids, labels.masked_fill(~self.vocabulary.is_code(labels), -100), mask


def losses(data: Documents, setting: str, theta: float, steps: int, seed: int) -> Iterator[dict]:
    """Train one setting, ORDER+START, and yield its unseen loss along the way."""
    recipe: Any = recipe_named("nano_pretrain")
    order, _, start = setting.partition("+")
    if order not in get_args(LanguageOrder) or start not in ("codebook", "random"):
        raise SystemExit(f"{setting}: give ORDER+START, such as raster+codebook")
    schedule = TokenSchedule(data.tokenizer.num_tokens, language_order=order)  # type: ignore[arg-type]
    model = backbone.build(replace(recipe.backbone, rope_theta=theta), data.vocabulary, seed=seed)
    if start == "codebook":
        place_codes(model, data.vocabulary, data.tokenizer.code_vectors(), seed)
    objective = NextToken(data.vocabulary)
    objective.before_step(model, 0)
    optimizer = Optimizer(model, recipe.train.optim, steps)
    seen = len(data.codes) - UNSEEN
    unseen = [list(range(i, i + 64)) for i in range(seen, seen + UNSEEN, 64)]
    generator = torch.Generator().manual_seed(seed)
    for step in tqdm(range(1, steps + 1), desc=setting):
        places = torch.randint(seen, (recipe.train.batch,), generator=generator).tolist()
        loss, _ = objective(model, data.batch(places, schedule), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.clip(1.0)
        optimizer.step(step - 1)
        if step % max(1, steps // 4) == 0 or step == steps:
            with torch.no_grad():
                found = [objective(model, data.batch(rows, schedule), 0)[0] for rows in unseen]
            mean = float(torch.stack(found).mean())
            yield {
                "setting": setting,
                "theta": theta,
                "seed": seed,
                "documents": step * recipe.train.batch,
                "nats": mean,
            }


def main(
    settings: Annotated[tuple[str, ...], tyro.conf.Positional],
    out: Path,
    tokenizer: str = "nano",
    scenes: int = 40_000,
    steps: int = 140,
    theta: float = 100.0,
    seed: int = 0,
) -> None:
    """Train every setting and write what was measured; lines of earlier calls are kept."""
    data = Documents(TimestepTokenizer.load(find(tokenizer) / "tokenizer"), scenes)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "metrics.jsonl"
    for setting in settings:
        for line in losses(data, setting, theta, steps, seed):
            print(line)
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
    matplotlib.use("Agg")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for name in dict.fromkeys((row["setting"], row["theta"], row["seed"]) for row in lines):
        rows = [row for row in lines if (row["setting"], row["theta"], row["seed"]) == name]
        label = f"{name[0]}, theta {name[1]:g}"
        pyplot.plot([r["documents"] for r in rows], [r["nats"] for r in rows], "o-", label=label)
    pyplot.xlabel("documents")
    pyplot.ylabel("nats a code, unseen scenes")
    pyplot.legend()
    pyplot.tight_layout()
    pyplot.savefig(out / "plot.png", dpi=110)


if __name__ == "__main__":
    tyro.cli(main)
