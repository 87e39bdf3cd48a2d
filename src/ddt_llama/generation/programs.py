"""All that a model can do, as programs: drawing is a plan, a picture, a look at it, another try.

Between `Model` or a server, which carry programs out, and the engine, which knows ids.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddt_llama.config import UserError
from ddt_llama.generation.engine import Answer, Codes, Ids
from ddt_llama.generation.pictures import ImageInput, read_images, views
from ddt_llama.generation.sampling import GREEDY, Sampling, TopP
from ddt_llama.generation.settings import Options, Settings, given_texts, plan_seed, row_seeds
from ddt_llama.generation.tries import best_tries
from ddt_llama.generation.work import Decode, Encode, Program, Write
from ddt_llama.language import documents
from ddt_llama.language.documents import Document, without_text
from ddt_llama.language.text import TextTokenizer
from ddt_llama.language.vocabulary import Vocabulary
from ddt_llama.tokenizer.base import Tokenizer

Stage = Literal["pretrain", "instruct"]
Images = ImageInput | Sequence[ImageInput]
Shown = list[list[list[int]]]  # of each picture the codes of each of its views, in language order
PLANNING = Sampling(TopP(0.9))  # of plans: layouts differ from seed to seed, oddities are left out


@dataclass(frozen=True)
class Programs:
    """What a model of these parts can do; settings are read when a program begins."""

    tokenizer: Tokenizer
    vocabulary: Vocabulary
    text: TextTokenizer
    settings: Settings
    stage: Stage
    name: str

    def draw(
        self,
        prompts: str | Sequence[str],
        num: int = 1,
        seed: int | Sequence[int] = 0,
        options: Options | None = None,
    ) -> Program[Float[Tensor, "b 3 h w"]]:
        """Draw `num` images of each prompt, prompt by prompt; see `Model.draw`."""
        steps = self.settings.changed(options or {}).steps
        codes, seeds = yield from self.draw_codes(prompts, num, seed, options)
        return (yield Decode(codes, seeds, steps))

    def draw_codes(
        self,
        prompts: str | Sequence[str],
        num: int = 1,
        seed: int | Sequence[int] = 0,
        options: Options | None = None,
    ) -> Program[tuple[Int[Tensor, "b k"], list[int]]]:
        """Write the codes of images, index 0 finest; also return the seed of each."""
        settings = self.settings.changed(options or {})
        given = given_texts(prompts, "prompt")
        seeds = row_seeds(seed, len(given), num)
        told = [prompt for prompt in given for _ in range(num)]
        plans = (yield from self._plans(told, seeds)) if settings.plan else None
        constructor = documents.text_to_image if self.stage == "pretrain" else documents.draw
        requests = [constructor(text, None) for text in plans or told]
        return (yield from self._images(requests, seeds, settings, plans)), seeds

    def plan(
        self, prompts: str | Sequence[str], num: int = 1, seed: int | Sequence[int] = 0
    ) -> Program[list[str]]:
        """Write the descriptions that `draw` draws from where the release plans."""
        given = given_texts(prompts, "prompt")
        seeds = row_seeds(seed, len(given), num)
        told = [prompt for prompt in given for _ in range(num)]
        return (yield from self._plans(told, seeds))

    def edit(
        self,
        images: Images,
        instructions: str | Sequence[str],
        num: int = 1,
        seed: int | Sequence[int] = 0,
        options: Options | None = None,
    ) -> Program[Float[Tensor, "b 3 h w"]]:
        """Change each image as its instruction says; see `Model.edit`."""
        steps = self.settings.changed(options or {}).steps
        codes, seeds = yield from self.edit_codes(images, instructions, num, seed, options)
        return (yield Decode(codes, seeds, steps))

    def edit_codes(
        self,
        images: Images,
        instructions: str | Sequence[str],
        num: int = 1,
        seed: int | Sequence[int] = 0,
        options: Options | None = None,
    ) -> Program[tuple[Int[Tensor, "b k"], list[int]]]:
        """Write the codes of changed images, index 0 finest; also return the seed of each."""
        self._need_instruct("edit")
        settings = self.settings.for_edits().changed(options or {})
        texts = given_texts(instructions, "instruction")
        shown, given = yield from self._paired(images, texts, settings.plan)
        seeds = row_seeds(seed, len(given), num)
        rows = [codes[0] for codes in shown for _ in range(num)]
        told = [text for text in given for _ in range(num)]
        plans = None
        if settings.plan:
            seen = yield from self.described(shown)
            changes = [documents.to_change(*pair) for pair in zip(seen, given, strict=True)]
            wanted = yield from self._plans([one for one in changes for _ in range(num)], seeds)
            there = [one for one in seen for _ in range(num)]
            plans = [documents.changed(*pair) for pair in zip(there, wanted, strict=True)]
            told = [documents.with_result(*pair) for pair in zip(told, plans, strict=True)]
        requests = [documents.edit(*pair, None) for pair in zip(rows, told, strict=True)]
        return (yield from self._images(requests, seeds, settings, plans)), seeds

    def ask(self, images: Images, questions: str | Sequence[str]) -> Program[list[str]]:
        """Answer each question about its image; see `Model.ask_many`."""
        self._need_instruct("ask")
        look = self.settings.look
        texts = given_texts(questions, "question")
        shown, given = yield from self._paired(images, texts, look)
        if not look:
            pairs = zip(shown, given, strict=True)
            requests = [documents.ask(rows[0], text, None) for rows, text in pairs]
            return (yield from self.texts(requests))
        seen = yield from self.described(shown)
        answers = yield from self.texts(
            [
                documents.ask(rows[0], documents.DESCRIBE, told, [(text, None)])
                for rows, told, text in zip(shown, seen, given, strict=True)
            ]
        )
        return [documents.conclusion(answer) for answer in answers]

    def describe(self, images: Images) -> Program[list[str]]:
        """Say what is in each image."""
        pretrained = self.stage == "pretrain"
        constructor = documents.image_to_text if pretrained else documents.describe
        shown = yield from self._shown(images, look=True)
        return (yield from self.described(shown, constructor))

    def described(
        self,
        shown: Shown,
        constructor: Callable[[list[int], str | None], Document] = documents.describe,
    ) -> Program[list[str]]:
        """Describe pictures, each by the codes of all its views; one that comes again only once."""
        keys = [tuple(map(tuple, codes)) for codes in shown]
        different = dict(zip(keys, shown, strict=True))
        requests = [constructor(row, None) for codes in different.values() for row in codes]
        answers = yield from self.texts(requests, together=len(shown[0]))
        told = dict(zip(different, answers, strict=True))
        return [told[key] for key in keys]

    def texts(
        self,
        requests: Sequence[Document],
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,
        together: int = 1,
    ) -> Program[list[str]]:
        """Answer requests with text, each `together` of them in turn with one."""
        prompts = [self._ids(request) for request in requests]
        grouped = [tuple(prompts[i : i + together]) for i in range(0, len(prompts), together)]
        seeds = [0] * len(grouped) if seeds is None else seeds
        answers = yield Write(
            [Answer(each, sampling, seed) for each, seed in zip(grouped, seeds, strict=True)]
        )
        return [self.text.decode(answer.tolist()).strip() for answer in answers]

    def _plans(self, prompts: Sequence[str], seeds: Sequence[int]) -> Program[list[str]]:
        self._need_instruct("plan")
        requests = [documents.plan(prompt, None) for prompt in prompts]
        own = [plan_seed(seed) for seed in seeds]
        return (yield from self.texts(requests, PLANNING, own))

    def _images(
        self,
        requests: Sequence[Document],
        seeds: Sequence[int],
        settings: Settings,
        plans: Sequence[str] | None,
    ) -> Program[Int[Tensor, "b k"]]:
        """Write a picture for each request; look at it, and try again, where there are plans."""

        def write(rows: Sequence[int], own: Sequence[int]) -> Program[Tensor]:
            tasks = [
                self._codes(requests[row], seed, settings)
                for row, seed in zip(rows, own, strict=True)
            ]
            return torch.stack((yield Write(list(tasks))))

        def describe(codes: Tensor) -> Program[list[str]]:
            return self.described([[row] for row in codes.tolist()])

        if plans is None or settings.tries == 1:
            codes = yield from write(range(len(requests)), seeds)
        else:
            codes = yield from best_tries(write, describe, plans, seeds, settings)
        return self.tokenizer.from_language(codes)

    def _codes(self, request: Document, seed: int, settings: Settings) -> Codes:
        return Codes(
            prompt=self._ids(request),
            unconditional=self._ids(without_text(request)),
            guidance_scale=settings.guidance_scale,
            sampling=settings.sampling(),
            seed=seed,
            source=documents.source(request),
        )

    def _paired(
        self, images: Images, texts: list[str], look: bool
    ) -> Program[tuple[Shown, list[str]]]:
        shown = yield from self._shown(images, look)
        count = max(len(shown), len(texts))
        if {len(shown), len(texts)} - {1, count}:
            raise UserError(
                f"{len(shown)} images for {len(texts)} texts; give as many of each, or one of one"
            )
        return (shown * count)[:count], (texts * count)[:count]

    def _shown(self, images: Images, look: bool) -> Program[Shown]:
        """Encode images, and their views for a look at them."""
        count = self.settings.views if look else 1
        codes = yield Encode(views(read_images(images, self.tokenizer.image_size), count))
        rows = self.tokenizer.to_language(codes).tolist()
        return [rows[i : i + count] for i in range(0, len(rows), count)]

    def _ids(self, request: Document) -> Ids:
        return tuple(documents.render(request, self.vocabulary, self.text).ids)

    def _need_instruct(self, what: str) -> None:
        if self.stage != "instruct":
            raise UserError(
                f"model {self.name} cannot {what}: it is pretrained only; train it on instructions"
            )
