"""What makes a language model learn the codes of images fastest?

Trains the nano backbone on captions and codes of the shapes world, one run a trial, all on the same
documents in the same order, the loss on codes alone; reports nats a code on documents that no run
sees, for all codes and for those of patches that hold more than background. A trial is the order of
the codes, the start of their rows and any fields of the recipe nano_pretrain, joined by "+". A
permutation changes no information in a sequence, so the losses of two orders compare.
Writes metrics.jsonl and plot.png.

    python scripts/language_study.py raster+codebook coarse_to_fine+random --out DIR
    python scripts/language_study.py raster+codebook+backbone.row_std=0.02 --out DIR
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args

import matplotlib
import torch
import tyro
from matplotlib import pyplot
from torch import Tensor
from tqdm import tqdm

from ddt_llama import distributed
from ddt_llama.config import override
from ddt_llama.generation.release import find
from ddt_llama.language import TextTokenizer, Vocabulary, backbone, collate, documents, render
from ddt_llama.language.codes import place_codes
from ddt_llama.recipes import recipe_named
from ddt_llama.recipes.drafts import Picture
from ddt_llama.recipes.language import Coder, LanguageRecipe
from ddt_llama.shapes.render import render as render_scenes
from ddt_llama.shapes.world import ShapesSource
from ddt_llama.tokenizer import TimestepTokenizer
from ddt_llama.tokenizer.schedule import LanguageOrder, TokenSchedule
from ddt_llama.training.language import NextToken, head_loss, supervised_hidden
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
        rows: list[Tensor] = []
        flat: list[Tensor] = []
        for start in tqdm(range(0, count, 256), desc="encoding", unit_scale=256):
            scenes = [self.source.scene(i) for i in range(start, min(count, start + 256))]
            rows.append(coder([Picture(scene) for scene in scenes]))
            if start + 256 > count - UNSEEN:
                flat.append(self.is_flat(render_scenes(scenes, tokenizer.image_size)))
        self.codes = tokenizer.from_language(torch.cat(rows))
        self.flat = tokenizer.from_language(torch.cat(flat)[-UNSEEN:].long()).bool()
        self.text = TextTokenizer.train([self.source[i].text for i in range(20_000)], 1024)
        self.vocabulary = Vocabulary(self.text.size, tokenizer.codebook_size, tokenizer.num_tokens)

    def is_flat(self, images: Tensor) -> Tensor:
        """Say which patches are of one colour, in raster order, as the language of nano is."""
        patches = self.tokenizer.to_patches(images).unflatten(-1, (-1, images.shape[1]))
        return (patches.amax(2) - patches.amin(2)).amax(-1) < 0.01

    def batch(self, places: list[int], order: TokenSchedule) -> tuple[Tensor, ...]:
        """Return the documents at `places`, only codes supervised."""
        codes = order.to_language(self.codes[places]).tolist()
        rows = [
            render(documents.text_to_image(self.source[i].text, row), self.vocabulary, self.text)
            for i, row in zip(places, codes, strict=True)
        ]
        ids, labels, mask, *_ = collate(rows, self.vocabulary.pad)
        return ids, labels.masked_fill(~self.vocabulary.is_code(labels), -100), mask


def losses(data: Documents, trial: str, steps: int, seed: int) -> Iterator[dict]:
    """Train one trial and yield its unseen loss along the way."""
    order, start, *fields = trial.split("+")
    orders: dict[str, LanguageOrder] = {name: name for name in get_args(LanguageOrder)}
    if order not in orders or start not in ("codebook", "random"):
        raise SystemExit(f"{trial}: give ORDER+START, such as raster+codebook, and fields behind")
    recipe = recipe_named("nano_pretrain")
    assert isinstance(recipe, LanguageRecipe)
    recipe = override(recipe, dict(field.split("=", 1) for field in fields))
    schedule = TokenSchedule(data.tokenizer.num_tokens, language_order=orders[order])
    model = backbone.build(recipe.backbone, data.vocabulary, seed=seed)
    if start == "codebook":
        place_codes(model, data.vocabulary, data.tokenizer.code_vectors(), seed)
    objective = NextToken(data.vocabulary)
    objective.before_step(model, 0)
    optimizer = Optimizer(model, recipe.train.optim, steps)
    seen, batch = len(data.codes) - UNSEEN, recipe.train.batch
    generator = torch.Generator().manual_seed(seed)
    for step in tqdm(range(1, steps + 1), desc=trial):
        places = torch.randint(seen, (batch,), generator=generator).tolist()
        with distributed.autocast(CPU, True):
            loss, _ = objective(model, data.batch(places, schedule), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.clip(1.0)
        optimizer.step(step - 1)
        if step % max(1, steps // 4) == 0 or step == steps:
            each = torch.cat(list(unseen_losses(data, model, schedule)))
            objects = each[schedule.to_language(data.flat.long()) == 0]
            figures = {"nats": float(each.mean()), "nats.objects": float(objects.mean())}
            yield {"trial": trial, "seed": seed, "documents": step * batch, **figures}


@torch.no_grad()
def unseen_losses(data: Documents, model: Any, order: TokenSchedule) -> Iterator[Tensor]:
    """Yield the loss of every code of the unseen documents: `b k`, in language order."""
    seen = len(data.codes) - UNSEEN
    for first in range(seen, len(data.codes), 64):
        ids, labels, _ = data.batch(list(range(first, min(first + 64, len(data.codes)))), order)
        targets = labels[:, 1:]
        wanted = targets != documents.IGNORED
        with distributed.autocast(CPU, True):
            each = head_loss(model, supervised_hidden(model, ids, wanted), targets[wanted])[1]
        yield each.view(len(ids), -1)


def main(
    trials: Annotated[tuple[str, ...], tyro.conf.Positional],
    out: Path,
    tokenizer: str = "nano",
    scenes: int = 10_000,
    steps: int = 256,
    seed: int = 0,
) -> None:
    """Train every trial and write what was measured; lines of earlier calls are kept."""
    data = Documents(TimestepTokenizer.load(find(tokenizer) / "tokenizer"), scenes)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "metrics.jsonl"
    for trial in trials:
        for line in losses(data, trial, steps, seed):
            print(line)
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
    matplotlib.use("Agg")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for name, run in dict.fromkeys((row["trial"], row["seed"]) for row in lines):
        rows = [row for row in lines if (row["trial"], row["seed"]) == (name, run)]
        pyplot.plot([r["documents"] for r in rows], [r["nats"] for r in rows], "o-", label=name)
    pyplot.xlabel("documents")
    pyplot.ylabel("nats a code, unseen scenes")
    pyplot.legend()
    pyplot.tight_layout()
    pyplot.savefig(out / "plot.png", dpi=110)


if __name__ == "__main__":
    tyro.cli(main)
