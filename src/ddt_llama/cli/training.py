"""Tell how a training begins and ends: where things are, and what to do next."""

import logging
import shlex
import sys
from pathlib import Path

from ddt_llama import distributed
from ddt_llama.recipes import LanguageRecipe, Recipe, RendererRecipe, Trained, run
from ddt_llama.recipes.data import SHAPES
from ddt_llama.recipes.run import newest_step
from ddt_llama.recipes.sizes import RUNS
from ddt_llama.training.loop import ANOTHER


def train_and_tell(recipe: Recipe, folder: Path) -> int:
    """Train and return the exit code: 130 after Ctrl-C, 0 when done, out of minutes or told to end.

    A cluster that takes its machines back sends SIGTERM, which is no failure. 75 where another
    process is gone, or was told to end and this one was not: the same command goes on.
    """
    logging.basicConfig(format="%(message)s")
    begun = (folder / "config.json").is_file()
    _say(
        f"{'going on in' if begun else 'training'} {folder}: {recipe.name}, "
        f"{recipe.train.steps} steps"
    )
    _say(f"pictures along the way: {folder / 'samples'}; curves: ddt report {folder}")
    try:
        trained = run(recipe, folder)
    except RuntimeError as error:
        if (reason := distributed.loss_in(error)) is None:
            raise
        step = newest_step(folder)
        onward = f"goes on from step {step}" if step else "begins again"
        print(
            f"error: another process is gone ({reason}); the same command {onward}", file=sys.stderr
        )
        return distributed.LOST
    _say("\n".join(_after(recipe, trained)))
    return {"SIGINT": 130, ANOTHER: distributed.LOST}.get(trained.stopped or "", 0)


def _after(recipe: Recipe, trained: Trained) -> list[str]:
    lines = [f"model of step {trained.step}: {trained.release}"]
    if not trained.finished:
        lines.append(f"{trained.step} of {recipe.train.steps} steps done; the same command goes on")
    size = _size(recipe)
    made, paths = trained.folder, recipe.data.paths
    folder = shlex.quote(str(made))
    data = "" if paths == (SHAPES,) else f" --data {shlex.join(paths)}"
    own = next((path for path in paths if path != SHAPES), None)
    prompt = "a red circle" if SHAPES in paths else "a caption like yours"
    if isinstance(recipe, RendererRecipe):
        lines.append(f"try it: ddt reconstruct {folder} IMAGE --out back")
        lines.append(f"next: ddt publish {folder} OUT --bits 8")
    elif not isinstance(recipe, LanguageRecipe):
        lines.append(f"try it: ddt reconstruct {folder} IMAGE --out back")
        codes = shlex.quote(f"{made}-codes")
        lines.append(f"next: ddt publish {folder} {codes} --bits 8")
        onward = _onward(made, f"{size}_tokenizer", "pretrain")
        lines.append(f"then: ddt train {size}_pretrain --tokenizer {codes}{data}{onward}")
    else:
        lines.append(f'try it: ddt draw {folder} "{prompt}" --out drawn.png')
        if recipe.lora is not None:
            lines.append(f"to share what was learned alone: ddt publish {folder} OUT --adapter")
        elif recipe.stage == "pretrain":
            onward = _onward(made, f"{size}_pretrain", "instruct")
            lines.append(f"next: ddt train {size}_instruct --start {folder}{data}{onward}")
        elif SHAPES in paths:
            lines.append(f"measure it: ddt evaluate {folder} --suite shapes --json shapes.json")
        else:
            suite = f"--suite reconstruction --data {shlex.quote(str(own))}"
            lines.append(f"measure it: ddt evaluate {folder} {suite}")
    return lines


def _size(recipe: Recipe) -> str:
    """Return what the names of the next stages begin with; Selftok's tokenizers have paper's."""
    if isinstance(recipe, LanguageRecipe):
        return recipe.name.rpartition("_")[0]
    size = recipe.name.removeprefix("spatial_").partition("_")[0]
    return "paper" if size == "selftok" else size


def _onward(folder: Path, usual: str, stage: str) -> str:
    """Return where the next stage goes, unless that is where it goes unasked."""
    return "" if folder == Path(RUNS, usual) else f" --out {shlex.quote(f'{folder}_{stage}')}"


def _say(text: str) -> None:
    if distributed.is_main():
        print(text, flush=True)
