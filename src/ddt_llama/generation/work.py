"""What programs ask for: pieces of work for encoder, language model and decoder.

A program is a generator that yields a piece of work, is sent the result, and returns what it made.
`Model` carries one program out at a time; a server carries out many side by side, and puts the work
of all of them into the same batches. What a program returns does not depend on who does it.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, TypeVar

from jaxtyping import Float
from torch import Tensor

from ddt_llama.generation.engine import Task

R = TypeVar("R")


@dataclass(frozen=True)
class Encode:
    """Images to be encoded; the result are their codes `b k`, index 0 finest."""

    images: Float[Tensor, "b 3 h w"]


@dataclass(frozen=True)
class Write:
    """Tasks of the language model; the result is a list: codes in language order, or text ids."""

    tasks: list[Task]


@dataclass(frozen=True)
class Decode:
    """Codes `b k` (index 0 finest) to be decoded, the noise of row i started by `seeds[i]`.

    `visible`: from how many of the coarsest codes, or from which (None: all). The result are images
    `b 3 h w` in [-1, 1], on the CPU.
    """

    codes: Tensor
    seeds: list[int]
    steps: int
    visible: int | tuple[bool, ...] | None = None


Work = Encode | Write | Decode
Program = Generator[Work, Any, R]
