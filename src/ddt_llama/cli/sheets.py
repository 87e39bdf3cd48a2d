"""Sheets that more than one verb writes."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import PIL.Image
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddt_llama.data.images import to_pil
from ddt_llama.evaluation.reconstruction import useful_levels
from ddt_llama.reports.pictures import sheet

if TYPE_CHECKING:
    from ddt_llama.generation.model import Model


def levels_sheet(
    model: "Model",
    originals: Float[Tensor, "b 3 h w"],
    codes: Int[Tensor, "b k"],
    seeds: Sequence[int],
    steps: int,
) -> PIL.Image.Image:
    """Return originals above what few, more and all of their codes give, a column a picture."""
    rows = [originals]
    for count in useful_levels(model.tokenizer):
        rows.append(model.decode(codes, seeds, steps=steps, visible=count))
    return sheet(to_pil(torch.cat(rows)), len(originals))


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Return a file name without suffix for each path; equal ones get a number, "sheet" too.

    >>> distinct_names([Path("a/x.png"), Path("b/x.jpg"), Path("sheet.png")])
    ['x', 'x-2', 'sheet-2']
    """
    used = {"sheet": 1}
    names = []
    for path in paths:
        used[path.stem] = used.get(path.stem, 0) + 1
        number = used[path.stem]
        names.append(path.stem if number == 1 else f"{path.stem}-{number}")
    return names
