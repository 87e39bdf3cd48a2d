"""Models side by side: the same suites, seeds, prompts and pictures; one page and one table.

What a model cannot do (a tokenizer alone draws nothing) is left out of its column. FLOPs of
one image are counted as they are computed, so that no formula favours a kind; those of the
trainings are what the release says (`generation/history.py`), by formula.
"""

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddt_llama.data.images import save_png, to_pil
from ddt_llama.data.samples import Sample
from ddt_llama.data.sources import ImageSource
from ddt_llama.evaluation.bench import PROMPTS
from ddt_llama.evaluation.flops import counted
from ddt_llama.evaluation.intervals import Figure, difference, flat
from ddt_llama.evaluation.pictures import EVALUATION_SEED, ScenePictures, SourcePictures
from ddt_llama.evaluation.reconstruction import ReconstructionSuite, device_of, useful_steps
from ddt_llama.evaluation.shapes_suite import ShapesSuite
from ddt_llama.evaluation.text import TextSuite
from ddt_llama.generation.model import Model
from ddt_llama.generation.settings import Settings
from ddt_llama.probes.base import check_names, fingerprint, kept, open_folder
from ddt_llama.recipes.data import DataConfig
from ddt_llama.reports.comparison import NOTHING, Comparison, Row, Shown, save_comparison
from ddt_llama.shapes.prompts import CATEGORIES, edit_suite
from ddt_llama.shapes.render import render

SHOWN = 6  # pictures of each kind
TIMED = 3  # drawings of a batch, the fastest of which counts


@dataclass(frozen=True)
class ComparisonPlan:
    """The suites that every model goes through; `data`: other pictures to be rebuilt, too."""

    reconstruction: ReconstructionSuite = field(
        default_factory=lambda: ReconstructionSuite(whole=False, visible_steps=1)
    )
    shapes: ShapesSuite = field(default_factory=ShapesSuite)
    text: TextSuite = field(default_factory=TextSuite)
    data: DataConfig | None = None

    def quick(self) -> "ComparisonPlan":
        """Return a plan of minutes, which proves that everything works and nothing else."""
        return ComparisonPlan(
            replace(self.reconstruction, scenes=32, codebook_scenes=256),
            replace(self.shapes, prompts=2, images=1, edits=6, questions=12),
            replace(self.text, captions=32),
            self.data,
        )

    def source(self, image_size: int) -> ImageSource[Sample]:
        """Open the pictures of `data`, those that training leaves alone where there are any."""
        assert self.data is not None
        (path,) = self.data.paths
        return self.data.open_images(path, image_size, self.data.measured_split(path))


@dataclass(frozen=True)
class Begun:
    """What belongs to one comparison folder."""

    models: tuple[str, ...]
    fingerprints: tuple[str, ...]
    settings: tuple[Settings, ...]
    plan: ComparisonPlan


# Label, key, and how a value is written.
LINES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("pixels along a side", "size", lambda x: f"{x:.0f}"),
    ("bits an image", "bits", lambda x: f"{x:,.0f}"),
    ("parameters of the tokenizer", "parameters.tokenizer", lambda x: f"{x / 1e6:.2f} M"),
    ("parameters of the language model", "parameters.language", lambda x: f"{x / 1e6:.2f} M"),
    ("FLOPs to encode an image", "flops.encode", lambda x: f"{x / 1e9:.3f} G"),
    ("FLOPs to decode an image", "flops.decode", lambda x: f"{x / 1e9:.3f} G"),
    ("FLOPs of all its trainings", "flops.trainings", lambda x: f"{x:.2e}"),
    ("PSNR in dB", "psnr", lambda x: f"{x:.2f}"),
    ("SSIM", "ssim", lambda x: f"{x:.3f}"),
    ("scenes read back exactly", "exact", lambda x: f"{100 * x:.1f} %"),
    ("codebook in use", "codebook.used", lambda x: f"{100 * x:.1f} %"),
    ("given pictures, PSNR in dB", "pictures.psnr", lambda x: f"{x:.2f}"),
    ("given pictures, SSIM", "pictures.ssim", lambda x: f"{x:.3f}"),
    ("given pictures, codebook in use", "pictures.codebook", lambda x: f"{100 * x:.1f} %"),
    ("prompts obeyed", "shapes.overall", lambda x: f"{100 * x:.1f} %"),
    *((f"... {name}", f"shapes.{name}", lambda x: f"{100 * x:.1f} %") for name in CATEGORIES),
    ("edits done", "shapes.edit.done", lambda x: f"{100 * x:.1f} %"),
    ("the rest untouched", "shapes.edit.kept", lambda x: f"{100 * x:.1f} %"),
    ("edits done, the rest untouched", "shapes.edit.both", lambda x: f"{100 * x:.1f} %"),
    ("questions", "shapes.questions", lambda x: f"{100 * x:.1f} %"),
    ("descriptions without an error", "shapes.descriptions", lambda x: f"{100 * x:.1f} %"),
    ("bits a character of captions", "text.bits_a_character", lambda x: f"{x:.3f}"),
    ("perplexity of captions", "text.perplexity", lambda x: f"{x:.2f}"),
    ("seconds to draw an image, of 8 at once", "seconds", lambda x: f"{x:.2f}"),
)


def compare(
    models: Sequence[Model], out: Path, plan: ComparisonPlan
) -> dict[str, dict[str, float]]:
    """Measure models in the folder `out`, or go on; returns flat figures by model.

    Writes index.html (pictures first), README.md (the table) and results.json. Raises UserError for
    no model, models of one name, and a folder of another comparison.
    """
    names = check_names(models)
    if plan.data is not None:
        plan.data.check()
        for size in {model.tokenizer.image_size for model in models}:
            plan.source(size)  # refuses what holds no pictures, before anything is measured
    weights = tuple(
        fingerprint(
            one.tokenizer,
            getattr(one.tokenizer, "config", None),
            one.text,
            one.stage,
            *([one.language] if one.vocabulary else []),
        )
        for one in models
    )
    settings = tuple(one.settings for one in models)
    open_folder(out, Begun(names, weights, settings, plan))
    figures = {
        model.name: kept(out / "parts" / f"{model.name}.json", lambda m=model: measure(m, plan))
        for model in models
    }
    columns = [figures[name] for name in names]
    rows = [
        Row(label, cells(columns, key, write))
        for label, key, write in LINES
        if any(key in one for one in columns)
    ]
    blank = ("",) * (len(models) - 1)
    rows.append(Row("settings of its release", (*(said(one) for one in models), *blank)))
    about = (
        f"{plan.reconstruction.scenes} held-out scenes, {plan.shapes.prompts} prompts a category, "
        f"{plan.shapes.images} images a prompt, {plan.shapes.edits} edits, "
        f"{plan.shapes.questions} questions, {plan.text.captions} captions; the same for all. "
        "One training of each model: differences between trainings are not in the intervals. "
        "Those of differences take the tasks of two models for independent ones; they are the "
        "same, so these are rather too wide. "
        "Perplexity is of an id of text: it compares models of one text tokenizer."
    )
    if plan.data is not None:
        about += f" Given pictures: {', '.join(plan.data.paths)}."
    less = tuple(f"{name} less {names[0]}" for name in names[1:])
    shown = pictures(models, out, plan)
    save_comparison(out, Comparison(names, about, less, tuple(rows), *shown))
    return figures


def measure(model: Model, plan: ComparisonPlan) -> dict[str, float]:
    """Return the figures of one model, flat; those of language only where it has one."""
    steps, tokenizer = model.settings.steps, model.tokenizer
    suite = replace(plan.reconstruction, steps=(steps,), visible=(tokenizer.num_tokens,))
    own = suite.run(tokenizer)
    (taken,) = useful_steps(tokenizer, (steps,))
    figures = {name: own[f"reconstruction.{name}.{taken}"] for name in ("psnr", "ssim", "exact")}
    if "codebook.used" in own:  # of one picture nobody can say
        figures["codebook.used"] = own["codebook.used"]
    if plan.data is not None:
        source, most = plan.source(tokenizer.image_size), max(suite.scenes, suite.codebook_scenes)
        given = suite.run(tokenizer, SourcePictures(source, tokenizer.image_size, most))
        for name in ("psnr", "ssim"):
            figures[f"pictures.{name}"] = given[f"reconstruction.{name}.{taken}"]
        if "codebook.used" in given:
            figures["pictures.codebook"] = given["codebook.used"]
    known = network(model)
    if model.vocabulary is not None:
        figures |= TextSuite.run(plan.text, model)
        known["seconds"] = seconds(model)
        if model.stage == "instruct":
            figures |= plan.shapes.run(model)
    return flat(figures) | known


def network(model: Model) -> dict[str, float]:
    """Return bits, parameters, counted FLOPs of an image, and what its trainings took."""
    tokenizer, size = model.tokenizer, model.tokenizer.image_size
    if isinstance(tokenizer, nn.Module):  # the counter cannot follow weights that can be trained
        tokenizer = copy.deepcopy(tokenizer).requires_grad_(False)
    images = torch.zeros(1, 3, size, size, device=device_of(tokenizer))
    found = {
        "size": float(size),
        "bits": tokenizer.num_tokens * math.log2(tokenizer.codebook_size),
        "flops.encode": counted(lambda: tokenizer.encode(images)),
    }
    codes = tokenizer.encode(images)
    found["flops.decode"] = counted(lambda: tokenizer.decode(codes, steps=model.settings.steps))
    if model.history.flops is not None:
        found["flops.trainings"] = model.history.flops
    if isinstance(tokenizer, nn.Module):
        found["parameters.tokenizer"] = sum(p.numel() for p in tokenizer.parameters())
    if model.vocabulary is not None:
        found["parameters.language"] = sum(p.numel() for p in model.language.parameters())
    return found


def said(model: Model) -> str:
    """Say with which settings a model draws and edits: part of what is compared."""
    own = model.settings
    words = [f"{own.steps} decoding steps" if own.steps else "decoded by its renderer"]
    if model.vocabulary is None:
        return words[0]
    for kind, one, plan in (("", own, own.plan), ("edits ", own.for_edits(), own.edit_plan)):
        words.append(f"{kind}guidance {one.guidance_scale:g}, temperature {one.temperature:g}")
        words += ["plans first"] if plan else []
    words += ["looks before it answers"] if own.look else []
    return ", ".join([*words, f"views {own.views}", f"tries {own.tries}"])


def seconds(model: Model) -> float:
    """Return the seconds an image that drawing eight at once takes, pixels included."""
    taken = []
    for _ in range(TIMED):
        begun = time.perf_counter()
        model.draw(PROMPTS)
        taken.append(time.perf_counter() - begun)
    return min(taken) / len(PROMPTS)


def cells(
    models: Sequence[Mapping[str, float | None]], key: str, write: Callable[[float], str]
) -> tuple[str, ...]:
    """Write a figure of each model, then what each but the first has more than the first.

    A model without it has `NOTHING`; what has no interval, no difference.
    """
    found = [bounded(one, key) for one in models]
    base, *others = found

    def more(value: float) -> str:
        return f"{'+' if value > 0 else ''}{write(value).replace(' %', ' points')}"

    return (
        *(NOTHING if one is None else cell(one, write) for one in found),
        *(
            cell(difference(one, base), more)
            if one is not None and base is not None and one.low < one.high
            else ""
            for one in others
        ),
    )


def bounded(figures: Mapping[str, float | None], key: str) -> Figure | None:
    """Return a figure of flat ones; bounds that are not there, or endless, are its value.

    Of one picture or caption nobody can say how others scatter: its bounds are null in JSON.
    """
    value = figures.get(key)
    if value is None:
        return None
    low, high = (figures.get(f"{key}.{bound}") for bound in ("low", "high"))
    return Figure(value, value if low is None else low, value if high is None else high)


def cell(figure: Figure, write: Callable[[float], str]) -> str:
    """Write a figure with its interval, where it has one."""
    if figure.low == figure.high:
        return write(figure.value)
    unit = next((one for one in (" %", " points") if write(figure.value).endswith(one)), "")
    low, high = (write(bound).removesuffix(unit) for bound in (figure.low, figure.high))
    return f"{write(figure.value)} [{low} to {high}]"


def pictures(
    models: Sequence[Model], out: Path, plan: ComparisonPlan
) -> tuple[tuple[Shown, ...], tuple[Shown, ...], tuple[Shown, ...]]:
    """Draw, edit and rebuild the same things by every model, and write the pictures."""
    folder = out / "pictures"
    folder.mkdir(exist_ok=True)

    def shown(
        kind: str, words: Sequence[str], made: Mapping[str, Any], originals: Any = None
    ) -> tuple[Shown, ...]:
        columns = {**made, **({} if originals is None else {"original": originals})}
        for name, images in columns.items():
            for number, picture in enumerate(images):
                save_png(picture, folder / f"{kind}-{name}-{number}.png")
        return tuple(
            Shown(
                told,
                tuple(
                    f"pictures/{kind}-{model.name}-{number}.png" if model.name in made else ""
                    for model in models
                ),
                "" if originals is None else f"pictures/{kind}-original-{number}.png",
            )
            for number, told in enumerate(words)
        )

    able = [model for model in models if model.vocabulary is not None]
    prompts = PROMPTS[:SHOWN]
    drawn = shown("drawn", prompts, {model.name: model.draw(prompts) for model in able})
    edits = edit_suite(SHOWN, EVALUATION_SEED)
    told = [made.instruction for made in edits]
    taught = [model for model in able if model.stage == "instruct"]
    sources = to_pil(render([made.source for made in edits], 64))
    edited = shown(
        "edited", told, {model.name: model.edit(sources, told) for model in taught}, sources
    )
    size = max(model.tokenizer.image_size for model in models)
    scenes = ScenePictures(SHOWN, size).images(0, SHOWN)
    if plan.data is not None:
        given = SourcePictures(plan.source(size), size, SHOWN)
        scenes = torch.cat([given.images(0, len(given)), scenes])
    originals = to_pil(scenes)
    made = {model.name: model.reconstruct(originals) for model in models}
    rebuilt = shown("rebuilt", [""] * len(originals), made, originals)
    return drawn if able else (), edited if taught else (), rebuilt
