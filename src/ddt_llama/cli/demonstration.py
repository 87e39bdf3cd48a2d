"""What `ddt demo` shows: drawings, reconstructions, edits and answers of one model, with figures.

Pictures and results.json go into a folder; `reports.demo` makes the page of it. Scenes, prompts,
edits and questions are held out of training; the verifier of the shapes world judges them.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from ddt_llama.config import UserError
from ddt_llama.data.images import BrokenImage, image_files, open_image, save_png
from ddt_llama.evaluation.intervals import Figure, flat, mean, proportion
from ddt_llama.evaluation.metrics import psnr
from ddt_llama.evaluation.pictures import ScenePictures
from ddt_llama.evaluation.reconstruction import read_back, useful_levels
from ddt_llama.generation.model import Model
from ddt_llama.reports.demo import (
    Asked,
    Demo,
    Drawn,
    Edited,
    Level,
    Reconstructed,
    save_demo,
    write_demo_page,
)
from ddt_llama.shapes.judge import change_done, rest_untouched
from ddt_llama.shapes.prompts import (
    Category,
    edit_suite,
    heldout_prompts,
    question_suite,
)
from ddt_llama.shapes.render import render
from ddt_llama.shapes.verify import read

# Eight drawings, one or two of each category.
DRAWINGS: tuple[tuple[Category, int], ...] = (
    ("single", 1),
    ("colours", 1),
    ("two", 2),
    ("counting", 1),
    ("position", 2),
    ("attribute", 1),
)
SCENES, EDITS, QUESTIONS = 8, 3, 6
SEED = 7
PICTURES = "pictures"


class Demonstration:
    """One demonstration: pictures are written as they are made, times and figures collected."""

    def __init__(self, model: Model, out: Path) -> None:
        self.model, self.out = model, out
        self.size = model.tokenizer.image_size
        self.timings: dict[str, float] = {}
        self.figures: dict[str, Figure] = {}

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the seconds of a `with` block to the timings."""
        began = time.perf_counter()
        yield
        self.timings[what] = time.perf_counter() - began

    def picture(self, image: Float[Tensor, "3 h w"], name: str) -> str:
        """Write a picture and return its path inside the folder."""
        save_png(image, self.out / PICTURES / f"{name}.png")
        return f"{PICTURES}/{name}.png"

    def drawn(self) -> tuple[Drawn, ...]:
        """Draw held-out prompts and count what the verifier finds right."""
        asked = [one for kind, count in DRAWINGS for one in heldout_prompts(kind, count, SEED)]
        seeds = [SEED + place for place in range(len(asked))]
        with self.timed(f"draw {len(asked)} pictures"):
            codes = self.model.draw_codes([prompt for prompt, _ in asked], seed=seeds)
            images = self.model.decode(codes, seeds)
        found = zip(read(images), asked, strict=True)
        right = [requirement.satisfied(scene) for scene, (_, requirement) in found]
        self.figures["drawn.right"] = proportion(right)
        return tuple(
            Drawn(prompt, self.picture(image, f"drawn-{place + 1}"), seed, good)
            for place, ((prompt, _), image, seed, good) in enumerate(
                zip(asked, images, seeds, right, strict=True)
            )
        )

    def reconstructed(
        self, images: Float[Tensor, "b 3 h w"], names: Sequence[str], kind: str
    ) -> tuple[Reconstructed, ...]:
        """Rebuild pictures from 1, 4, 8, ... all codes; figures by number of codes."""
        levels = useful_levels(self.model.tokenizer)
        seeds = [SEED] * len(images)
        with self.timed(f"rebuild {len(images)} {kind} from {len(levels)} lengths"):
            codes = self.model.encode(images)
            decoded = [self.model.decode(codes, seeds, visible=count) for count in levels]
        quality = [psnr(one, images) for one in decoded]
        for count, values in zip(levels, quality, strict=True):
            self.figures[f"{kind}.visible.psnr.{count}"] = mean(values.tolist())
        rows = []
        for row, name in enumerate(names):
            original = self.picture(images[row], f"{kind}-{row + 1}")
            cells = [
                Level(
                    count,
                    self.picture(one[row], f"{kind}-{row + 1}-from-{count}"),
                    float(values[row]),
                )
                for count, one, values in zip(levels, decoded, quality, strict=True)
            ]
            rows.append(Reconstructed(original, tuple(cells), name))
        if kind == "scenes":
            exact = read_back(decoded[-1], scene_pictures(self.size).scenes(0, len(images)))
            self.figures["scenes.exact"] = proportion(exact)
        return tuple(rows)

    def edited(self) -> tuple[Edited, ...]:
        """Edit held-out scenes and let the verifier judge."""
        suite = edit_suite(EDITS, SEED)
        sources = render([made.source for made in suite], self.size)
        seeds = [SEED + place for place in range(len(suite))]
        with self.timed(f"edit {len(suite)} pictures"):
            codes = self.model.edit_codes(sources, [e.instruction for e in suite], seed=seeds)
            results = self.model.decode(codes, seeds)
        rows = []
        for place, (made, scene) in enumerate(zip(suite, read(results), strict=True)):
            done = change_done(made, scene) and rest_untouched(made, scene)
            source = self.picture(sources[place], f"edit-{place + 1}-source")
            result = self.picture(results[place], f"edit-{place + 1}-result")
            rows.append(Edited(source, made.instruction, result, done))
        self.figures["edited.done"] = proportion([bool(row.done) for row in rows])
        return tuple(rows)

    def asked(self) -> tuple[Asked, ...]:
        """Ask about held-out scenes."""
        suite = question_suite(QUESTIONS, SEED)
        images = render([scene for scene, _ in suite], self.size)
        with self.timed(f"answer {len(suite)} questions"):
            answers = self.model.ask_many(images, [one.question for _, one in suite])
        rows = tuple(
            Asked(
                self.picture(images[i], f"question-{i + 1}"), one.question, answers[i], one.answer
            )
            for i, (_, one) in enumerate(suite)
        )
        self.figures["asked.right"] = proportion([bool(row.right) for row in rows])
        return rows


def demonstrate(open_model: Callable[[], Model], images: Path | None, out: Path) -> Path:
    """Make the demonstration in the folder `out` and return the path of its page.

    Raises UserError for a folder without a picture, or with none that can be read.
    """
    began = time.perf_counter()
    files = _files(images) if images is not None else []
    model = open_model()
    show = Demonstration(model, out)
    show.timings["open the model"] = time.perf_counter() - began
    pictures, known = _readable(files, show.size) if files else (None, [])
    drawn: tuple[Drawn, ...] = ()
    edited: tuple[Edited, ...] = ()
    asked: tuple[Asked, ...] = ()
    if model.vocabulary is not None:
        drawn = show.drawn()
    scenes = scene_pictures(show.size).images(0, SCENES)
    names = [f"scene {number}" for number in range(1, SCENES + 1)]
    rebuilt = show.reconstructed(scenes, names, "scenes")
    if pictures is not None:
        rebuilt += show.reconstructed(pictures, known, "pictures")
    if model.vocabulary is not None and model.stage == "instruct":
        edited, asked = show.edited(), show.asked()
    show.timings["all together"] = time.perf_counter() - began
    cores = torch.get_num_threads()
    about = (
        f"Image tokenizer of {model.tokenizer.num_tokens} tokens, {model.tokenizer.codebook_size} "
        f"codes, {show.size} x {show.size} pixels; {cores} CPU threads. Prompts, scenes, edits and "
        "questions were not in training."
    )
    save_demo(
        out,
        Demo(
            model.name, about, drawn, rebuilt, edited, asked, {**flat(show.figures)}, show.timings
        ),
    )
    return write_demo_page(out)


def scene_pictures(size: int) -> ScenePictures:
    """Return the held-out scenes that are rebuilt."""
    return ScenePictures(SCENES, size)


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"images: {folder} is no folder; give a folder with pictures")
    files = image_files(sorted(path for path in folder.iterdir() if path.is_file()))
    if not files:
        raise UserError(f"images: {folder} holds no picture; give a folder with some")
    return files


def _readable(files: Sequence[Path], size: int) -> tuple[Float[Tensor, "b 3 h w"], list[str]]:
    """Read pictures; name those that cannot be read on standard error and go on without them."""
    pictures, names = [], []
    for file in files:
        try:
            pictures.append(open_image(file, size))
            names.append(file.name)
        except BrokenImage as error:
            print(f"skipped: {error}", file=sys.stderr)
    if not pictures:
        raise UserError(f"images: none of {len(files)} pictures could be read; give others")
    return torch.stack(pictures), names
