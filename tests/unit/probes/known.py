"""Sources whose entropy is known."""

import math

import torch
from torch import Generator

from ddt_llama.probes.sequences import Sequences, of_codes


def iid(count: int, length: int, alphabet: int, held_out: int, seed: int = 0) -> Sequences:
    """Return symbols that know nothing of each other: log2(alphabet) bits each in every order."""
    generator = Generator().manual_seed(seed)
    rows = torch.randint(alphabet, (count, length), generator=generator)
    return of_codes("iid", rows, alphabet, held_out)


def markov(
    count: int, length: int, alphabet: int, held_out: int, stay: float = 0.9, seed: int = 0
) -> Sequences:
    """Return chains that repeat the symbol before with probability `stay`, else draw any.

    In native order a symbol behind the first takes `markov_bits`. By the chain rule any other fixed
    order holds as many bits in all: it is only harder to learn.
    """
    generator = Generator().manual_seed(seed)
    rows = torch.randint(alphabet, (count, length), generator=generator)
    keep = torch.rand(count, length, generator=generator) < stay
    for step in range(1, length):
        rows[:, step] = rows[:, step].where(~keep[:, step], rows[:, step - 1])
    return of_codes("markov", rows, alphabet, held_out)


def markov_bits(alphabet: int, stay: float) -> float:
    """Return the entropy of a step of `markov`, in bits."""
    same = stay + (1 - stay) / alphabet
    other = (1 - stay) / alphabet
    return -same * math.log2(same) - (alphabet - 1) * other * math.log2(other)
