"""One model, all it can do: draw, edit, ask, describe, reconstruct.

The face of a trained model in Python, behind every command and every score. Puts together the image
tokenizer (pixels and codes), the language model (codes and text) and the decode engine.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Unpack

import PIL.Image
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ddt_llama.checkpoint import replaced
from ddt_llama.config import UserError, replace_file, save_json, to_dict
from ddt_llama.data.images import to_pil
from ddt_llama.generation.batch import write
from ddt_llama.generation.engine import Engine, decoder_of
from ddt_llama.generation.history import History
from ddt_llama.generation.pictures import ImageInput, read_images
from ddt_llama.generation.programs import Images, Programs, Stage
from ddt_llama.generation.settings import Options, Settings, row_seeds
from ddt_llama.generation.work import Decode, Encode, Program, R, Work
from ddt_llama.language.text import TextTokenizer
from ddt_llama.language.vocabulary import Vocabulary
from ddt_llama.tokenizer.base import Tokenizer

FORMAT = "ddt-llama"  # of release folders
PARTS = {"config.json", "README.md", "tokenizer", "language"}  # of a release folder
PREVIEW_STEPS = 4  # denoising steps of an unfinished image; a renderer expects whole ones
VERSION = 2  # 1: language models without the mark `same`
# How tokenizer and language model are stored in so many bits.
_STORED: Mapping[int | None, tuple[torch.dtype | None, torch.dtype | None]] = {
    None: (None, None),
    16: (torch.float16, torch.float16),
    8: (torch.int8, torch.float8_e4m3fn),
}


def check_place(folder: Path) -> None:
    """Raise UserError where `folder` holds other things than a release, which would be lost."""
    inside = {item.name for item in folder.iterdir()} if folder.is_dir() else set()
    if folder.is_file() or not inside <= PARTS or (inside and "config.json" not in inside):
        raise UserError(f"{folder}: exists and is no release; choose another folder")


class Model:
    """An image tokenizer and, unless it is a tokenizer alone, a language model over its codes."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        language: nn.Module | Callable[[], nn.Module] | None = None,
        vocabulary: Vocabulary | None = None,
        text: TextTokenizer | None = None,
        *,
        engine: Engine | None = None,
        settings: Settings | None = None,
        stage: Stage = "instruct",
        name: str = "unnamed",
    ) -> None:
        """Join the parts. `language` may be what opens it, where an `engine` is given for drawing.

        The engine takes its own copy of the weights of `language`: after further training, make a
        new Model. Raises UserError where the parts do not belong together.
        """
        self.tokenizer = tokenizer
        self._language = language
        self.vocabulary = vocabulary
        self.text = text
        self.settings = settings or Settings()
        self.stage: Stage = stage
        self.name = name
        self.history = History()  # of its trainings: known to who trains or opens it
        self.batch_size = 32
        if vocabulary is not None:
            _check_belongs(tokenizer, vocabulary)
            if text is not None and text.size > vocabulary.text_size:
                raise UserError(
                    f"the text tokenizer has {text.size} ids, the language model was trained with "
                    f"{vocabulary.text_size}; take both from the same release"
                )
            if engine is None and isinstance(language, nn.Module):
                size = None if text is None else text.size
                engine = Engine(decoder_of(language), vocabulary, size)
        self.engine = engine
        self.device = _device_of(tokenizer, engine)

    @property
    def language(self) -> nn.Module:
        """The transformers module, for likelihoods; opened when first asked for.

        Raises UserError for a model without one.
        """
        if self._language is None:
            _ = self.programs
            raise UserError(f"model {self.name} was made from an engine alone; give its module")
        if not isinstance(self._language, nn.Module):
            self._language = self._language()
        return self._language

    def draw(
        self,
        prompts: str | Sequence[str],
        *,
        num: int = 1,
        seed: int | Sequence[int] = 0,
        **options: Unpack[Options],
    ) -> list[PIL.Image.Image]:
        """Draw `num` images of each prompt, prompt by prompt.

        Image j of a prompt is the one that `seed + j` draws alone. `options` (guidance_scale,
        temperature, top_k, top_p, steps) replace the release's own. Raises UserError for an empty
        or too long prompt and for values out of range.
        """
        return to_pil(self.run(self.programs.draw(prompts, num, seed, options)))

    def draw_codes(
        self,
        prompts: str | Sequence[str],
        *,
        num: int = 1,
        seed: int | Sequence[int] = 0,
        **options: Unpack[Options],
    ) -> Int[Tensor, "b k"]:
        """Return the codes (index 0 finest) of the images that `draw` would show."""
        return self.run(self.programs.draw_codes(prompts, num, seed, options))[0]

    def plan(
        self, prompts: str | Sequence[str], *, num: int = 1, seed: int | Sequence[int] = 0
    ) -> list[str]:
        """Return the descriptions that `draw` draws from where the release plans."""
        return self.run(self.programs.plan(prompts, num, seed))

    def edit(
        self,
        images: Images,
        instructions: str | Sequence[str],
        *,
        num: int = 1,
        seed: int | Sequence[int] = 0,
        **options: Unpack[Options],
    ) -> list[PIL.Image.Image]:
        """Change each image as its instruction says; one image or one instruction serves for all.

        `num`, `seed` and `options` as in `draw`.
        """
        return to_pil(self.run(self.programs.edit(images, instructions, num, seed, options)))

    def edit_codes(
        self,
        images: Images,
        instructions: str | Sequence[str],
        *,
        num: int = 1,
        seed: int | Sequence[int] = 0,
        **options: Unpack[Options],
    ) -> Int[Tensor, "b k"]:
        """Return the codes (index 0 finest) of the images that `edit` would show."""
        return self.run(self.programs.edit_codes(images, instructions, num, seed, options))[0]

    def ask(self, image: ImageInput, question: str) -> str:
        """Answer a question about an image, the most likely words one by one."""
        return self.ask_many([image], [question])[0]

    def ask_many(self, images: Images, questions: str | Sequence[str]) -> list[str]:
        """Answer each question about its image; one image or one question serves for all."""
        return self.run(self.programs.ask(images, questions))

    def describe(self, image: ImageInput) -> str:
        """Say what is in an image."""
        return self.describe_many([image])[0]

    def describe_many(self, images: Images) -> list[str]:
        """Say what is in each image."""
        return self.run(self.programs.describe(images))

    @property
    def programs(self) -> Programs:
        """All that the model can do, to be carried out by `run`.

        Raises UserError for a model without a language model.
        """
        if self.engine is None or self.vocabulary is None or self.text is None:
            raise UserError(
                f"model {self.name} is an image tokenizer without a language model: it can "
                "reconstruct only; give a model with a language folder, such as nano"
            )
        parts = (self.tokenizer, self.vocabulary, self.text)
        return Programs(*parts, self.settings, self.stage, self.name)

    def run(self, program: Program[R]) -> R:
        """Carry a program out, one piece of work after the other."""
        result = None
        while True:
            try:
                work = program.send(result)
            except StopIteration as end:
                return end.value
            result = self.perform(work)

    def perform(self, work: Work) -> Any:
        """Do one piece of work; each kind says what it results in."""
        if isinstance(work, Encode):
            return self.encode(work.images)
        if isinstance(work, Decode):
            return self.decode(work.codes, work.seeds, work.steps, work.visible)
        if self.engine is None:
            raise UserError(f"model {self.name} has no language model; give one that writes")
        return write(self.engine, work.tasks, self.batch_size)

    def reconstruct(
        self,
        images: Images,
        *,
        steps: int | None = None,
        visible: int | None = None,
        seed: int = 0,
    ) -> list[PIL.Image.Image]:
        """Encode images and decode them again from their `visible` coarsest tokens (None: all)."""
        steps = self.settings.changed({"steps": steps}).steps
        codes = self.encode(images)
        return to_pil(self.decode(codes, row_seeds(seed, len(codes), 1), steps, visible))

    def encode(self, images: Images) -> Int[Tensor, "b k"]:
        """Return the codes (index 0 finest) of images: paths, bytes, PIL images or tensors."""
        pixels = read_images(images, self.tokenizer.image_size)
        parts = pixels.split(self.batch_size)
        return torch.cat([self.tokenizer.encode(part.to(self.device)) for part in parts])

    def decode(
        self,
        codes: Int[Tensor, "b k"],
        seeds: Sequence[int],
        steps: int | None = None,
        visible: int | tuple[bool, ...] | None = None,
    ) -> Float[Tensor, "b 3 h w"]:
        """Return images in [-1, 1] of codes, the noise of row i started by `seeds[i]`."""
        steps = self.settings.steps if steps is None else steps
        used = torch.tensor(visible) if isinstance(visible, tuple) else visible
        images = [
            self.tokenizer.decode(
                codes[start : start + self.batch_size].to(self.device),
                steps=steps,
                visible=used,
                seed=list(seeds[start : start + self.batch_size]),
            )
            for start in range(0, len(codes), self.batch_size)
        ]
        return torch.cat(images).float().cpu()

    def unfinished(
        self, codes: Int[Tensor, "b n"], seeds: Sequence[int]
    ) -> Float[Tensor, "b 3 h w"]:
        """Return images in [-1, 1] of the first codes, in language order, as a preview shows them.

        The noise of row i is started by `seeds[i]`, as that of the whole image will be.
        """
        tokenizer, written = self.tokenizer, codes.shape[1]
        padded = nn.functional.pad(codes, (0, tokenizer.num_tokens - written))
        there = torch.arange(tokenizer.num_tokens, device=codes.device)[None] < written
        visible = tokenizer.from_language(there.long())[0].bool()
        steps = min(self.settings.steps or PREVIEW_STEPS, PREVIEW_STEPS)
        own = tokenizer.from_language(padded).to(self.device)
        return tokenizer.decode(own, steps=steps, visible=visible, seed=list(seeds)).float().cpu()

    def save(
        self, folder: str | Path, *, bits: Literal[16, 8] | None = None, written: Path | None = None
    ) -> None:
        """Write a release folder that `load` opens.

        Weights are stored as they are, in float16, or in 8 bits (the tokenizer's matrices as
        integers with a scale a row, the language model's matrices and tables as float8). `written`
        is the language folder where there is one already, on the same disk: it is moved.

        All or nothing: a release that is there stays until the new one is complete. A README.md in
        it is kept. Raises UserError where the folder holds other things.
        """
        folder = Path(folder)
        check_place(folder)
        card = f"# {self.name}\n\n`ddt_llama.load` opens this folder, a model of ddt-llama.\n"
        if (folder / "README.md").is_file():
            card = (folder / "README.md").read_text(encoding="utf-8")
        with replaced(folder) as partial:
            if written is not None:
                written.rename(partial / "language")
            self._write(partial, *_STORED[bits])
            replace_file(partial / "README.md", card.encode())

    def _write(
        self, folder: Path, of_images: torch.dtype | None, of_language: torch.dtype | None
    ) -> None:
        self.tokenizer.save(folder / "tokenizer", dtype=of_images)
        is_there = (folder / "language").is_dir()
        if self.vocabulary is not None and self.text is not None and not is_there:
            from ddt_llama.language import backbone

            language: Any = self.language
            backbone.save(
                folder / "language", language, self.vocabulary, self.text, dtype=of_language
            )
        save_json(folder / "config.json", self.described())

    def described(self) -> dict[str, Any]:
        """Return what a release says of itself."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "name": self.name,
            "stage": self.stage,
            "generation": to_dict(self.settings),
            **to_dict(self.history),
        }


def _check_belongs(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Refuse a language model that was trained on another tokenizer's codes."""
    for name in ("codebook_size", "num_tokens"):
        own, other = getattr(tokenizer, name), getattr(vocabulary, name)
        if own != other:
            raise UserError(
                f"the image tokenizer has {name} {own}, the language model was trained with "
                f"{other}; take both from the same release"
            )


def _device_of(tokenizer: Tokenizer, engine: Engine | None) -> torch.device:
    if isinstance(tokenizer, nn.Module):
        return next((weight.device for weight in tokenizer.parameters()), torch.device("cpu"))
    return torch.device("cpu") if engine is None else engine.decoder.device
