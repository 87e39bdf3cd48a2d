"""Is the memory that `ddt plan` tells of what a training takes? Measured on a CPU.

Every case is trained for two steps by the true loop, in processes of its own, on numbers of the
shapes that the plan supposes. Told is the peak of the (main) process less what it held before its
model was built; a tiny training has run before, so that libraries are loaded. The state of the last
step is saved after the peak is read: on a CPU its copy would lie beside the next step.

glibc keeps small blocks that are freed, and often finds no room between them: how much a process
holds depends on that. Here blocks above 64 KiB are given back at once ("returned"); with --freed
kept memory is kept as trainings on a CPU do (`distributed.keep_freed_memory`).

    python scripts/plan_memory.py --out experiments/0051-plan-memory/figures.json
    python scripts/plan_memory.py --freed kept --out experiments/0051-plan-memory/kept.json
"""

import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import tyro

from ddt_llama import distributed
from ddt_llama.config import override, save_json
from ddt_llama.language import backbone
from ddt_llama.recipes.cost import longest_document, vocabulary_of
from ddt_llama.recipes.language import LanguageRecipe
from ddt_llama.recipes.memory import passed, sizes_of
from ddt_llama.recipes.named import Recipe, recipe_named
from ddt_llama.recipes.plan import Choice, fullest
from ddt_llama.recipes.tokenizer import SpatialRecipe
from ddt_llama.runs import Run
from ddt_llama.training.language import NextToken
from ddt_llama.training.loop import train

Freed = Literal["kept", "returned"]
STEPS = 2  # the moments of the optimizer are there from the second on


class Case(NamedTuple):
    """A recipe with other fields, trained by so many processes."""

    recipe: str
    fields: dict[str, Any]
    ranks: int = 1

    def build(self) -> Recipe:
        """Return the recipe, short; in float32, so that every CPU does the same."""
        fixed = {
            "train.steps": STEPS,
            "train.log_every": 1,
            "train.tensorboard": False,
            "train.prefetch": 0,
            "train.bf16": False,
            "train.compile": False,
            "train.optim.warmup": 0,
        }
        return override(recipe_named(self.recipe), {**fixed, **self.fields})


ADAMW = {"train.optim.kind": "adamw"}
WIDER = {"tokenizer.encoder.dim": 640, "tokenizer.decoder.dim": 640, "tokenizer.decoder.depth": 8}
WIDE = {"backbone.dim": 1024, "backbone.depth": 10, "backbone.mlp_dim": 2560}
FULL = {"train.shard": "full"}
CASES = {
    "tokenizer, small": Case("nano_tokenizer", {"train.batch": 24}),
    "tokenizer, middle": Case("small_tokenizer", {"train.batch": 8}),
    "tokenizer, large": Case("small_tokenizer", {"train.batch": 8, **WIDER}),
    "language, small": Case("nano_pretrain", {"train.batch": 8}),
    "language, middle": Case("small_pretrain", {"train.batch": 12}),
    "language, large": Case("small_pretrain", {"train.batch": 12, **WIDE}),
    "spatial, small": Case("spatial_nano", {"train.batch": 64}),
    "spatial, middle": Case("spatial_small", {"train.batch": 32}),
    "spatial, large": Case("spatial_small", {"train.batch": 96}),
    "AdamW, few documents": Case("small_pretrain", {"train.batch": 4, **WIDE, **ADAMW}),
    "Muon, few pictures": Case("spatial_small", {"train.batch": 2}),
    "recompute blocks": Case("small_pretrain", {"train.batch": 24, "train.recompute": "blocks"}),
    "recompute selective": Case(
        "small_tokenizer", {"train.batch": 8, "train.recompute": "selective"}
    ),
    "two passes a step": Case("small_pretrain", {"train.batch": 8, "train.accumulate": 2}),
    "two ranks, none": Case("small_pretrain", {"train.batch": 4, **WIDE, **ADAMW}, 2),
    "two ranks, full": Case("small_pretrain", {"train.batch": 4, **WIDE, **ADAMW, **FULL}, 2),
    "two ranks, full, Muon": Case("small_pretrain", {"train.batch": 8, **WIDE, **FULL}, 2),
}


def planned(case: Case) -> dict[str, float]:
    """Return what the plan says of the processes of a case, on this kind of device."""
    recipe = case.build()
    sizes = sizes_of(recipe)._replace(frozen=0)  # no tokenizer stands beside
    again, batch = recipe.train.recompute, recipe.train.batch // case.ranks
    one = passed(recipe, batch, kind="cpu", recompute=again, bf16=False)
    many, choice = recipe.train.accumulate > 1, Choice(recipe.train.shard, again)
    found = fullest(sizes, one.moments, choice, case.ranks, accumulates=many, low=False)
    return {**found._asdict(), "total": found.total}


def training(recipe: Recipe, folder: Path) -> int:
    """Train `recipe` on numbers of its shapes; return the most bytes that this process held."""
    rows = recipe.train.batch // distributed.world_size()
    if isinstance(recipe, LanguageRecipe):
        vocabulary = vocabulary_of(recipe)
        shape = rows, longest_document(recipe, vocabulary)
        ids = torch.randint(vocabulary.size, shape, generator=torch.Generator().manual_seed(0))
        model: Any = backbone.build(recipe.backbone, vocabulary)
        batch: Any = ids, ids.clone(), torch.ones_like(ids)
        objective: Any = NextToken(vocabulary, recipe.text_weight)
    else:
        model = recipe.build()
        recipe.equip(model)
        size = recipe.tokenizer.image_size
        batch = torch.rand(rows, 3, size, size) * 2 - 1
        objective = recipe.loss(batch[:2])
    with Run.create_or_resume(folder, recipe) as run:
        train(model, objective, lambda _: batch, recipe.train, run)
    if not distributed.is_main():
        return 0
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return int(json.loads(lines[-1])["memory_gib"] * 2**30)


def measured(name: str, folder: Path, freed: Freed) -> None:
    """Train one case in this process, in a folder of all its processes; print what it took."""
    if freed == "kept":
        distributed.setup()
    elif distributed.world_size() > 1:
        dist.init_process_group("gloo")
    recipe = CASES[name].build()
    training(tiny(recipe), folder / "tiny")
    before, peak = resident(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    took = training(recipe, folder / "run")
    if distributed.is_main():
        assert took > peak, "the tiny training was the larger one"
        print(took - before)
    distributed.teardown()


def tiny(recipe: Recipe) -> Recipe:
    """Return the same kind of training with hardly any size."""
    train = replace(recipe.train, batch=2, accumulate=1)
    if isinstance(recipe, LanguageRecipe):
        recipe = replace(recipe, train=train)
        return override(recipe, {"backbone.dim": 64, "backbone.depth": 1, "backbone.mlp_dim": 64})
    spatial = isinstance(recipe, SpatialRecipe)
    return replace(recipe_named("spatial_nano" if spatial else "nano_tokenizer"), train=train)


def resident() -> int:
    """Return the bytes of memory that this process holds now, nothing that was freed among them."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def compare(name: str, freed: Freed) -> dict[str, Any]:
    """Return a case's bytes as planned and as measured in processes of its own."""
    case = CASES[name]
    environment = dict(os.environ)
    if freed == "returned":
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    start = [sys.executable]
    if case.ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone"]
        start += ["--nproc-per-node", str(case.ranks)]
    with tempfile.TemporaryDirectory() as folder:
        own = [__file__, "--case", name, "--freed", freed, "--folder", folder]
        done = subprocess.run(
            [*start, *own], env=environment, check=True, stdout=subprocess.PIPE, text=True
        )
    took, plan = int(done.stdout.split()[-1]), planned(case)
    return {**case._asdict(), "planned": plan, "measured": took, "ratio": plan["total"] / took}


def main(
    case: str | None = None,
    freed: Freed = "returned",
    folder: Path | None = None,
    out: Path | None = None,
) -> None:
    """Compare the case, or all of them; `folder` is where one process of a case trains."""
    if case is not None and folder is not None:
        measured(case, folder, freed)
        return
    found: dict[str, Any] = {}
    for name in CASES if case is None else [case]:
        found[name] = one = compare(name, freed)
        plan, took = one["planned"]["total"] / 1e9, one["measured"] / 1e9
        print(f"{name:22} {plan:6.3f} GB planned {took:6.3f} measured", flush=True)
        if out is not None:
            save_json(out, found)


if __name__ == "__main__":
    tyro.cli(main)
