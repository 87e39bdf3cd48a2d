"""Requests in, codes or texts out: documents are laid out, put into batches and answered.

Between `model`, which knows pictures, and the engine, which knows ids.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ddt_llama.generation.engine import Engine
from ddt_llama.generation.sampling import GREEDY, Sampling
from ddt_llama.generation.settings import Settings
from ddt_llama.language import documents
from ddt_llama.language.documents import Document, without_text
from ddt_llama.language.text import TextTokenizer
from ddt_llama.language.vocabulary import Vocabulary


def split(rows: Any, size: int) -> Iterator[Any]:
    """Cut a list or tensor into parts of `size` rows."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


@dataclass(frozen=True)
class Writer:
    """A language model that answers documents, `batch_size` answers at once."""

    engine: Engine
    vocabulary: Vocabulary
    text: TextTokenizer
    batch_size: int

    def codes(
        self, requests: Sequence[Document], seeds: Sequence[int], settings: Settings
    ) -> Int[Tensor, "b k"]:
        """Answer each request with the codes of a picture, in language order."""
        prompts = [self._ids(request) for request in requests]
        twins = [self._ids(without_text(request)) for request in requests]
        sources = [documents.source(request) for request in requests]
        parts = [
            self.engine.codes(
                rows,
                unconditional=empty,
                guidance_scale=settings.guidance_scale,
                sampling=settings.sampling(),
                seeds=own,
                sources=None if None in there else there,
            )
            for rows, empty, own, there in zip(
                *(split(each, self.batch_size) for each in (prompts, twins, seeds, sources)),
                strict=True,
            )
        ]
        return torch.cat(parts)

    def texts(
        self,
        requests: Sequence[Document],
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,
        together: int = 1,
    ) -> list[str]:
        """Answer requests with text, each `together` of them in turn with one."""
        grouped = list(split([self._ids(request) for request in requests], together))
        seeds = [0] * len(grouped) if seeds is None else seeds
        answers = [
            answer
            for part, own in zip(
                split(grouped, self.batch_size), split(seeds, self.batch_size), strict=True
            )
            for answer in self.engine.text(
                list(chain(*part)), sampling=sampling, seeds=own, together=together
            )
        ]
        return [self.text.decode(answer).strip() for answer in answers]

    def described(
        self,
        shown: Sequence[Sequence[list[int]]],
        constructor: Callable[[list[int], str | None], Document] = documents.describe,
    ) -> list[str]:
        """Describe pictures, each by the codes of all its views; one that comes again only once."""
        keys = [tuple(map(tuple, views)) for views in shown]
        different = dict(zip(keys, shown, strict=True))
        requests = [constructor(row, None) for views in different.values() for row in views]
        answers = self.texts(requests, together=len(shown[0]))
        told = dict(zip(different, answers, strict=True))
        return [told[key] for key in keys]

    def _ids(self, request: Document) -> list[int]:
        return documents.render(request, self.vocabulary, self.text).ids
