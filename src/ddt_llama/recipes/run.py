"""Carry a recipe out: open its job, train by the one loop, write the release.

The run folder is complete in itself: RUN/parts keeps what the run began with (tokenizer, text side,
weights of `start`, their trainings), so that it goes on without them; RUN/release is the model with
averaged weights, rewritten whenever the loop ends, and RUN/adapter what LoRA has added to `start`.
"""

import importlib.util
from pathlib import Path
from typing import NamedTuple

from ddt_llama import distributed
from ddt_llama.checkpoint import put_back
from ddt_llama.config import UserError, check_folder, load_json, replace_file, save_json, to_dict
from ddt_llama.generation.history import History, Training
from ddt_llama.generation.model import check_place
from ddt_llama.recipes.data import DataConfig
from ddt_llama.recipes.jobs import ADAPTER, open_job
from ddt_llama.recipes.named import Recipe
from ddt_llama.recipes.starts import RELEASE
from ddt_llama.runs import Run
from ddt_llama.training.loop import train

FINISHED = "FINISHED"  # an empty file that says to scripts: all steps are done
PARTS = "parts"


class Trained(NamedTuple):
    """Where a training stands and what it left; `stopped` says what ended it early."""

    folder: Path
    release: Path
    step: int
    finished: bool
    stopped: str | None = None


def run(recipe: Recipe, out: Path) -> Trained:
    """Train `recipe` in the run folder `out`, or go on with the training that is there.

    Raises UserError for data, models and places that cannot be used, before anything is written.
    """
    recipe.data.check()
    refuse_uneven(recipe.train.batch)
    check_folder(out)
    check_place(out / RELEASE)
    if recipe.train.tensorboard and importlib.util.find_spec("tensorboard") is None:
        choice = "install ddt-llama[train] or add --train.tensorboard false"
        raise UserError(f"tensorboard is not installed; {choice}")
    if (out / FINISHED).is_file() and (done := newest_step(out)) >= recipe.train.steps:
        with Run.create_or_resume(out, recipe):  # refuse another recipe
            if distributed.is_main():
                _put_back(out)
        return Trained(out, out / RELEASE, done, True)
    if (out / FINISHED).is_file() and not newest_step(out):
        raise UserError(
            f"{out}: this training is finished and its states (checkpoints/) are gone, so that it "
            "would begin again; its model is in release/: choose another folder with --out, and "
            "--start to go on from it"
        )
    job = open_job(recipe, out / PARTS)
    distributed.barrier()  # all have seen what there is before one writes
    with Run.create_or_resume(out, recipe) as folder:
        distributed.on_main(lambda: _begin(recipe.data, out))
        (out / FINISHED).unlink(missing_ok=True)  # of fewer steps
        if job.keep is not None:
            distributed.on_main(lambda: save_json(out / PARTS / "config.json", to_dict(job.past)))
            job.keep(out / PARTS)
        flops = job.flops()
        outcome = train(
            job.model,
            job.objective,
            job.stream,
            recipe.train,
            folder,
            sample=job.samples,
            flops=flops,
            fill=job.fill,
        )
        seen = outcome.step * recipe.train.samples_a_step
        own = Training(job.part, recipe.name, seen, seen * flops)
        with outcome.ema.swapped():
            job.release(out / RELEASE, job.past + History((own,)))
    if distributed.is_main() and outcome.finished:
        replace_file(out / FINISHED, b"")
    distributed.teardown()
    return Trained(out, out / RELEASE, outcome.step, outcome.finished, outcome.stopped)


def refuse_uneven(batch: int) -> None:
    """Raise UserError where the processes cannot share a batch evenly; the main one alone tells."""
    processes = distributed.world_size()
    if batch % processes:
        distributed.refuse(
            f"train.batch: given {batch} for {processes} processes, allowed are multiples of their "
            "number; change one of the two"
        )


def _begin(data: DataConfig, out: Path) -> None:
    """Mend what a kill has left, and keep how much data there are, or refuse other ones.

    A stream is a pure function of the data: with a file less all would come in another order.
    """
    _put_back(out)
    known, found = out / PARTS / "data.json", data.extents()
    before = load_json(known) if known.is_file() else found
    for path, held in found.items():
        if held != before.get(path):
            raise UserError(
                f"data: {path} holds {held}, and held {before.get(path)} when this training began; "
                "put back what is gone, or begin anew in another folder (--out)"
            )
    if found:
        save_json(known, found)


def _put_back(out: Path) -> None:
    """Give what a kill has left between two names its own."""
    for name in (RELEASE, ADAPTER):
        put_back(out / name)


def newest_step(out: Path) -> int:
    """Return the step of the newest complete training state of a run, 0 where there is none."""
    complete = sorted((out / "checkpoints").glob("step-*/COMPLETE"))
    return int(complete[-1].parent.name.removeprefix("step-")) if complete else 0
