"""Prompts in, codes or text out: prefill, decode, guidance rows and the rules of an image span.

Stands between `model`, which knows images and strings, and the decoders, which know weights. Inside
an image only codes can be drawn, and exactly `num_tokens` of them; in an answer only text and the
end mark.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ddt_llama.config import UserError
from ddt_llama.generation.generic import GenericDecoder
from ddt_llama.generation.lean import LeanDecoder, obstacle
from ddt_llama.generation.sampling import (
    FULL,
    GREEDY,
    Sampling,
    choose,
    guide,
    uniforms,
)
from ddt_llama.language.vocabulary import Vocabulary


@runtime_checkable
class Decoder(Protocol):
    """A language model that reads prompts once and then one token a row at a time."""

    max_positions: int

    @property
    def device(self) -> torch.device:
        """Where ids are expected."""
        ...

    def prefill(
        self,
        ids: Int[Tensor, "u p"],
        padding: Int[Tensor, " u"],
        rows: Int[Tensor, " r"],
        capacity: int,
        head: slice,
    ) -> tuple[Float[Tensor, "r v"], Any]:
        """Read left-padded prompts; row i continues prompt rows[i]."""
        ...

    def step(self, ids: Int[Tensor, " r"], cache: Any, head: slice) -> Float[Tensor, "r v"]:
        """Append one token a row and return the next logits of the vocabulary rows `head`."""
        ...


def decoder_of(module: nn.Module) -> Decoder:
    """Choose the fast path where the architecture allows it, transformers' own forward otherwise.

    The fast path copies the weights (fused), so build it anew after the module was trained further.
    """
    config: Any = module.config
    described: Mapping[str, Any] = config.to_dict()
    if obstacle(described) is None:
        return LeanDecoder(described, module.state_dict())
    return GenericDecoder(module)


class Engine:
    """Batched generation over one decoder and one vocabulary."""

    def __init__(
        self, decoder: Decoder, vocabulary: Vocabulary, num_text: int | None = None
    ) -> None:
        """Take `num_text` where the text tokenizer knows fewer ids than the model has text rows."""
        self.decoder = decoder
        self.vocabulary = vocabulary
        self.num_text = vocabulary.text_size if num_text is None else num_text

    def codes(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        unconditional: Sequence[Sequence[int]] | None = None,
        guidance_scale: float = 1.0,
        sampling: Sampling = FULL,
        seeds: Sequence[int],
        sources: Sequence[Sequence[int]] | None = None,
    ) -> Int[Tensor, "b k"]:
        """Return `num_tokens` codes (0 .. codebook_size-1, in language order) after each prompt.

        `sources` are the codes that each prompt edits: then the mark `same` may be drawn, too, and
        stands for the code of the source at its place.

        `unconditional` are the prompts' twins without text for classifier-free guidance; without
        them, or at scale 1, each image costs one row instead of two. `seeds` holds one seed a
        prompt; a row's draws depend on its own prompt and seed only.
        """
        if guidance_scale == 1.0:
            unconditional = None
        with torch.inference_mode():
            codes = self._codes(
                prompts, unconditional, guidance_scale, sampling, seeds, same=sources is not None
            )
            if sources is not None:
                there = torch.tensor(sources, device=codes.device)
                codes = torch.where(codes < 0, there, codes)
        return codes.clone()  # a plain tensor, so that a training step may take it as input

    def text(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,
        max_tokens: int = 96,
        together: int = 1,
    ) -> list[list[int]]:
        """Return the text ids after each prompt, up to the end mark or `max_tokens`.

        Each `together` prompts in turn get one answer, written by the mean of their
        log-probabilities: a product of experts, such as views of one picture. `seeds` holds one
        seed an answer. Raises UserError for a prompt behind which `max_tokens` find no room.
        """
        seeds = [0] * (len(prompts) // together) if seeds is None else seeds
        with torch.inference_mode():
            ids = self._text(prompts, sampling, seeds, max_tokens, together)
        eos = self.vocabulary.eos
        return [row[: row.index(eos)] if eos in row else row for row in ids.tolist()]

    def _codes(
        self,
        prompts: Sequence[Sequence[int]],
        unconditional: Sequence[Sequence[int]] | None,
        guidance_scale: float,
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        same: bool,
    ) -> Tensor:
        """Draw codes and, where `same` is possible, -1 for it."""
        vocabulary, steps, device = self.vocabulary, self.vocabulary.num_tokens, self.decoder.device
        head = slice(vocabulary.same if same else vocabulary.code_offset, vocabulary.size)
        logits, cache = self._prefill([*prompts, *(unconditional or ())], steps, head)
        codes = torch.empty(len(prompts), steps, dtype=torch.int64, device=device)
        chance = uniforms(seeds, steps, device)
        for step in range(steps):
            if unconditional is not None:
                conditional, empty = logits.chunk(2)
                logits = guide(conditional, empty, guidance_scale)
            ids = choose(logits, sampling, chance[step]) + head.start
            codes[:, step] = ids - vocabulary.code_offset
            if step + 1 < steps:
                ids = ids if unconditional is None else ids.repeat(2)
                logits = self.decoder.step(ids, cache, head)
        return codes

    def _text(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        max_tokens: int,
        together: int,
    ) -> Tensor:
        vocabulary, device = self.vocabulary, self.decoder.device
        head = slice(0, vocabulary.code_offset)
        impossible = torch.ones(vocabulary.code_offset, dtype=torch.bool, device=device)
        impossible[: self.num_text] = False
        impossible[vocabulary.eos] = False
        chance = uniforms(seeds, max_tokens, device)
        logits, cache = self._prefill(prompts, max_tokens, head)
        written: list[Tensor] = []
        ended = torch.zeros(len(seeds), dtype=torch.bool, device=device)
        for step in range(max_tokens):
            logits = logits.masked_fill(impossible, -torch.inf)
            if together > 1:
                logits = logits.log_softmax(-1).unflatten(0, (-1, together)).mean(1)
            written.append(choose(logits, sampling, chance[step]))
            ended |= written[-1] == vocabulary.eos
            # Asking costs a wait on an accelerator; a few steps too many cost less.
            asked = device.type == "cpu" or step % 8 == 7
            if step + 1 == max_tokens or (asked and bool(ended.all())):
                break
            ids = written[-1].repeat_interleave(together)
            logits = self.decoder.step(ids, cache, head)
        return torch.stack(written, dim=1)

    def _prefill(
        self, prompts: Sequence[Sequence[int]], steps: int, head: slice
    ) -> tuple[Tensor, Any]:
        """Read each different prompt once, left-padded to the longest."""
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise UserError("a prompt has no tokens; every prompt needs at least the start mark")
        unique = list(dict.fromkeys(tuple(prompt) for prompt in prompts))
        place = {prompt: index for index, prompt in enumerate(unique)}
        length = max(map(len, unique))
        if length + steps > self.decoder.max_positions:
            room = self.decoder.max_positions - steps
            raise UserError(
                f"the prompt is {length} tokens long; this model reads at most {room} and then "
                f"writes {steps}: shorten the prompt"
            )
        device, pad = self.decoder.device, self.vocabulary.pad
        ids = [[pad] * (length - len(prompt)) + list(prompt) for prompt in unique]
        return self.decoder.prefill(
            torch.tensor(ids, device=device),
            torch.tensor([length - len(prompt) for prompt in unique], device=device),
            torch.tensor([place[tuple(prompt)] for prompt in prompts], device=device),
            length + steps,
            head,
        )
