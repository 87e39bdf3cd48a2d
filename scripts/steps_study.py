"""Why do more decoding steps make a picture worse? Measure the decoder time by time.

For each tokenizer the squared error of its clean image on held-out scenes, at several t: from x_t
of the true image and from x_t of its own answer at t = 1, with all tokens and with the window that
its schedule shows. Then PSNR and exact scenes by number of steps. Writes metrics.jsonl, plot.png.

    python scripts/steps_study.py NAME=RUN ... --out experiments/0005-steps
"""

import json
from pathlib import Path
from typing import Annotated

import matplotlib
import torch
import tyro
from matplotlib import pyplot

from ddt_llama.evaluation.metrics import psnr
from ddt_llama.generation.release import load
from ddt_llama.shapes.render import render
from ddt_llama.shapes.verify import matches, read
from ddt_llama.shapes.world import ShapesSource
from ddt_llama.tokenizer import TimestepTokenizer

SEED = 1_000_003  # of the scenes shown in training, on which nothing is trained
TIMES = (1.0, 0.98, 0.95, 0.9, 0.75, 0.5, 0.25, 0.1)
STEPS = (1, 2, 4, 8, 16)


@torch.no_grad()
def errors(model: TimestepTokenizer, images: torch.Tensor) -> list[dict[str, float]]:
    """Return one row a time: errors for x_t of the image and its own, all tokens and the window."""
    patches = model.to_patches(images)
    values = model.quantizer(model.encoder(patches)).values
    eps = torch.randn(patches.shape, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(len(images), 1)
    everything = torch.ones(len(images), 1, model.num_tokens, dtype=torch.bool)
    tokens = model.tokens(values, everything)

    def answer(clean: torch.Tensor, t: float, visible: torch.Tensor) -> torch.Tensor:
        noisy = model.config.path.mix(clean, eps, t * ones[:, 0])
        return model.denoise(tokens, noisy[:, None], t * ones, visible)[:, 0]

    own = answer(patches, 1.0, everything)
    rows = []
    for t in TIMES:
        window = model.schedule.window(t * ones, 0)
        row = {"t": t, "visible": float(window.sum() / len(images))}
        for name, clean in (("true", patches), ("own", own)):
            for seen, visible in (("all", everything), ("window", window)):
                error = (answer(clean, t, visible) - patches).square().mean()
                row[f"{name}.{seen}"] = float(error)
        rows.append(row)
    return rows


def decoded(model: TimestepTokenizer, images: torch.Tensor, scenes: list) -> list[dict[str, float]]:
    """Return PSNR and the share of exact scenes for each number of steps."""
    codes = model.encode(images)
    rows = []
    for steps in STEPS:
        back = torch.cat([model.decode(part, steps=steps) for part in codes.split(32)])
        right = [matches(found, scene) for found, scene in zip(read(back), scenes, strict=True)]
        quality = float(psnr(back, images).mean())
        rows.append({"steps": steps, "psnr": quality, "exact": sum(right) / len(right)})
    return rows


def main(
    runs: Annotated[tuple[str, ...], tyro.conf.Positional], out: Path, scenes: int = 128
) -> None:
    """Measure runs given as NAME=FOLDER."""
    source = ShapesSource(SEED, 4, "heldout")
    drawn = [source.scene(index) for index in range(scenes)]
    images = render(drawn, 64)
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    matplotlib.use("Agg")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for run in runs:
        name, _, folder = run.partition("=")
        model = load(folder).tokenizer
        assert isinstance(model, TimestepTokenizer)
        by_time, by_steps = errors(model, images[:64]), decoded(model, images, drawn)
        lines += [{"trial": name, **row} for row in by_time + by_steps]
        left.plot(TIMES, [row["own.window"] for row in by_time], marker="o", label=name)
        right.plot(STEPS, [row["psnr"] for row in by_steps], marker="o", label=name)
        print(name, *(f"{r['steps']}: {r['psnr']:.2f} dB, {r['exact']:.0%}" for r in by_steps))
    left.set(xlabel="t", ylabel="squared error from its own x_t, tokens in the window")
    right.set(xlabel="decoding steps", ylabel="PSNR (dB)", xscale="log")
    right.legend()
    figure.tight_layout()
    figure.savefig(out / "plot.png", dpi=110)
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    tyro.cli(main)
