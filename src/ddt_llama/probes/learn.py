"""Train one small language model on sequences in one order; measure it on held-out ones.

Every probe that asks how hard a language is asks here: same network, same optimizer, same number of
sequences, only the symbols or their order differ. A lesson is a run folder like any other, so it
goes on where it was stopped.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ddt_llama import distributed
from ddt_llama.config import UserError, load_json, save_json
from ddt_llama.data.stream import Stream
from ddt_llama.evaluation.result import watch
from ddt_llama.language import Batch, Vocabulary, backbone
from ddt_llama.language.backbone import BackboneConfig
from ddt_llama.language.documents import IGNORED
from ddt_llama.language.heads import look_back
from ddt_llama.probes.base import ONE_TRAINING, check_held_out, check_seeds
from ddt_llama.probes.orders import LONGEST, Order, places
from ddt_llama.probes.sequences import Sequences
from ddt_llama.reports.plots import read_metrics
from ddt_llama.runs import Run
from ddt_llama.training.language import NextToken
from ddt_llama.training.loop import TrainConfig, train
from ddt_llama.training.optim import OptimConfig

RESULT = "result.json"
AT_ONCE = 64  # held-out sequences whose logits exist at once
NANO = BackboneConfig(dim=128, depth=4, num_heads=4, num_kv_heads=4, mlp_dim=384, row_std=0.12)
HELD_OUT_FROM = 1_000_003  # numbers of held-out sequences: training does not come so far


@dataclass(frozen=True)
class Course:
    """What all lessons of a probe share: the shape of the model and its training.

    `look_back`: heads start by looking a few tokens back, for what has to be bound together.
    """

    shape: BackboneConfig = NANO
    look_back: bool = False
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=600,
            batch=32,
            ema=0.99,
            sample_every=100,
            log_every=20,
            checkpoint_every=200,
            keep=1,
            tensorboard=False,
            optim=OptimConfig(lr=2e-3, warmup=50, weight_decay=0.05, decay_share=0.4),
        )
    )

    def __post_init__(self) -> None:
        """Refuse a seed that no lesson would take."""
        if self.train.seed:
            raise UserError(f"train.seed: given {self.train.seed}; a probe takes its own: --seeds")

    def effort(self) -> str:
        """Say how long is learned."""
        return f"{self.train.steps} steps of {self.train.samples_a_step} sequences"


@dataclass(frozen=True)
class Lesson:
    """One model on one source in one order: `fingerprint` is that of the sequences.

    `seed` chooses weights, the order of the sequences and the permutation.
    """

    course: Course
    source: str
    fingerprint: str
    order: Order = "native"
    seed: int = 0

    @property
    def train(self) -> TrainConfig:
        """The training with the seed of this lesson."""
        return replace(self.course.train, seed=self.seed)


@dataclass(frozen=True)
class Plan:
    """The course that all lessons share, and the seeds: weights, order of data, permutation.

    `pictures`: how many scenes of the shapes world the sequences come from, `held_out` of them to
    be measured on.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    course: Course = field(default_factory=Course)
    pictures: int = 20_000
    held_out: int = 512

    def __post_init__(self) -> None:
        """Refuse no seed, one twice, and numbers that measure nothing."""
        check_seeds(self.seeds)
        check_held_out(self.held_out, self.pictures)

    def about(self) -> str:
        """Say in a sentence or two what is measured on what."""
        train, shape = self.course.train, self.course.shape
        beside = backbone.count_parameters(shape, Vocabulary(1, 1, 1)) / 1e6
        return (
            f"{len(self.seeds)} seeds of a language model ({shape.depth} blocks of width "
            f"{shape.dim}, {beside:.2f} M parameters beside the rows of its symbols; "
            f"{self.course.effort()} by {train.optim.kind}, rate {train.optim.lr:g}), which choose "
            f"its weights, the order of the data and the permutation where there is one (by "
            f"torch.randperm, of {LONGEST:,} places); {self.pictures:,} scenes of the shapes "
            f"world, {self.held_out} of them held out. {ONE_TRAINING}"
        )

    def quick(self) -> "Plan":
        """Return a plan of two seeds, a thirtieth of the steps and a fortieth of the pictures."""
        train = self.course.train
        steps = train.steps // 30
        optim = replace(train.optim, warmup=steps // 4)
        short = replace(train, steps=steps, batch=16, sample_every=steps, optim=optim)
        return Plan(self.seeds[:2], replace(self.course, train=short), 512, 32)


class Learned(NamedTuple):
    """What a lesson left: held-out bits a symbol, by number of sequences seen and by step of a row.

    `by_place` is the mean surprise, `entropy` the mean entropy of the prediction, at each step of
    the order, both in bits; `scores` what an `Examiner` found.
    """

    curve: list[tuple[int, float]]
    by_place: list[float]
    entropy: list[float]
    scores: dict[str, float]

    @property
    def bits(self) -> float:
        """Held-out bits a symbol in the end."""
        return self.curve[-1][1]


# What else is asked of a model that has learned its lesson.
Examiner = Callable[[Any, Vocabulary], dict[str, float]]


def learn_all(
    plan: Plan, sources: Sequence[Sequences], orders: Sequence[Order], folder: Path
) -> dict[tuple[str, Order, int], Learned]:
    """Learn every source in every order with every seed; keys are (source, order, seed)."""
    done: dict[tuple[str, Order, int], Learned] = {}
    for seed, source, order in watch(list(product(plan.seeds, sources, orders)), "lessons"):
        lesson = Lesson(plan.course, source.name, source.fingerprint(), order, seed)
        place = folder / "lessons" / f"{source.name}-{order}-{seed}"
        done[source.name, order, seed] = learn(lesson, source, place)
    return done


def learn(
    lesson: Lesson, sequences: Sequences, folder: Path, examine: Examiner | None = None
) -> Learned:
    """Carry a lesson out in `folder`, go on with it, or return what it left.

    Raises UserError for the folder of another lesson and for one from which a part is gone,
    KeyboardInterrupt where a signal ends it.
    """
    result = folder / RESULT
    if result.is_file():
        kept = kept_result(result)
        if kept.curve[-1][0] == seen_after(lesson):
            Run.create_or_resume(folder, lesson).close()  # refuse another lesson
            return kept
    vocabulary = Vocabulary(1, sequences.alphabet, max(map(len, sequences.train)))
    device = distributed.setup()
    model = backbone.build(lesson.course.shape, vocabulary, device=device, seed=lesson.seed)
    if lesson.course.look_back:
        look_back(model, lesson.seed)
    objective = NextToken(vocabulary)
    objective.before_step(model, 0)  # also where no step is left: the model is to compute alike

    def sample(model: nn.Module, step: int, run: Run) -> dict[str, float]:
        surprise, _ = surprises(model, sequences, lesson, vocabulary, entropy=False)
        return {"heldout.bits": float(surprise.nanmean())}

    with Run.create_or_resume(folder, lesson) as run:
        stream = ordered(lesson, sequences, vocabulary)
        outcome = train(model, objective, stream, lesson.train, run, sample=sample)
        if not outcome.finished:  # a signal: half a lesson must not be compared with whole ones
            raise KeyboardInterrupt
        curve = curve_of(folder, lesson)
        with outcome.ema.swapped():
            surprise, entropy = surprises(model.eval(), sequences, lesson, vocabulary)
            scores = examine(model, vocabulary) if examine is not None else {}
        learned = Learned(
            curve,
            surprise.nanmean(0).tolist(),
            entropy.nanmean(0).tolist(),
            scores,
        )
        save_json(folder / RESULT, learned._asdict())
    return learned


def kept_result(result: Path) -> Learned:
    """Return what a lesson left; UserError where it is damaged."""
    kept = load_json(result)
    try:
        curve = [(seen, bits) for seen, bits in kept["curve"]]
        if curve:
            return Learned(curve, kept["by_place"], kept["entropy"], kept["scores"])
    except (KeyError, TypeError, ValueError):
        pass
    raise UserError(f"{result}: damaged; {again(result.parent)}")


def curve_of(folder: Path, lesson: Lesson) -> list[tuple[int, float]]:
    """Return held-out bits by sequences seen; UserError where they were not all written down."""
    path = folder / "metrics.jsonl"
    curves = read_metrics(path) if path.is_file() else {}
    steps, values = curves.get("heldout.bits", ([], []))
    train = lesson.train
    wanted = [*range(train.sample_every, train.steps, train.sample_every), train.steps]
    if not set(wanted) <= set(steps):
        raise UserError(f"{path}: lines of a finished lesson are missing; {again(folder)}")
    seen = [int(step) * train.samples_a_step for step in steps]
    return list(zip(seen, values, strict=True))


def again(folder: Path) -> str:
    """Say how a lesson is done anew."""
    return f"delete {folder}, and the same command learns it again"


def seen_after(lesson: Lesson) -> int:
    """Return how many sequences a lesson shows."""
    return lesson.train.steps * lesson.train.samples_a_step


def ordered(lesson: Lesson, sequences: Sequences, vocabulary: Vocabulary) -> Callable[[int], Batch]:
    """Return step -> a batch of training sequences in the order of the lesson."""
    stream = Stream(
        [sequences.train],
        lesson.train.batch,
        seed=lesson.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )

    def batch(step: int) -> Batch:
        rows = stream(step)
        first = step * lesson.train.batch + distributed.rank() * len(rows)
        return in_order(rows, lesson, vocabulary, range(first, first + len(rows)))

    return batch


def in_order(
    rows: list[Int[Tensor, " _"]], lesson: Lesson, vocabulary: Vocabulary, numbers: range
) -> Batch:
    """Lay sequences out, each behind the mark of a document, in the order of the lesson."""
    shape = len(rows), 1 + max(map(len, rows))
    ids = torch.full(shape, vocabulary.pad)
    labels = torch.full(shape, IGNORED)
    ids[:, 0] = vocabulary.bos
    for line, (row, number) in enumerate(zip(rows, numbers, strict=True)):
        read = row[places(lesson.order, len(row), lesson.seed, number)]
        ids[line, 1 : 1 + len(row)] = labels[line, 1 : 1 + len(row)] = vocabulary.to_ids(read)
    return Batch(ids, labels, (ids != vocabulary.pad).long())


@torch.no_grad()
def surprises(
    model: Any,
    sequences: Sequences,
    lesson: Lesson,
    vocabulary: Vocabulary,
    entropy: bool = True,
) -> tuple[Float[Tensor, "n l"], Float[Tensor, "n l"]]:
    """Return -log2 p of each held-out symbol and, where asked for, its prediction's entropy.

    Columns are the steps of the order; both are nan behind a row, and where it is told.
    """
    rows = list(sequences.held_out)
    longest = max(map(len, rows))
    found = torch.full((2, len(rows), longest), math.nan)
    device = next(model.parameters()).device
    for start in range(0, len(rows), AT_ONCE):
        part = rows[start : start + AT_ONCE]
        numbers = range(HELD_OUT_FROM + start, HELD_OUT_FROM + start + len(part))
        ids, labels = (x.to(device) for x in in_order(part, lesson, vocabulary, numbers)[:2])
        with distributed.autocast(device, lesson.train.bf16):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        whole = logits.logsumexp(-1)
        wanted = labels[:, 1:]
        seen = wanted != IGNORED
        if sequences.told is not None:
            told = torch.tensor(sequences.told[start : start + len(part)], device=device)
            seen = seen & (torch.arange(wanted.shape[1], device=device) >= told[:, None])
        measured = [whole - logits.gather(-1, wanted.where(seen, 0)[..., None])[..., 0]]
        if entropy:
            measured.append(whole - (logits.softmax(-1) * logits).sum(-1))
        for place, value in enumerate(measured):
            block = (value / math.log(2)).where(seen, math.nan).cpu()
            found[place, start : start + len(part), : block.shape[1]] = block
    return found[0], found[1]


def smoothed(values: Sequence[float], over: int) -> list[float]:
    """Return the means of `over` neighbouring values, for a plot by place."""
    parts = np.array_split(np.asarray(values), max(1, len(values) // over))
    return [float(part.mean()) for part in parts]
