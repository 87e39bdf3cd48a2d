"""What a language model shows along the way: drawings of fixed prompts, and scores of shapes."""

from collections.abc import Mapping
from typing import Any

import torch

from ddt_llama.config import replace_file
from ddt_llama.data.images import save_png, to_pil
from ddt_llama.evaluation.shapes_suite import ShapesSuite
from ddt_llama.generation.model import Model
from ddt_llama.generation.settings import Settings
from ddt_llama.language import TextTokenizer, Vocabulary, lora
from ddt_llama.recipes.data import SHAPES, DataConfig, pictures_of
from ddt_llama.recipes.drafts import open_form
from ddt_llama.recipes.language import LanguageRecipe
from ddt_llama.reports.pictures import sheet
from ddt_llama.runs import Run
from ddt_llama.shapes.prompts import CATEGORIES, heldout_prompts
from ddt_llama.tokenizer import Tokenizer

SHOWN = 8
SCORED = ShapesSuite(prompts=8, images=1, edits=36, questions=60, seed=0, use="tuning")


class DrawingSamples:
    """Draw fixed prompts (held-out captions) into a sheet; score drawing, editing and answers."""

    def __init__(
        self,
        recipe: LanguageRecipe,
        tokenizer: Tokenizer,
        vocabulary: Vocabulary,
        text: TextTokenizer,
    ) -> None:
        self.recipe, self.tokenizer = recipe, tokenizer
        self.vocabulary, self.text = vocabulary, text
        prompts, self.originals = prompts_to_show(recipe.data, tokenizer)
        # Cut as in training: a caption may be longer than the model has positions.
        self.prompts = [text.decode(text.encode(one)[: recipe.max_text]) for one in prompts]

    def model(self, language: Any, name: str) -> Model:
        """Put the language model in training together with its tokenizer; aligned, unguided."""
        parts = (self.tokenizer, language, self.vocabulary, self.text)
        settings = Settings(guidance_scale=1.0) if self.recipe.alignment else None
        return Model(*parts, settings=settings, stage=self.recipe.stage, name=name)

    def __call__(self, language: Any, step: int, run: Run) -> Mapping[str, float]:
        """Write the sheet and the prompts of this step; return the figures."""
        with lora.merged(language):
            return self._drawn(self.model(language, self.recipe.name), step, run)

    def _drawn(self, model: Model, step: int, run: Run) -> Mapping[str, float]:
        stem = run.samples / f"step-{step:08d}"
        with torch.autocast(model.device.type, enabled=False):
            if self.prompts:
                drawn = model.draw(self.prompts, seed=list(range(len(self.prompts))))
                save_png(sheet([*self.originals, *drawn], len(drawn)), stem.with_suffix(".png"))
                replace_file(stem.with_suffix(".txt"), "\n".join([*self.prompts, ""]).encode())
            return self._scores(model) if SHAPES in self.recipe.data.paths else {}

    def _scores(self, model: Model) -> Mapping[str, float]:
        found = dict(SCORED.drawing(model))
        if self.recipe.stage == "instruct":
            found |= SCORED.editing(model) | SCORED.asking(model)
        wanted = ("overall", "edit.both", "questions", "readable")
        names = {f"shapes.{name}": f"sample.{name}" for name in wanted}
        return {names[name]: figure.value for name, figure in found.items() if name in names}


def prompts_to_show(data: DataConfig, tokenizer: Tokenizer) -> tuple[list[str], list[Any]]:
    """Return prompts to draw, and the pictures that they describe where those exist.

    Captions of pictures that training leaves alone; for shapes, prompts kept for tuning. Of data
    that are codes the pictures are what the tokenizer makes of them.
    """
    files = [path for path in data.paths if path != SHAPES]
    for path in files:
        split = data.unseen_split(path)
        source = open_form(data, path, tokenizer.image_size, "image", split)
        rows = range(0, len(source), max(1, len(source) // (4 * SHOWN)))
        samples = [one for one in source.batch(rows) if one.caption][:SHOWN]
        if samples:
            pictures = to_pil(pictures_of(samples, tokenizer))
            return [one.caption or "" for one in samples], pictures
    if files:
        return [], []
    each = [heldout_prompts(category, 2, 0, use="tuning") for category in CATEGORIES]
    return [prompt for pair in zip(*each, strict=True) for prompt, _ in pair][:SHOWN], []
