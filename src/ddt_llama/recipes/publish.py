"""Make of a trained run the release that people load: settings tuned, weights in 16 or 8 bits.

Whether words come first, guidance and temperature are chosen on prompts, edits and questions, and
the number of decoding steps on scenes, that no evaluation uses.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ddt_llama.config import UserError, load_json
from ddt_llama.evaluation.metrics import psnr
from ddt_llama.evaluation.pictures import ScenePictures
from ddt_llama.evaluation.reconstruction import device_of
from ddt_llama.evaluation.shapes_suite import tune_drawing, tune_editing, tune_words
from ddt_llama.generation.release import load
from ddt_llama.recipes.data import SHAPES
from ddt_llama.recipes.run import RELEASE
from ddt_llama.tokenizer import Tokenizer

SCENES = 128
# How guidance and temperature are tuned of a model that was taught to plan.
WORDS_FIRST: Any = {"plan": True, "edit_plan": True, "look": True, "views": 5, "tries": 8}
TUNING_SEED = 2_000_003  # of scenes that neither training nor evaluation looks at


def publish(run: Path, folder: Path, name: str, bits: Literal[16, 8] = 16) -> Path:
    """Write the release of `run` to `folder` under `name`, in 16 or 8 bits; return the folder.

    Where the run knows the shapes world, the number of steps is tuned, and guidance and temperature
    of drawings and of edits where it can do them. Raises UserError where the run has no release or
    the folder is another thing.
    """
    if folder.exists() and not (folder / "config.json").is_file():
        raise UserError(f"{folder}: exists and is no release; choose another folder")
    model = load(run / RELEASE)
    model.name = name
    data = load_json(run / "config.json").get("data", {})
    shapes = SHAPES in data.get("paths", [])
    if shapes:
        model.settings = replace(model.settings, steps=best_steps(model.tokenizer))
    if model.vocabulary is not None and shapes:
        if model.stage == "instruct" and data.get("in_words"):
            model.settings = replace(model.settings, **WORDS_FIRST)
        tunings = ((tune_drawing, "prompts"), (tune_editing, "edits"))
        for tune, asked in tunings if model.stage == "instruct" else tunings[:1]:
            model.settings, figures = tune(model)
            for (scale, temperature), figure in figures.items():
                print(
                    f"guidance {scale:g}, temperature {temperature:g}: "
                    f"{figure.value:.3f} of the tuning {asked}"
                )
        if model.stage == "instruct":  # at the settings that have just been found
            model.settings, tried = tune_words(model)
            for name, (without, first) in tried.items():
                print(f"{name}: {first.value:.3f} with words first, {without.value:.3f} without")
    model.save(folder, bits=bits)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB")
    return folder


def best_steps(tokenizer: Tokenizer, choices: Sequence[int] = (1, 2, 4, 8, 16)) -> int:
    """Return the number of decoding steps with the best PSNR; of equals the fewest."""
    images = ScenePictures(SCENES, tokenizer.image_size, split="train", seed=TUNING_SEED).images(
        0, SCENES
    )
    codes = tokenizer.encode(images.to(device_of(tokenizer)))
    decoded = {steps: tokenizer.decode(codes, steps=steps).float().cpu() for steps in choices}
    quality = {steps: float(psnr(made, images).mean()) for steps, made in decoded.items()}
    for steps, value in quality.items():
        print(f"{steps} decoding steps: {value:.2f} dB on the tuning scenes")
    return max(sorted(quality), key=lambda steps: quality[steps])
