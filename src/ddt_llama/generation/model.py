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
from ddt_llama.generation.engine import Engine, decoder_of
from ddt_llama.generation.history import History
from ddt_llama.generation.pictures import ImageInput, read_images, views
from ddt_llama.generation.sampling import Sampling, TopP
from ddt_llama.generation.settings import Options, Settings, given_texts, plan_seed, row_seeds
from ddt_llama.generation.tries import best_tries
from ddt_llama.generation.writer import Writer, split
from ddt_llama.language import documents
from ddt_llama.language.documents import Document
from ddt_llama.language.text import TextTokenizer
from ddt_llama.language.vocabulary import Vocabulary
from ddt_llama.tokenizer.base import Tokenizer

Stage = Literal["pretrain", "instruct"]
FORMAT = "ddt-llama"  # of release folders
PARTS = {"config.json", "README.md", "tokenizer", "language"}  # of a release folder
VERSION = 2  # 1: language models without the mark `same`
PLANNING = Sampling(TopP(0.9))  # of plans: layouts differ from seed to seed, oddities are left out
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
            self._writer()
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
        steps = self.settings.changed(options).steps
        seeds = row_seeds(seed, len(given_texts(prompts, "prompt")), num)
        codes = self.draw_codes(prompts, num=num, seed=seed, **options)
        return to_pil(self.decode(codes, seeds, steps=steps))

    def draw_codes(
        self,
        prompts: str | Sequence[str],
        *,
        num: int = 1,
        seed: int | Sequence[int] = 0,
        **options: Unpack[Options],
    ) -> Int[Tensor, "b k"]:
        """Return the codes (index 0 finest) of the images that `draw` would show."""
        settings = self.settings.changed(options)
        given = given_texts(prompts, "prompt")
        seeds = row_seeds(seed, len(given), num)
        told = [prompt for prompt in given for _ in range(num)]
        plans = self._plans(told, seeds) if settings.plan else None
        constructor = documents.text_to_image if self.stage == "pretrain" else documents.draw
        requests = [constructor(text, None) for text in plans or told]
        return self._write_images(requests, seeds, settings, plans)

    def plan(
        self, prompts: str | Sequence[str], *, num: int = 1, seed: int | Sequence[int] = 0
    ) -> list[str]:
        """Return the descriptions that `draw` draws from where the release plans."""
        given = given_texts(prompts, "prompt")
        seeds = row_seeds(seed, len(given), num)
        return self._plans([prompt for prompt in given for _ in range(num)], seeds)

    def _plans(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[str]:
        self._need_instruct("plan")
        requests = [documents.plan(prompt, None) for prompt in prompts]
        return self._writer().texts(requests, PLANNING, [plan_seed(seed) for seed in seeds])

    def edit(
        self,
        images: ImageInput | Sequence[ImageInput],
        instructions: str | Sequence[str],
        *,
        num: int = 1,
        seed: int | Sequence[int] = 0,
        **options: Unpack[Options],
    ) -> list[PIL.Image.Image]:
        """Change each image as its instruction says; one image or one instruction serves for all.

        `num`, `seed` and `options` as in `draw`.
        """
        steps = self.settings.changed(options).steps
        codes, seeds = self._edit(images, instructions, num, seed, options)
        return to_pil(self.decode(codes, seeds, steps=steps))

    def edit_codes(
        self,
        images: ImageInput | Sequence[ImageInput],
        instructions: str | Sequence[str],
        *,
        num: int = 1,
        seed: int | Sequence[int] = 0,
        **options: Unpack[Options],
    ) -> Int[Tensor, "b k"]:
        """Return the codes (index 0 finest) of the images that `edit` would show."""
        return self._edit(images, instructions, num, seed, options)[0]

    def ask(self, image: ImageInput, question: str) -> str:
        """Answer a question about an image, the most likely words one by one."""
        return self.ask_many([image], [question])[0]

    def ask_many(
        self, images: ImageInput | Sequence[ImageInput], questions: str | Sequence[str]
    ) -> list[str]:
        """Answer each question about its image; one image or one question serves for all."""
        self._need_instruct("ask")
        look, writer = self.settings.look, self._writer()
        shown, given = self._paired(images, given_texts(questions, "question"), look)
        if not look:
            pairs = zip(shown, given, strict=True)
            return writer.texts([documents.ask(rows[0], text, None) for rows, text in pairs])
        answers = writer.texts(
            [
                documents.ask(rows[0], documents.DESCRIBE, told, [(text, None)])
                for rows, told, text in zip(shown, writer.described(shown), given, strict=True)
            ]
        )
        return [documents.conclusion(answer) for answer in answers]

    def describe(self, image: ImageInput) -> str:
        """Say what is in an image."""
        return self.describe_many([image])[0]

    def describe_many(self, images: ImageInput | Sequence[ImageInput]) -> list[str]:
        """Say what is in each image."""
        pretrained = self.stage == "pretrain"
        constructor = documents.image_to_text if pretrained else documents.describe
        return self._writer().described(self._shown(images, look=True), constructor)

    def reconstruct(
        self,
        images: ImageInput | Sequence[ImageInput],
        *,
        steps: int | None = None,
        visible: int | None = None,
        seed: int = 0,
    ) -> list[PIL.Image.Image]:
        """Encode images and decode them again from their `visible` coarsest tokens (None: all)."""
        steps = self.settings.changed({"steps": steps}).steps
        codes = self.encode(images)
        return to_pil(self.decode(codes, row_seeds(seed, len(codes), 1), steps, visible))

    def encode(self, images: ImageInput | Sequence[ImageInput]) -> Int[Tensor, "b k"]:
        """Return the codes (index 0 finest) of images: paths, bytes, PIL images or tensors."""
        pixels = read_images(images, self.tokenizer.image_size)
        parts = [
            self.tokenizer.encode(part.to(self.device)) for part in split(pixels, self.batch_size)
        ]
        return torch.cat(parts)

    def decode(
        self,
        codes: Int[Tensor, "b k"],
        seeds: Sequence[int],
        steps: int | None = None,
        visible: int | None = None,
    ) -> Float[Tensor, "b 3 h w"]:
        """Return images in [-1, 1] of codes, the noise of row i started by `seeds[i]`."""
        steps = self.settings.steps if steps is None else steps
        codes, size = codes.to(self.device), self.batch_size
        images = [
            self.tokenizer.decode(part, steps=steps, visible=visible, seed=list(own))
            for part, own in zip(*(split(rows, size) for rows in (codes, seeds)), strict=True)
        ]
        return torch.cat(images).float().cpu()

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

    def _edit(
        self,
        images: ImageInput | Sequence[ImageInput],
        instructions: str | Sequence[str],
        num: int,
        seed: int | Sequence[int],
        options: Options,
    ) -> tuple[Tensor, list[int]]:
        self._need_instruct("edit")
        settings = self.settings.for_edits().changed(options)
        texts = given_texts(instructions, "instruction")
        shown, given = self._paired(images, texts, settings.plan)
        seeds = row_seeds(seed, len(given), num)
        rows = [codes[0] for codes in shown for _ in range(num)]
        told = [text for text in given for _ in range(num)]
        plans = None
        if settings.plan:
            seen = self._writer().described(shown)
            changes = [documents.to_change(*pair) for pair in zip(seen, given, strict=True)]
            wanted = self._plans([change for change in changes for _ in range(num)], seeds)
            there = [one for one in seen for _ in range(num)]
            plans = [documents.changed(*pair) for pair in zip(there, wanted, strict=True)]
            told = [documents.with_result(*pair) for pair in zip(told, plans, strict=True)]
        requests = [documents.edit(*pair, None) for pair in zip(rows, told, strict=True)]
        return self._write_images(requests, seeds, settings, plans), seeds

    def _write_images(
        self,
        requests: Sequence[Document],
        seeds: Sequence[int],
        settings: Settings,
        plans: Sequence[str] | None = None,
    ) -> Tensor:
        """Write a picture for each request; look at it, and try again, where there are plans."""
        writer = self._writer()

        def write(rows: Sequence[int], own: Sequence[int]) -> Tensor:
            return writer.codes([requests[row] for row in rows], own, settings)

        def describe(codes: Tensor) -> list[str]:
            return writer.described([[row] for row in codes.tolist()])

        if plans is None or settings.tries == 1:
            return self.tokenizer.from_language(write(range(len(requests)), seeds))
        return self.tokenizer.from_language(best_tries(write, describe, plans, seeds, settings))

    def _paired(
        self, images: ImageInput | Sequence[ImageInput], texts: list[str], look: bool
    ) -> tuple[list[list[list[int]]], list[str]]:
        shown = self._shown(images, look)
        count = max(len(shown), len(texts))
        if {len(shown), len(texts)} - {1, count}:
            raise UserError(
                f"{len(shown)} images for {len(texts)} texts; give as many of each, or one of one"
            )
        return (shown * count)[:count], (texts * count)[:count]

    def _shown(
        self, images: ImageInput | Sequence[ImageInput], look: bool
    ) -> list[list[list[int]]]:
        """Return the codes of each image, in language order, and of its views for a look at it."""
        self._writer()  # complain before the images are read
        count = self.settings.views if look else 1
        codes = self.encode(views(read_images(images, self.tokenizer.image_size), count))
        rows = self.tokenizer.to_language(codes).tolist()
        return [rows[i : i + count] for i in range(0, len(rows), count)]

    def _writer(self) -> Writer:
        if self.engine is None or self.vocabulary is None or self.text is None:
            raise UserError(
                f"model {self.name} is an image tokenizer without a language model: it can "
                "reconstruct only; give a model with a language folder, such as nano"
            )
        return Writer(self.engine, self.vocabulary, self.text, self.batch_size)

    def _need_instruct(self, what: str) -> None:
        self._writer()
        if self.stage != "instruct":
            raise UserError(
                f"model {self.name} cannot {what}: it is pretrained only; train it on instructions"
            )


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
