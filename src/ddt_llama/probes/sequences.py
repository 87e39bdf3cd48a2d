"""Symbol sequences to learn: codes of pictures and ids of texts."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from ddt_llama.config import UserError


@dataclass(frozen=True)
class Sequences:
    """What one source gives: sequences of symbols 0..alphabet-1, some of them held out.

    `bits` are those of one sequence before anything is known of it (codes: tokens times log2 of
    the codebook; texts: none). `told`: so many first symbols of each held-out sequence are given,
    and are not measured. `note`: what a reader is to know of where they come from.
    """

    name: str
    alphabet: int
    train: tuple[Int[Tensor, " _"], ...]
    held_out: tuple[Int[Tensor, " _"], ...]
    bits: float | None = None
    told: tuple[int, ...] | None = None
    note: str = ""

    def __post_init__(self) -> None:
        """Refuse sources of nothing."""
        if not self.train or not self.held_out:
            raise UserError(f"{self.name}: no sequence to learn or none held out; give more data")

    @property
    def even(self) -> bool:
        """Whether all have one length."""
        return len({len(row) for row in (*self.train, *self.held_out)}) == 1

    @property
    def mean_length(self) -> float:
        """Symbols of a held-out sequence."""
        return sum(map(len, self.held_out)) / len(self.held_out)

    def fingerprint(self) -> str:
        """Return eight letters that stand for every symbol: other data, another fingerprint."""
        digest = hashlib.blake2b(digest_size=4)
        for row in (*self.train, *self.held_out):
            digest.update(row.numpy().astype("<i4").tobytes() + b"|")
        return digest.hexdigest()


def of_codes(name: str, codes: Int[Tensor, "n k"], codebook_size: int, held_out: int) -> Sequences:
    """Return codes of pictures, in language order; the last `held_out` pictures are held out."""
    if not 0 < held_out < len(codes):
        raise UserError(f"held_out: given {held_out} of {len(codes)} pictures; leave some of each")
    rows = tuple(codes.unbind(0))
    bits = codes.shape[1] * math.log2(codebook_size)
    return Sequences(name, codebook_size, rows[:-held_out], rows[-held_out:], bits)


def of_texts(name: str, texts: Sequence[Sequence[int]], alphabet: int, held_out: int) -> Sequences:
    """Return the ids of texts; of the last `held_out` those that are not among the others."""
    if not 0 < held_out < len(texts):
        raise UserError(f"held_out: given {held_out} of {len(texts)} texts; leave some of each")
    rows = tuple(torch.tensor(list(one)) for one in texts)
    learned, kept = rows[:-held_out], unseen(rows[:-held_out], rows[-held_out:])
    note = f"Of {name} {len(learned):,} are learned; of {held_out:,} others {len(kept):,} are new."
    return Sequences(name, alphabet, learned, kept, note=note)


def measured_on(sources: Sequence[Sequences]) -> str:
    """Say how many sequences of each source are measured on, and where they come from."""
    counts = ", ".join(f"{one.name} {len(one.held_out)} rows" for one in sources)
    return " ".join([f"Held out: {counts}.", *(one.note for one in sources if one.note)])


def unseen(
    train: Sequence[Int[Tensor, " _"]], rows: Sequence[Int[Tensor, " _"]]
) -> tuple[Int[Tensor, " _"], ...]:
    """Return the sequences that do not occur in training: others could be known by heart.

    Pictures of new scenes are new; their captions often are not.
    """
    known = {tuple(row.tolist()) for row in train}
    return tuple(row for row in rows if tuple(row.tolist()) not in known)


def match(
    one: Sequences,
    other: Sequences,
    alike: Callable[[Int[Tensor, " _"], Int[Tensor, " _"]], bool],
) -> bool:
    """Say whether two sources have as many sequences, and each is `alike` its partner."""
    return all(
        len(rows) == len(others) and all(map(alike, rows, others))
        for rows, others in ((one.held_out, other.held_out), (one.train, other.train))
    )


def packed(source: Sequences, length: int) -> Sequences:
    """Return sequences of any length as rows of one: behind each other, a mark after each.

    As language models are given text in training. What is left over at the end is dropped.
    """
    end = torch.tensor([source.alphabet])

    def rows(given: Sequence[Int[Tensor, " _"]]) -> tuple[Int[Tensor, " _"], ...]:
        whole = torch.cat([part for row in given for part in (row, end)])
        return whole[: len(whole) // length * length].view(-1, length).unbind(0)

    return replace(
        source,
        alphabet=source.alphabet + 1,
        train=rows(source.train),
        held_out=rows(source.held_out),
    )
