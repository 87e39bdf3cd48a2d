"""Prompts in, codes or text out: what is to be written, and the rules for writing it.

Stands between `writer`, which knows documents, and the decoders, which know weights. Inside an
image only codes can be drawn, and exactly `num_tokens` of them; in an answer only text and the end
mark. The writing itself, side by side, is `batch`.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ddt_llama.config import UserError
from ddt_llama.generation.lean import LeanDecoder, obstacle
from ddt_llama.generation.precision import Weights, dtype_of, hold
from ddt_llama.generation.rows import Prompts, Rows, rounded
from ddt_llama.generation.sampling import FULL, GREEDY, Sampling
from ddt_llama.language.vocabulary import Vocabulary

Ids = tuple[int, ...]
KEPT = 8  # prompts whose keys and values are kept, because many images share them


@runtime_checkable
class Decoder(Protocol):
    """A language model that reads prompts once and then one token a row at a time."""

    max_positions: int

    @property
    def device(self) -> torch.device:
        """Where ids are expected."""
        ...

    def read(self, ids: Int[Tensor, "u p"], lengths: Sequence[int]) -> Prompts:
        """Read prompts that are padded at their ends."""
        ...

    def step(self, ids: Int[Tensor, " r"], rows: Rows) -> Float[Tensor, "r s"]:
        """Append one token to each row and return the states that the next ones are drawn from."""
        ...

    def logits(self, states: Float[Tensor, "r s"], head: slice) -> Float[Tensor, "r v"]:
        """Return the logits of the vocabulary rows `head`."""
        ...


@dataclass(frozen=True)
class Codes:
    """An image to be written behind `prompt`.

    `unconditional` is the prompt's twin without text, for classifier-free guidance; without it, or
    at scale 1, the image takes one row instead of two. `source` are the codes that it edits: then
    the mark `same` may be drawn, too, and stands for the code of the source at its place.
    """

    prompt: Ids
    unconditional: Ids | None = None
    guidance_scale: float = 1.0
    sampling: Sampling = FULL
    seed: int = 0
    source: Ids | None = None

    @property
    def prompts(self) -> tuple[Ids, ...]:
        """One prompt a row."""
        if self.unconditional is None or self.guidance_scale == 1.0:
            return (self.prompt,)
        return self.prompt, self.unconditional


@dataclass(frozen=True)
class Answer:
    """Text to be written behind `prompts`, up to the end mark or `most` tokens.

    Several prompts, such as views of one picture, get one answer, written by the mean of their
    log-probabilities: a product of experts.
    """

    prompts: tuple[Ids, ...]
    sampling: Sampling = GREEDY
    seed: int = 0
    most: int = 96


Task = Codes | Answer


def decoder_of(module: nn.Module, weights: Weights | None = None) -> Decoder:
    """Choose the fast path where the architecture allows it, transformers' own forward otherwise.

    The fast path copies the weights (fused), so build it anew after the module was trained further.
    So does the other where `weights` says how to hold them: None holds them as the module does.
    """
    config: Any = module.config
    described: Mapping[str, Any] = config.to_dict()
    if obstacle(described) is None:
        state = module.state_dict()
        if weights is not None:
            dtype = dtype_of(weights, torch.device("cpu"))
            state = {name: one.to(dtype) for name, one in state.items()}
        return LeanDecoder(described, state, int8=weights == "int8")
    from ddt_llama.generation.generic import GenericDecoder

    return GenericDecoder(module if weights is None else hold(copy.deepcopy(module), weights))


class Engine:
    """One decoder and one vocabulary, and what both allow."""

    def __init__(
        self, decoder: Decoder, vocabulary: Vocabulary, num_text: int | None = None
    ) -> None:
        """Take `num_text` where the text tokenizer knows fewer ids than the model has text rows."""
        self.decoder = decoder
        self.vocabulary = vocabulary
        self.num_text = vocabulary.text_size if num_text is None else num_text
        impossible = torch.ones(vocabulary.code_offset, dtype=torch.bool, device=decoder.device)
        impossible[: self.num_text] = False
        impossible[vocabulary.eos] = False
        self._impossible = impossible
        self._kept: dict[Ids, Prompts] = {}
        self._idle: Rows | None = None

    def rows(self, count: int, capacity: int) -> Rows:
        """Return room for at least so many rows of so many tokens: what was set aside, if it does.

        Room that is there already may know recordings of steps.
        """
        idle, self._idle = self._idle, None
        if idle is not None and idle.room >= count and idle.capacity >= capacity:
            return idle
        return Rows(count, capacity, self.decoder.device)

    def set_aside(self, rows: Rows) -> None:
        """Keep free rows for the next writing, if steps are recorded of them."""
        if rows.recorded:
            self._idle = rows

    def steps(self, task: Task) -> int:
        """Return how many tokens a task may write."""
        return task.most if isinstance(task, Answer) else self.vocabulary.num_tokens

    def length(self, task: Task) -> int:
        """Return the tokens of a task's longest row at its end."""
        return max(map(len, task.prompts)) + self.steps(task)

    def head(self, task: Task) -> slice:
        """Return the rows of the vocabulary that a task may write."""
        vocabulary = self.vocabulary
        if isinstance(task, Answer):
            return slice(0, vocabulary.code_offset)
        edits = task.source is not None
        return slice(vocabulary.same if edits else vocabulary.code_offset, vocabulary.size)

    def possible(self, logits: Float[Tensor, "... v"]) -> Float[Tensor, "... v"]:
        """Leave text and the end mark in the logits of an answer."""
        return logits.masked_fill(self._impossible, -torch.inf)

    def finish(self, task: Task, ids: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Return codes 0 .. codebook_size-1 (in language order) or text ids of what was written."""
        if isinstance(task, Answer):
            return ids
        codes = ids - self.vocabulary.code_offset
        if task.source is not None:
            there = torch.tensor(task.source[: len(codes)], device=codes.device)
            codes = torch.where(codes < 0, there, codes)
        return codes

    def check(self, task: Task, limit: int | None = None) -> None:
        """Raise UserError for a task behind whose prompts there is not enough room."""
        if not task.prompts or not all(map(len, task.prompts)):
            raise UserError("a prompt has no tokens; every prompt needs at least the start mark")
        most = min(self.decoder.max_positions, limit or self.decoder.max_positions)
        if self.length(task) > most:
            steps = self.steps(task)
            raise UserError(
                f"the prompt is {max(map(len, task.prompts))} tokens long; this model reads at "
                f"most {most - steps} and then writes {steps}: shorten the prompt"
            )

    def read(self, tasks: Sequence[Task]) -> tuple[Prompts, list[int]]:
        """Read what rows begin with, each different prompt once; also which one each row begins.

        A prompt of text alone that guidance compares with is the same for many images: it is kept.
        """
        wanted = [prompt for task in tasks for prompt in task.prompts]
        unique = list(dict.fromkeys(wanted))
        fresh = [prompt for prompt in unique if prompt not in self._kept]
        read = [self._kept[prompt] for prompt in unique if prompt in self._kept]
        if fresh:
            device, longest = self.decoder.device, rounded(max(map(len, fresh)))
            pad = self.vocabulary.pad
            ids = [[*prompt, *[pad] * (longest - len(prompt))] for prompt in fresh]
            read.insert(
                0, self.decoder.read(torch.tensor(ids, device=device), [len(p) for p in fresh])
            )
            self._keep(tasks, fresh, read[0])
        order = {p: i for i, p in enumerate([*fresh, *(p for p in unique if p not in fresh)])}
        return joined(read), [order[prompt] for prompt in wanted]

    def _keep(self, tasks: Sequence[Task], fresh: Sequence[Ids], read: Prompts) -> None:
        twins = {task.unconditional for task in tasks if isinstance(task, Codes)}
        for index, prompt in enumerate(fresh):
            if prompt in twins and max(prompt) < self.vocabulary.code_offset:
                while len(self._kept) >= KEPT:
                    del self._kept[next(iter(self._kept))]
                self._kept[prompt] = read.row(index)


def joined(parts: Sequence[Prompts]) -> Prompts:
    """Put prompts that were read apart behind each other."""
    if len(parts) == 1:
        return parts[0]
    longest = max(part.layers[0][0].shape[1] for part in parts)

    def wide(one: Tensor) -> Tensor:
        return nn.functional.pad(one, (0, 0, 0, 0, 0, longest - one.shape[1]))

    layers: Any = [
        tuple(torch.cat([wide(one) for one in same]) for same in zip(*pairs, strict=True))
        for pairs in zip(*(part.layers for part in parts), strict=True)
    ]
    lengths = [length for part in parts for length in part.lengths]
    return Prompts(layers, lengths, torch.cat([part.states for part in parts]))
