"""What has a model learned of pictures it has not seen: surprise at codes and at captions.

For every captioned picture of a split: nats a code where the caption is given, nats an id of the
caption where the picture is given. Models are compared with the first one picture by picture; their
intervals hold together (Bonferroni). Writes losses.json and a sheet: pictures, what the tokenizer
keeps of them, and a row of drawings of their captions by each model (drawn.txt has those).

    python scripts/lora_study.py my_images nano runs/lora --out runs/lora-study
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import tyro

from ddt_llama.config import save_json
from ddt_llama.data.images import save_png, to_pil
from ddt_llama.data.sources import open_source
from ddt_llama.evaluation.intervals import flat, mean
from ddt_llama.generation import Model, load
from ddt_llama.language import collate, documents, render
from ddt_llama.language.documents import IGNORED, Document
from ddt_llama.reports.pictures import sheet
from ddt_llama.training.language import head_loss, supervised_hidden

BATCH = 64
SHOWN = 16


@torch.no_grad()
def surprises(model: Model, requests: Sequence[Document], codes_count: bool) -> list[float]:
    """Return for each document the mean nats of its codes, or of all it is to answer."""
    vocabulary, text = model.vocabulary, model.text
    assert vocabulary is not None
    assert text is not None
    found = []
    for start in range(0, len(requests), BATCH):
        rows = [render(one, vocabulary, text) for one in requests[start : start + BATCH]]
        batch = collate(rows, vocabulary.pad)
        ids, wanted = batch.ids.to(model.device), batch.labels[:, 1:].to(model.device)
        counts = vocabulary.is_code(wanted) if codes_count else wanted != IGNORED
        hidden = supervised_hidden(model.language, ids, counts)
        _, each, _ = head_loss(model.language, hidden, wanted[counts])
        found += [float(part.mean()) for part in each.split(counts.sum(1).tolist())]
    return found


def main(
    data: Annotated[str, tyro.conf.Positional],
    models: Annotated[tuple[str, ...], tyro.conf.Positional],
    out: Path,
    split: str = "val",
    guidance_scale: float = 1.5,
    temperature: float = 0.6,
) -> None:
    """Measure `models`, releases or runs over one tokenizer, and what differs from the first."""
    opened = {Path(name).name: load(name) for name in models}
    eye = next(iter(opened.values()))
    source = open_source(data, image_size=eye.tokenizer.image_size, split=split, kind="image")
    samples = [one for one in source.batch(range(len(source))) if one.caption]
    codes = eye.encode(torch.stack([one.image for one in samples]))
    rows = eye.tokenizer.to_language(codes).tolist()
    pairs = [(one.caption or "", row) for one, row in zip(samples, rows, strict=True)]
    few = list(range(0, len(samples), -(-len(samples) // SHOWN)))
    captions = [pairs[i][0] for i in few]
    shown = [*to_pil(torch.stack([samples[i].image for i in few]))]
    shown += to_pil(eye.decode(codes[few], few, steps=1))
    figures: dict[str, float] = {"pictures": len(samples)}
    first: dict[str, list[float]] = {}
    for name, model in opened.items():
        assert model.tokenizer.fingerprint() == eye.tokenizer.fingerprint()
        each = {
            "codes": surprises(model, [documents.draw(*pair) for pair in pairs], True),
            "captions": surprises(model, [documents.describe(c, t) for t, c in pairs], False),
        }
        first = first or each
        told = {f"{name}.{what}": mean(each[what], len(models)) for what in each}
        for what, values in each.items() if each is not first else ():
            less = [own - other for own, other in zip(values, first[what], strict=True)]
            told[f"{name}.{what}.more"] = mean(less, len(models))
        figures |= flat(told)
        print({key: round(figure.value, 3) for key, figure in told.items()}, flush=True)
        shown += model.draw(
            captions,
            seed=few,
            guidance_scale=guidance_scale,
            temperature=temperature,
            steps=1,
            plan=False,
            tries=1,
        )
    out.mkdir(parents=True, exist_ok=True)
    save_json(out / "losses.json", figures)
    save_png(sheet(shown, len(few)), out / "drawn.png")
    (out / "drawn.txt").write_text("".join(f"{one}\n" for one in captions))


if __name__ == "__main__":
    tyro.cli(main)
