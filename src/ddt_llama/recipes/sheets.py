"""The sheet that shows what codes hold: during a training and of `ddt reconstruct`."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from ddt_llama.data.images import to_pil
from ddt_llama.evaluation.reconstruction import useful_levels
from ddt_llama.generation.model import Model
from ddt_llama.reports.pictures import sheet


def levels_sheet(
    model: Model,
    originals: Float[Tensor, "b 3 h w"],
    codes: Int[Tensor, "b k"],
    seeds: Sequence[int],
    steps: int,
) -> Image.Image:
    """Return originals above what few, more and all of their codes give, a column a picture."""
    rows = [originals]
    for count in useful_levels(model.tokenizer):
        rows.append(model.decode(codes, seeds, steps=steps, visible=count))
    return sheet(to_pil(torch.cat(rows)), len(originals))
