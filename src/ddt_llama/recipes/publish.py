"""Make of a trained run the release that people load: settings tuned, weights in half precision.

`python -m ddt_llama.recipes.publish RUN FOLDER NAME`. Guidance is chosen on prompts that no
evaluation uses.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ddt_llama.config import UserError, load_json
from ddt_llama.evaluation.shapes_suite import tune_guidance
from ddt_llama.generation.release import load
from ddt_llama.recipes.data import SHAPES
from ddt_llama.recipes.run import RELEASE

HALF = torch.float16  # of ten bits; weights are small, so its range is enough


def publish(run: Path, folder: Path, name: str) -> Path:
    """Write the release of `run` to `folder` under `name` and return the folder.

    The guidance scale is tuned where the run knows the shapes world and can draw. Raises UserError
    where the run has no release or the folder is another thing.
    """
    if folder.exists() and not (folder / "config.json").is_file():
        raise UserError(f"{folder}: exists and is no release; choose another folder")
    model = load(run / RELEASE)
    model.name = name
    shapes = SHAPES in load_json(run / "config.json").get("data", {}).get("paths", [])
    if model.vocabulary is not None and shapes:
        scale, figures = tune_guidance(model)
        for tried, figure in sorted(figures.items()):
            print(f"guidance {tried:g}: {figure.value:.3f} of the tuning prompts")
        model.settings = replace(model.settings, guidance_scale=scale)
    model.save(folder, dtype=HALF)
    tokenizer: Any = model.tokenizer
    tokenizer.save(folder / "tokenizer", dtype=HALF)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB")
    return folder


if __name__ == "__main__":
    try:
        publish(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    except UserError as error:
        sys.exit(f"error: {error}")
