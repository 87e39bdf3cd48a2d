"""Make of a trained run the release that people load: settings tuned, weights in 16 or 8 bits.

The number of decoding steps is chosen on pictures that training left alone. Of a model of the
shapes world guidance, temperature and whether words come first are chosen, too, on prompts, edits
and questions that no evaluation uses.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ddt_llama.config import UserError, check_folder, from_dict, load_json
from ddt_llama.evaluation.metrics import psnr
from ddt_llama.evaluation.pictures import ScenePictures
from ddt_llama.evaluation.reconstruction import device_of, useful_steps
from ddt_llama.evaluation.shapes_suite import tune_drawing, tune_editing, tune_words
from ddt_llama.generation.model import Model, check_place
from ddt_llama.generation.release import load
from ddt_llama.language import lora
from ddt_llama.recipes.data import SHAPES, DataConfig, pictures_of
from ddt_llama.recipes.drafts import open_form
from ddt_llama.recipes.jobs import ADAPTER
from ddt_llama.recipes.starts import RELEASE
from ddt_llama.tokenizer import Tokenizer

PICTURES = 128
# How guidance and temperature are tuned of a model that was taught to plan.
WORDS_FIRST: Any = {"plan": True, "edit_plan": True, "look": True, "views": 5, "tries": 8}
# Of a model of other pictures: the best of four pairs on unseen emoji (experiments/0002).
UNTUNED: Any = {"guidance_scale": 1.5, "temperature": 0.6}
# The share of codes changed by fewer bits from which on a language model reads strange pictures: of
# near codes it has learned one, and sees another (experiments/0024).
UNLIKE = 0.02
TUNING_SEED = 2_000_003  # of scenes that neither training nor evaluation looks at


def publish(
    run: Path, folder: Path, name: str, bits: Literal[16, 8] = 16, *, adapter: bool = False
) -> Path:
    """Write the release of `run` to `folder` under `name`, in 16 or 8 bits; return the folder.

    `adapter`: what LoRA has learned alone, always in 16 bits. The number of decoding steps is
    tuned, and where the run knows the shapes world guidance and temperature of drawings and of
    edits where it can do them; else they are `UNTUNED`. Raises UserError where the run has no
    release (or adapter) or the folder is another thing.
    """
    (lora.check_place if adapter else check_place)(folder)
    check_folder(folder)
    if not (run / RELEASE / "config.json").is_file():
        raise UserError(f"{run}: no trained run (no {RELEASE} in it); give the folder of ddt train")
    if adapter and not (run / ADAPTER / "config.json").is_file():
        raise UserError(f"{run}: nothing of LoRA (no {ADAPTER} in it); leave out --adapter")
    model = load(run / RELEASE)
    model.name = name
    recipe = load_json(run / "config.json")
    data = from_dict(DataConfig, recipe.get("data", {}))
    pictures = tuning_pictures(data, model.tokenizer)
    steps = best_steps(model.tokenizer, pictures)
    model.settings = replace(model.settings, steps=steps)
    if "stage" in recipe:  # else the language model, if any, is that of a renderer's start: tuned
        _tune(model, data, aligned=bool(recipe.get("alignment")))
    if adapter:
        lora.publish(run / ADAPTER, folder, model.described())
    else:
        model.save(folder, bits=bits)
        changed = changed_codes(model.tokenizer, load(folder).tokenizer, pictures)
        print(f"{100 * changed:.1f} % of the codes of pictures are other ones in {bits} bits")
        if model.vocabulary is not None and changed > UNLIKE:
            print("that is much for a language model; train one on a tokenizer published before")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB")
    return folder


def _tune(model: Model, data: DataConfig, *, aligned: bool) -> None:
    """Choose guidance, temperature and whether words come first, on shapes where it knows them.

    An aligned model is drawn from without guidance.
    """
    if SHAPES not in data.paths:
        untuned = {**UNTUNED, "guidance_scale": 1.0} if aligned else UNTUNED
        model.settings = replace(model.settings, **untuned)
        print("guidance and temperature are those of experiments/0002, not tuned on these pictures")
        return
    if model.stage == "instruct" and data.in_words:
        model.settings = replace(model.settings, **WORDS_FIRST)
    tunings = ((tune_drawing, "prompts"), (tune_editing, "edits"))
    for tune, asked in tunings if model.stage == "instruct" else tunings[:1]:
        model.settings, figures = tune(model, (1.0,)) if aligned else tune(model)
        for (scale, temperature), figure in figures.items():
            print(
                f"guidance {scale:g}, temperature {temperature:g}: "
                f"{figure.value:.3f} of the tuning {asked}"
            )
    if model.stage == "instruct":  # at the settings that have just been found
        model.settings, tried = tune_words(model)
        for name, (without, first) in tried.items():
            print(f"{name}: {first.value:.3f} with words first, {without.value:.3f} without")


@torch.no_grad()
def changed_codes(one: Tokenizer, other: Tokenizer, images: Float[Tensor, "b 3 h w"]) -> float:
    """Return the share of the codes of pictures that two tokenizers do not agree on."""
    codes, others = (each.encode(images.to(device_of(each))).cpu() for each in (one, other))
    return float((codes != others).float().mean())


def tuning_pictures(data: DataConfig, tokenizer: Tokenizer) -> Float[Tensor, "b 3 h w"]:
    """Return pictures of the first data set that training left alone, where it left any.

    Of data that are codes they are what the tokenizer makes of them.
    """
    size = tokenizer.image_size
    if SHAPES in data.paths:
        return ScenePictures(PICTURES, size, split="train", seed=TUNING_SEED).images(0, PICTURES)
    source = open_form(data, data.paths[0], size, "image", data.unseen_split(data.paths[0]))
    count = min(PICTURES, len(source))
    spread = [index * len(source) // count for index in range(count)]
    return pictures_of(source.batch(spread), tokenizer)


def best_steps(
    tokenizer: Tokenizer,
    images: Float[Tensor, "b 3 h w"],
    choices: Sequence[int] = (1, 2, 4, 8, 16),
) -> int:
    """Return the number of decoding steps with the best PSNR; of equals the fewest.

    0, the renderer, is among them where there is one.
    """
    choices = useful_steps(tokenizer, (0, *choices) if tokenizer.renders else choices)
    codes = tokenizer.encode(images.to(device_of(tokenizer)))
    decoded = {steps: tokenizer.decode(codes, steps=steps).float().cpu() for steps in choices}
    quality = {steps: float(psnr(made, images).mean()) for steps, made in decoded.items()}
    for steps, value in quality.items():
        told = f"{steps} decoding steps" if steps else "the renderer"
        print(f"{told}: {value:.2f} dB on {len(images)} pictures for tuning")
    return max(sorted(quality), key=lambda steps: quality[steps])
