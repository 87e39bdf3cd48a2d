"""Does a model draw what a caption says, on real pictures?

Every caption of a validation split is drawn once. Each drawing is compared with all pictures of the
split, both made small, so that fine detail does not count; the rank of the caption's own picture
says how much of the caption is in the drawing (chance: half of the split on average). The same for
as many captions of the training split. Writes drawn.json and, for either split, a sheet (pictures
above, below each three drawings of its caption) and the captions shown.

    python scripts/captions_study.py MODEL ../shared/data/emoji64 --out experiments/0002-emoji
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from ddt_llama.config import save_json
from ddt_llama.data.images import save_png, to_pil
from ddt_llama.data.sources import open_source
from ddt_llama.evaluation.intervals import flat, proportion
from ddt_llama.generation import Model, load
from ddt_llama.generation.settings import Options
from ddt_llama.reports.pictures import sheet

NUM = 3  # drawings of each caption shown
SMALL = 16  # pixels a side at which pictures are compared


def shrunk(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
    """Return what is compared."""
    return F.adaptive_avg_pool2d(images, SMALL).flatten(1)


def drawn(model: Model, captions: Sequence[str], num: int, options: Options) -> Tensor:
    """Draw each caption `num` times: pixels in [-1, 1], caption by caption."""
    parts = []
    for start in tqdm(range(0, len(captions), 32), "draw", unit_scale=32):
        part = captions[start : start + 32]
        first = list(range(num * start, num * (start + len(part)), num))
        codes = model.draw_codes(part, num=num, seed=first, **options)
        parts.append(model.decode(codes, list(range(len(codes)))).float().cpu())
    return torch.cat(parts)


def ranks(made: Tensor, images: Tensor) -> np.ndarray:
    """Return for each drawing how many pictures of the split are nearer than its own."""
    distances = torch.cdist(shrunk(made), shrunk(images))
    return (distances < distances.diagonal()[:, None]).sum(1).numpy()


def main(
    model: Annotated[Path, tyro.conf.Positional],
    data: Annotated[str, tyro.conf.Positional],
    out: Path,
    split: str = "val",
    guidance_scale: float | None = None,
    temperature: float | None = None,
    count: int | None = None,
    shown: int = 16,
) -> None:
    """Draw the captions of `split` (the first `count`) and of as many pictures seen in training."""
    painter = load(model)
    options = Options(guidance_scale=guidance_scale, temperature=temperature)
    settings = painter.settings.changed(options)
    figures: dict[str, float] = {
        "guidance_scale": settings.guidance_scale,
        "temperature": settings.temperature,
    }
    size = painter.tokenizer.image_size
    unseen = open_source(data, image_size=size, split=split, kind="image")
    seen = open_source(data, image_size=size, split="train", kind="image")
    wanted = min(count or len(unseen), len(unseen))
    out.mkdir(parents=True, exist_ok=True)
    for name, source in (("unseen", unseen), ("seen", seen)):
        samples = source.batch([index * len(source) // wanted for index in range(wanted)])
        images = torch.stack([sample.image for sample in samples])
        captions = [sample.caption or "" for sample in samples]
        places = ranks(drawn(painter, captions, 1, options), images)
        figures[f"{name}.pictures"] = wanted
        figures[f"{name}.median_rank"] = float(np.median(places)) + 1
        for most in (1, 10):
            figures |= flat({f"{name}.within_{most}": proportion((places < most).tolist())})
        own = {key: round(value, 3) for key, value in figures.items() if key.startswith(f"{name}.")}
        print(own)
        step = max(1, wanted // shown)
        few = list(range(0, wanted, step))[:shown]
        made = to_pil(drawn(painter, [captions[i] for i in few], NUM, options))
        rows = [to_pil(images[few]), *(made[row::NUM] for row in range(NUM))]
        save_png(sheet([one for row in rows for one in row], len(few)), out / f"{name}.png")
        (out / f"{name}.txt").write_text("".join(f"{captions[i]}\n" for i in few))
    save_json(out / "drawn.json", figures)


if __name__ == "__main__":
    tyro.cli(main)
