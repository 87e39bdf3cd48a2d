"""A training before it is run: which memory every accelerator needs, and how long all of them take.

Memory at the fullest moment of a step is put together from what `memory` counts, as the loop, the
optimizer and FSDP2 hold it; time is FLOPs by formula over what data sheets promise, times a
utilisation that is assumed. CPU trainings hold the memory against measurements
(experiments/0051); time was held against nothing but the published runs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from ddt_llama.config import UserError, to_dict
from ddt_llama.hardware import ACCELERATORS
from ddt_llama.recipes.cost import as_started, cost_of, longest_document, vocabulary_of
from ddt_llama.recipes.formulas import BACKWARD, BFLOAT16, FLOAT32
from ddt_llama.recipes.language import LanguageRecipe
from ddt_llama.recipes.memory import (
    Held,
    Pass,
    Sizes,
    batches,
    encoding,
    passed,
    sizes_of,
)
from ddt_llama.recipes.named import Recipe, recipe_named
from ddt_llama.training.sharding import Recompute, Shard

# Of the memory on the data sheet: the rest is left to the driver, to messages between accelerators
# and to holes between blocks.
USABLE = 0.9
NODE = 8  # accelerators of a machine
MOST = 2**20  # samples of a pass that are asked for
RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "blocks")
HOURS = 3600


class Choice(NamedTuple):
    """How a training is spread."""

    shard: Shard
    recompute: Recompute
    offload: bool = False

    def shards(self, gpus: int) -> int:
        """Return the number of pieces that weights, gradients and moments are in."""
        return {"none": 1, "full": gpus, "hybrid": min(gpus, NODE)}[self.shard]

    @property
    def name(self) -> str:
        """The field train.shard, and whether shards lie in the memory of the CPU."""
        return f"{self.shard}, offload" if self.offload else self.shard


class Memory(NamedTuple):
    """Bytes of one rank at its fullest moment, by part; `host` those in the memory of its CPU.

    `copies`: weights in bfloat16, or gathered from other ranks, with the gradients on their way
    there. `beside`: frozen ones and pictures on the way to codes. `update`: what Muon works on.
    """

    weights: float
    gradients: float
    moments: float
    average: float
    buffers: float
    copies: float
    activations: float
    logits: float
    update: float
    beside: float
    host: float = 0

    @property
    def total(self) -> float:
        """Return the bytes on the accelerator."""
        return sum(self) - self.host


@dataclass(frozen=True)
class Row:
    """One choice: memory at `micro_batch` samples of a pass and rank; `most` that fit (0: none)."""

    choice: Choice
    memory: Memory
    most: int
    hours: float


@dataclass(frozen=True)
class Plan:
    """What a training takes; `samples` are learned from on `gpus` accelerators `gpu`.

    `longest`: ids of the documents that memory is told of, 0 where there are pictures only.
    """

    recipe: str
    gpu: str
    gpus: int
    samples: int
    utilisation: float
    price: float | None
    parameters: dict[str, int]
    learn: float
    longest: int
    micro_batch: int
    rows: tuple[Row, ...]

    @property
    def unit(self) -> str:
        """Return what a sample is."""
        return "document" if self.longest else "picture"

    @property
    def best(self) -> Row:
        """Return the fastest choice that fits, with the fewest messages."""
        fit = [row for row in self.rows if row.most >= self.micro_batch]
        fit = fit or [row for row in self.rows if row.most]
        return min(fit, key=lambda row: row.hours)

    def cost(self, row: Row) -> float | None:
        """Return what the stage costs, None where no price was given."""
        return None if self.price is None else self.price * self.gpus * row.hours

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON has it; bytes, FLOPs and hours."""
        rows = [
            {
                **row.choice._asdict(),
                "memory": {**row.memory._asdict(), "total": row.memory.total},
                "largest_micro_batch": row.most,
                "hours": row.hours,
                "gpu_hours": self.gpus * row.hours,
                "cost": self.cost(row),
            }
            for row in self.rows
        ]
        return {**to_dict(self), "rows": rows}


class Published(NamedTuple):
    """A training that others tell of; `samples` None where they do not say how many."""

    name: str
    recipe: str
    gpus: int
    hours: float
    samples: int | None


# DDT-LLaMA (arXiv 2504.14666) and Selftok (arXiv 2505.07538). That their accelerators are Ascend
# 910B is assumed.
PUBLISHED = (
    Published("DDT-LLaMA, stage 1", "paper_pretrain", 512, 14 * 24, 200_000_000),
    Published("Selftok, tokenizer", "paper_tokenizer", 32, 96, None),
)
ASSUMED = "910b"  # of the published trainings


def plan(
    recipe: Recipe,
    gpus: int,
    gpu: str,
    *,
    samples: int | None = None,
    utilisation: float = 0.4,
    price: float | None = None,
    codes: bool = False,
) -> Plan:
    """Plan a training; UserError, in one line, where no choice fits.

    `codes`: the data of a language model hold codes, so that no pictures are encoded beside it.
    """
    check(gpus, gpu, samples, utilisation, price)
    if isinstance(recipe, LanguageRecipe):
        recipe = as_started(recipe)
    accelerator, cost = ACCELERATORS[gpu], cost_of(recipe)
    samples = samples or recipe.train.steps * recipe.train.samples_a_step
    seconds = cost.learn * samples / (gpus * accelerator.flops * utilisation)
    longest, ways = 0, choices(gpus)
    if isinstance(recipe, LanguageRecipe):
        longest = longest_document(recipe, vocabulary_of(recipe))
        ways = choices(1) if recipe.alignment else ways  # its frozen copy is whole everywhere
    micro_batch = math.ceil(recipe.train.batch / gpus)
    room, rows = USABLE * accelerator.memory, []
    step = Step(recipe, gpus, encodes=not codes)
    if (kept := min(step.kept(choice) for choice in ways)) > room:
        needs = f"weights, gradients and optimizer alone need {kept / 1e9:,.0f} GB on each"
        raise misfit(recipe.name, gpus, gpu, needs)
    for choice in ways:
        again = (2 + BACKWARD) / (1 + BACKWARD) if choice.recompute == "blocks" else 1
        memory = step.memory(choice, micro_batch)
        rows.append(Row(choice, memory, step.most(choice, room), again * seconds / HOURS))
    if not any(row.most for row in rows):
        least = min(rows, key=lambda row: step.memory(row.choice, 1).total)
        needed = step.memory(least.choice, 1).total
        needs = (
            f"with train.shard {least.choice.name} and train.recompute {least.choice.recompute} "
            f"one sample a pass needs {needed / 1e9:,.0f} GB on each"
        )
        encodes = step.encoding and not codes
        remedy = ", or encode the pictures before and add --codes" if encodes else ""
        raise misfit(recipe.name, gpus, gpu, needs, remedy)
    return Plan(
        recipe.name,
        gpu,
        gpus,
        samples,
        utilisation,
        price,
        cost.parameters,
        cost.learn,
        longest,
        micro_batch,
        tuple(rows),
    )


def misfit(name: str, gpus: int, gpu: str, needs: str, remedy: str = "") -> UserError:
    """Return the line on a recipe that needs more than there is."""
    memory = ACCELERATORS[gpu].memory / 1e9
    return UserError(
        f"{name} does not fit {gpus} x {gpu}: {needs}, {USABLE * memory:,.0f} of {memory:,.0f} can "
        f"be used; take more or larger ones, or a smaller recipe{remedy}"
    )


def check(
    gpus: int, gpu: str, samples: int | None, utilisation: float, price: float | None
) -> None:
    """Raise UserError for numbers that cannot be, and accelerators that nobody knows."""
    if gpu not in ACCELERATORS:
        raise UserError(f"gpu: given {gpu!r}, allowed are {', '.join(ACCELERATORS)}")
    if gpus < 1:
        raise UserError(f"gpus: given {gpus}, allowed is a whole number from 1 on")
    if samples is not None and samples < 1:
        raise UserError(f"images: given {samples}, allowed is a whole number from 1 on")
    if not 0 < utilisation <= 1:
        raise UserError(f"utilisation: given {utilisation}, allowed is more than 0, at most 1")
    if price is not None and not 0 <= price < math.inf:
        raise UserError(f"price: given {price}, allowed is 0 or more, of an hour of one GPU")


def choices(gpus: int) -> list[Choice]:
    """Return the ways to spread a training, those with the fewest messages first."""
    found = [Choice("none", again) for again in RECOMPUTES]
    if gpus > NODE:
        found += [Choice("hybrid", again) for again in RECOMPUTES]
    if gpus > 1:
        found += [Choice("full", again, off) for off in (False, True) for again in RECOMPUTES]
    return found


class Step:
    """The memory of one rank of `gpus` in a step of a recipe."""

    def __init__(self, recipe: Recipe, gpus: int, *, encodes: bool = True) -> None:
        self.recipe, self.gpus = recipe, gpus
        self.sizes = sizes_of(recipe)
        self.encoding = 0
        if encodes and isinstance(recipe, LanguageRecipe):
            self.encoding = encoding(recipe, "cuda")
        self.passes = cache(self._passes)

    def kept(self, choice: Choice) -> float:
        """Return the bytes that a rank holds whatever the batch, its own encoding left out."""
        return self._memory(choice, []).total - self.encoding

    def memory(self, choice: Choice, batch: int) -> Memory:
        """Return what a rank holds with `batch` samples of a pass."""
        return self._memory(choice, between(self.passes(choice.recompute), batch))

    def _memory(self, choice: Choice, moments: Sequence[Held]) -> Memory:
        found = fullest(
            self.sizes,
            moments,
            choice,
            self.gpus,
            accumulates=self.recipe.train.accumulate > 1,
            low=self.recipe.train.bf16,
        )
        return found._replace(beside=found.beside + self.encoding)

    def most(self, choice: Choice, room: float) -> int:
        """Return the largest batch of a pass that has `room`, 0 where not even one has."""
        fits, fails = 0, 1
        while fails <= MOST and self.memory(choice, fails).total <= room:
            fits, fails = fails, 2 * fails
        while fails - fits > 1:
            middle = (fits + fails) // 2
            if self.memory(choice, middle).total <= room:
                fits = middle
            else:
                fails = middle
        return fits

    def _passes(self, recompute: Recompute) -> tuple[Pass, ...]:
        bf16 = self.recipe.train.bf16
        return tuple(
            passed(self.recipe, batch, kind="cuda", recompute=recompute, bf16=bf16)
            for batch in batches(self.recipe)
        )


def between(passes: Sequence[Pass], batch: int) -> list[Held]:
    """Return the moments of a pass of `batch`, on the lines through those that are known."""
    first = sum(one.batch < batch for one in passes[1:-1])
    low, high = passes[first : first + 2]
    share = (batch - low.batch) / (high.batch - low.batch)
    return [
        Held(*(a + share * (b - a) for a, b in zip(one, other, strict=True)))
        for one, other in zip(low.moments, high.moments, strict=True)
    ]


def fullest(
    sizes: Sizes,
    moments: Sequence[Held],
    choice: Choice,
    gpus: int,
    *,
    accumulates: bool,
    low: bool,
) -> Memory:
    """Return what a rank holds at the fullest moment of a step.

    Three kinds of moments: in the pass; when gradients are summed over ranks; in the update.
    `accumulates`: gradients of earlier passes are there from the start. With `low` weights travel
    and compute in bfloat16, gradients are summed in float32.
    """
    shards, width = choice.shards(gpus), BFLOAT16 if low else FLOAT32
    kept = Memory(
        weights=FLOAT32 * sizes.parameters / shards,
        gradients=FLOAT32 * sizes.trained / shards,
        moments=FLOAT32 * (2 * sizes.trained - sizes.muon) / shards,
        average=FLOAT32 * sizes.averaged / shards,
        buffers=sizes.buffers,
        copies=0,
        activations=0,
        logits=0,
        update=0,
        beside=sizes.frozen,
    )
    whole = choice.shard == "none"
    found = []
    for moment in moments:
        inside, outside = moment.gradients, moment.gradients_outside
        gradients = inside + outside if whole else inside / shards + outside * width / FLOAT32
        copies = moment.copies
        if not whole:
            # A block computes while the next one comes; its gradients go in float32. What is
            # outside of blocks is whole from the first to the last moment of a pass.
            copies = width * (sizes.outside + 3 * sizes.largest) + FLOAT32 * sizes.largest * low
        found.append(
            kept._replace(
                gradients=max(gradients, kept.gradients) if accumulates else gradients,
                copies=copies,
                activations=moment.activations,
                logits=moment.logits,
            )
        )
    if whole and gpus > 1:
        found.append(kept._replace(gradients=2 * kept.gradients))
    elif not whole:
        leaving = sizes.outside * (2 * width + FLOAT32 * low)
        found.append(kept._replace(copies=leaving))
    # Muon holds its matrices whole and, where it shares the products out, all that come of them
    # twice, on their way.
    update = sizes.muon + sizes.products
    if gpus > 1:
        update = 2 * sizes.muon + max(sizes.muon, sizes.products // gpus)
    found.append(kept._replace(update=FLOAT32 * update))
    if choice.offload:
        found = [offloaded(one, kept) for one in found]
    return max(found, key=lambda one: one.total)


def offloaded(memory: Memory, kept: Memory) -> Memory:
    """Return the same where the shards of a rank lie in the memory of its CPU."""
    there = kept.weights + kept.gradients + kept.moments + kept.average
    on_its_way = max(0.0, memory.gradients - kept.gradients)
    return memory._replace(
        weights=0, gradients=on_its_way, moments=0, average=0, update=0, host=there + memory.update
    )


def flops_offered(run: Published) -> float:
    """Return the FLOPs that the accelerators of a published training could do at their peak."""
    return run.gpus * ACCELERATORS[ASSUMED].flops * run.hours * HOURS


def learning_of(run: Published) -> float:
    """Return the FLOPs of learning from one sample of a published training, by our formulas."""
    return cost_of(recipe_named(run.recipe)).learn
