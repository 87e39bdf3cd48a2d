"""The recipe of a language model over codes, in both stages, and its stream of batches.

Stage "pretrain" learns captions and images as one language; stage "instruct" goes on from there
with draw, edit, ask and describe, the loss on answers only, and may end with an alignment. Images
are encoded inside the stream by the frozen tokenizer, a batch at a time. Source: DDT-LLaMA, stages
1 and 2.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from ddt_llama import distributed
from ddt_llama.config import UserError, check_range
from ddt_llama.language import Batch, TextTokenizer, Vocabulary, collate, documents, render
from ddt_llama.language.backbone import BackboneConfig
from ddt_llama.language.batches import pack, with_codes
from ddt_llama.language.documents import Kind
from ddt_llama.language.lora import LoraConfig
from ddt_llama.recipes.data import DataConfig, images_of
from ddt_llama.recipes.drafts import Draft, Mix, Picture, mixture
from ddt_llama.runs import MAY_CHANGE
from ddt_llama.shapes.scene import Scene
from ddt_llama.tokenizer import Tokenizer
from ddt_llama.training.alignment import Alignment, AlignmentConfig
from ddt_llama.training.language import NextToken
from ddt_llama.training.loop import TrainConfig, step_seed
from ddt_llama.training.prefetch import TwoPart

PRETRAIN = Mix(text_to_image=0.6, image_to_text=0.2, image_only=0.1, text_only=0.1)
INSTRUCT = Mix(draw=0.35, edit=0.35, ask=0.2, describe=0.1)
# Pictures encoded at once, always as many, so that codes do not depend on the batch. On a CPU core
# 16 at once are 1.8 times faster than 64 (their activations stay in the cache).
CHUNK = {"cpu": 16, "cuda": 256}
# The cosine of two codes from which on an edit leaves the source's in place: of codes that differ
# less most are the encoder's noise where nothing has changed (experiments/0015).
ALIKE = 0.95
KNOWN_BYTES = 2 * 1024**3  # of codes that a process keeps
ENTRY_BYTES = 400  # what Python adds to the codes of a picture


@dataclass(frozen=True)
class LanguageRecipe:
    """Backbone, stage, training and data of one language model.

    `tokenizer` is a release or run of an image tokenizer ("" takes that of `start`). `start` is a
    run or release of this project to go on from (stage "instruct" needs one), or for stage
    "pretrain" the folder of any causal LM, whose vocabulary is grown; then `backbone` is not used.
    Where there is no `start`, text is encoded by the Hugging Face text tokenizer in the folder
    `text`, or by one of `text_vocab` ids trained on `text_samples` texts of each data set.
    `code_start`: rows of codes of a new model start from the tokenizer's codebook, or at random.
    `look_back`: heads of a new model start by looking a few tokens back.
    `drop_text`: share of draw and edit documents that lose their text, so that guidance has
    something to contrast with. `slips`: share of edits that are read with some of their first
    changed codes left as in the source, while what they ought to be stays the target: a model that
    draws makes such slips, and would take them for a sign that nothing changes there (after
    scheduled sampling, Bengio et al. 2015). `text_weight`: what an id of text counts in the loss
    where a code counts 1. `max_text` ids of each text are kept. `pack` puts the documents of a
    batch one behind the other into rows of about so many ids (0: a row each), which leaves less
    padding and changes no loss; rows are padded to a multiple of `pad_multiple` (more than 1 keeps
    compiled shapes few). `lora`: `start` stays as it is, and small matrices beside it learn (none:
    all weights learn). `alignment`: pictures are learned under their own text and against the text
    of another, so that they need no guidance (none: as all else, by the next token).
    """

    name: str
    stage: Literal["pretrain", "instruct"]
    tokenizer: str = ""
    start: str | None = None
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    code_start: Literal["codebook", "random"] = "codebook"
    look_back: bool = False
    mix: Mix = PRETRAIN
    drop_text: float = 0.1
    slips: float = 0.0
    text_weight: float = 1.0
    text: str | None = None
    text_vocab: int = 1024
    text_samples: int = 20_000
    max_text: int = 96
    pack: int = field(default=0, metadata=MAY_CHANGE)
    pad_multiple: int = 1
    lora: LoraConfig | None = None
    alignment: AlignmentConfig | None = None
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        """Refuse shares and lengths that cannot be."""
        check_range(self, 0, 1, "drop_text", "slips")
        check_range(self, 1, math.inf, "max_text", "pad_multiple", "text_samples")
        check_range(self, 0, math.inf, "pack")
        if self.text is not None and self.start is not None:
            raise UserError("text: start brings its own text tokenizer; give one of the two")
        if self.lora is not None and self.start is None:
            raise UserError(
                "lora: a new model learns as a whole; give --start MODEL or --lora none"
            )
        if self.text_weight <= 0:
            raise UserError(f"text_weight: given {self.text_weight}, allowed is more than 0")
        if self.alignment is not None:
            self._check_alignment(self.alignment.kinds)

    def _check_alignment(self, kinds: Sequence[Kind]) -> None:
        if self.train.shard != "none":
            raise UserError(
                f"train.shard: given {self.train.shard}, allowed with an alignment is none: each "
                "process holds a frozen copy of the model whole"
            )
        if not any(getattr(self.mix, kind) for kind in kinds):
            raise UserError(
                f"mix: no {' or '.join(kinds)} given, which are what is aligned; give it a weight, "
                "or --alignment none"
            )

    @property
    def twice(self) -> float:
        """The share of documents that come a second time, under the text of another."""
        if self.alignment is None:
            return 0.0
        aligned = sum(getattr(self.mix, kind) for kind in self.alignment.kinds)
        return (1 - self.drop_text) * aligned / sum(vars(self.mix).values())

    def loss(self, vocabulary: Vocabulary, reference: Any) -> NextToken | Alignment:
        """Return what a training minimises; `reference` is what an alignment starts from."""
        usual = NextToken(vocabulary, self.text_weight, self.pack > 0)
        return Alignment(usual, reference, self.alignment) if self.alignment else usual


class Coder:
    """Pictures to codes in the order the language model reads, by a frozen tokenizer.

    Codes of pictures with a key are kept, the first ones that `KNOWN_BYTES` have room for. They are
    those of full precision, as in use: in bfloat16 some are others, near ones.
    """

    def __init__(self, tokenizer: Tokenizer, device: torch.device) -> None:
        """Remember no codes yet."""
        self.tokenizer = tokenizer
        self._device = device
        self._known: dict[Hashable, np.ndarray] = {}
        self._room = KNOWN_BYTES // (4 * tokenizer.num_tokens + ENTRY_BYTES)

    def __call__(self, pictures: Sequence[Picture]) -> Int[Tensor, "n k"]:
        """Return the codes of each picture; those with a key are computed once only."""
        names = [place if p.key is None else p.key for place, p in enumerate(pictures)]
        wanted = dict(zip(names, pictures, strict=True))
        missing = {name: wanted[name] for name in wanted if name not in self._known}
        fresh = dict(zip(missing, self._encode(list(missing.values())), strict=True))
        for name, picture in missing.items():
            if picture.key is not None and len(self._known) < self._room:
                self._known[picture.key] = fresh[name]
        rows = [(fresh if name in fresh else self._known)[name] for name in names]
        found = np.stack(rows) if rows else np.zeros((0, self.tokenizer.num_tokens), np.int32)
        return torch.from_numpy(found).long()

    def whole(self, part: "Unencoded") -> Int[Tensor, "n k"]:
        """Return the codes of all pictures of a batch, those that the data hold among them."""
        fresh = self([Picture(*both) for both in zip(part.contents, part.keys, strict=True)])
        if not part.known:
            return fresh
        codes = torch.empty(len(fresh) + len(part.known), fresh.shape[1], dtype=torch.long)
        is_known = torch.zeros(len(codes), dtype=torch.bool)
        is_known[part.known] = True
        codes[is_known] = self.tokenizer.to_language(part.codes)
        codes[~is_known] = fresh
        return codes

    def edited(
        self, source: Int[Tensor, "*n k"], target: Int[Tensor, "*n k"]
    ) -> Int[Tensor, "*n k"]:
        """Return the codes of `target`, but those of `source` where both look nearly alike."""
        vectors = self.tokenizer.code_vectors().detach()
        there, wanted = (vectors[codes.to(vectors.device)] for codes in (source, target))
        alike = (there * wanted).sum(-1).cpu() >= ALIKE
        return torch.where(alike, source, target)

    @torch.no_grad()
    def _encode(self, pictures: Sequence[Picture]) -> list[np.ndarray]:
        if not pictures:
            return []
        contents = [picture.content for picture in pictures]
        images = images_of(contents, self.tokenizer.image_size, self._device)
        size = CHUNK[self._device.type]
        codes = []
        for start in range(0, len(images), size):
            part = images[start : start + size]
            filled = torch.zeros(size, *part.shape[1:], device=self._device)
            filled[: len(part)] = part
            found = self.tokenizer.encode(filled)[: len(part)]
            codes.append(self.tokenizer.to_language(found))
        return list(torch.cat(codes).to(torch.int32).cpu().numpy())


class Unencoded(NamedTuple):
    """A batch before its pictures are encoded: any code stands where codes belong.

    `numbers` are those of the documents in the order of training. `contents` and `keys` are those
    of all pictures in their order, but for those at the places `known`, whose `codes` the data
    hold. Behind them the pictures at the places `again` come once more, in documents that have the
    text of another. `edits` are the places of the answers of edits among all, each behind its
    source.
    """

    numbers: list[int]
    batch: Batch
    contents: Sequence[Scene | Tensor] | Tensor
    keys: list[Hashable]
    known: list[int]
    codes: Int[Tensor, "m k"]
    again: list[int]
    edits: list[int]


def document_stream(
    recipe: LanguageRecipe,
    coder: Coder,
    vocabulary: Vocabulary,
    text: TextTokenizer,
    max_length: int,
) -> TwoPart:
    """Return step -> this process's documents, a pure function of the step.

    What needs no device may run in other processes.
    """
    make = partial(
        unencoded_documents, recipe, coder.tokenizer.image_size, vocabulary, text, max_length
    )

    def encoded(part: Unencoded) -> Batch:
        codes = coder.whole(part)
        codes = torch.cat([codes, codes[part.again]])
        targets = torch.tensor(part.edits, dtype=torch.long)
        codes[targets] = coder.edited(codes[targets - 1], codes[targets])
        batch = with_codes(part.batch, codes, targets, vocabulary)
        assert batch.kinds is not None
        edits = (batch.kinds[:, 0] == documents.KINDS.index("edit")).nonzero().flatten().tolist()
        for row in edits:
            changed = vocabulary.is_code(batch.labels[row]).nonzero().flatten()
            slips = changed[: _slipped(recipe, part.numbers[row], len(changed))]
            batch.ids[row, slips] = vocabulary.same
        if recipe.pack:
            return pack(batch, vocabulary.pad, recipe.pack, recipe.pad_multiple)
        return batch

    return TwoPart(make, encoded)


def unencoded_documents(
    recipe: LanguageRecipe,
    image_size: int,
    vocabulary: Vocabulary,
    text: TextTokenizer,
    max_length: int,
    rendered: bool,
) -> Callable[[int], Unencoded]:
    """Return step -> documents without codes, their pictures as one tensor where `rendered`."""
    batch = recipe.train.batch
    drafts = mixture(recipe.data, recipe.mix, image_size, batch)
    blank = [[0] * vocabulary.num_tokens] * 2

    def sequence(draft: Draft, number: int) -> documents.Sequence:
        document = draft.document(blank)
        if document.kind in ("draw", "edit") and _dropped(recipe, number):
            document = documents.without_text(document)
        return render(document, vocabulary, text, max_length=max_length, max_text=recipe.max_text)

    def batch_of(step: int) -> Unencoded:
        pairs = [] if recipe.alignment is None else drafts.with_next(step)
        rows = [own for own, _ in pairs] or drafts(step)
        first = step * batch + distributed.rank() * len(rows)
        numbers = list(range(first, first + len(rows)))
        sequences = list(map(sequence, rows, numbers))
        others = {
            place: sequence(replace(own, texts=other.texts), numbers[place])
            for place, (own, other) in enumerate(pairs)
            if _aligned(recipe, own) and own.kind == other.kind
        }
        # Not where both say the same, or nothing.
        others = {n: one for n, one in others.items() if one.ids != sequences[n].ids}
        sides = torch.tensor([*(n in others for n in range(len(rows))), *[-1] * len(others)])
        sequences += others.values()
        longest = max(len(one.ids) for one in sequences)
        length = -(-longest // recipe.pad_multiple) * recipe.pad_multiple
        pictures = [(row.kind, picture) for row in rows for picture in row.pictures]
        ends = list(accumulate(len(row.pictures) for row in rows))
        again = [p for n in others for p in range(ends[n] - len(rows[n].pictures), ends[n])]
        codes = {
            place: picture.codes
            for place, (_, picture) in enumerate(pictures)
            if picture.codes is not None
        }
        to_encode = [picture for _, picture in pictures if picture.codes is None]
        contents = [picture.content for picture in to_encode]
        shown = [*pictures, *(pictures[place] for place in again)]
        edits = [place for place, (kind, _) in enumerate(shown) if kind == "edit"][1::2]
        made = collate(sequences, vocabulary.pad, length)
        if recipe.alignment is not None:
            made = made._replace(contrast=sides[:, None] * made.attention_mask)
        return Unencoded(
            [*numbers, *(numbers[place] for place in others)],
            made,
            images_of(contents, image_size, torch.device("cpu")) if rendered else contents,
            [picture.key for picture in to_encode],
            list(codes),
            torch.stack([*codes.values()]) if codes else torch.tensor(blank[:1])[:0],
            again,
            edits,
        )

    return batch_of


def _aligned(recipe: LanguageRecipe, draft: Draft) -> bool:
    """Say whether a draft is to come twice, under its own text and under another's."""
    return recipe.alignment is not None and draft.kind in recipe.alignment.kinds


def _dropped(recipe: LanguageRecipe, number: int) -> bool:
    """Say whether sample `number` loses its text; the same in every run of the recipe."""
    return step_seed(recipe.train.seed + 1, number) / 2**63 < recipe.drop_text


def _slipped(recipe: LanguageRecipe, number: int, changed: int) -> int:
    """Return how many of the first changed codes of edit `number` are read as `same`: up to half.

    The same in every run of the recipe.
    """
    chance = step_seed(recipe.train.seed + 2, number) / 2**63
    return math.ceil(changed / 2 * chance / recipe.slips) if chance < recipe.slips else 0
