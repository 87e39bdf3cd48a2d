"""How fast is `ddt encode` beside its encoder alone?

Encodes a data set into shards, and, in the same process and by turns, as many batches of the same
size that lie in memory. Told are rows a second of both and their ratio, by rounds.

    python scripts/encode_speed.py nano my_images --rounds 5
"""

import tempfile
import time
from pathlib import Path

import torch
import tyro
from tyro.conf import Positional

from ddt_llama.config import save_json
from ddt_llama.evaluation.intervals import flat, mean
from ddt_llama.generation import load
from ddt_llama.probes.base import told
from ddt_llama.recipes.data import DataConfig
from ddt_llama.recipes.encode import encode_pictures
from ddt_llama.recipes.language import CHUNK


@torch.no_grad()
def bare(model: str, rows: int) -> float:
    """Return the rows a second of the encoder on a batch in memory."""
    opened = load(model)
    batch, size = CHUNK[opened.device.type], opened.tokenizer.image_size
    images = torch.rand(batch, 3, size, size) * 2 - 1
    opened.encode(images)
    began = time.perf_counter()
    for _ in range(rows // batch):
        opened.encode(images).cpu()
    return batch * (rows // batch) / (time.perf_counter() - began)


def main(
    model: Positional[str], data: Positional[str], rounds: int = 5, out: Path | None = None
) -> None:
    """Time both by turns; write figures to `out` (JSON)."""
    whole, alone = [], []
    for number in range(rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            done = encode_pictures(model, DataConfig((data,)), Path(folder))
        if number:  # the first warms files and memory up
            whole.append(done.rows / done.seconds)
            alone.append(bare(model, done.rows))
    figures = {
        "encode.rows_per_second": mean(whole),
        "bare.rows_per_second": mean(alone),
        "encode.ratio": mean([a / b for a, b in zip(whole, alone, strict=True)]),
    }
    for name, figure in figures.items():
        print(f"{name}: {told(figure, 3)}")
    if out is not None:
        save_json(out, flat(figures))


if __name__ == "__main__":
    tyro.cli(main)
