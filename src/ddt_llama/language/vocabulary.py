"""One row of integers for everything the language model reads: text | marks | codes.

The offset between a code of the image tokenizer and an id of the language model lives here and
nowhere else. Images reach the language model as these integers only.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Bool, Int
from torch import Tensor

from ddt_llama.config import UserError, from_dict, load_json, save_json, to_dict

VOCABULARY_FILE = "vocabulary.json"
MARKS = ("bos", "eos", "pad", "begin_image", "end_image", "same")


@dataclass(frozen=True)
class Vocabulary:
    """The ids of a language model over text and images.

    ids 0 .. text_size-1 are text, the next six are the marks, the last `codebook_size` are codes.
    Every image is exactly `num_tokens` codes long. `text_size` counts the text *rows of the
    model*: where a checkpoint pads its embedding beyond the size of its text tokenizer, the padded
    rows count as text, so that growing never renumbers a row.
    """

    text_size: int
    codebook_size: int
    num_tokens: int

    def __post_init__(self) -> None:
        """Refuse sizes below one."""
        for name, size in to_dict(self).items():
            if size < 1:
                raise UserError(f"vocabulary {name}: given {size}, allowed are whole numbers >= 1")

    @property
    def size(self) -> int:
        """Rows of the embedding: text + marks + codes."""
        return self.code_offset + self.codebook_size

    @property
    def bos(self) -> int:
        """Start of every document."""
        return self.text_size

    @property
    def eos(self) -> int:
        """End of every document."""
        return self.text_size + 1

    @property
    def pad(self) -> int:
        """Filler of a batch; never a target."""
        return self.text_size + 2

    @property
    def begin_image(self) -> int:
        """Stands before the first code of an image."""
        return self.text_size + 3

    @property
    def end_image(self) -> int:
        """Stands behind the last code of an image."""
        return self.text_size + 4

    @property
    def same(self) -> int:
        """Stands in an edited image for a code of the source: the one at its own place."""
        return self.text_size + 5

    @property
    def code_offset(self) -> int:
        """The id of code 0; `same` comes right before it."""
        return self.text_size + len(MARKS)

    def to_ids(self, codes: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """Turn codes into ids. Raises UserError for a code outside 0 .. codebook_size-1."""
        _check_tensor("code", codes, 0, self.codebook_size)
        return codes + self.code_offset

    def ids_of(self, codes: Sequence[int]) -> list[int]:
        """Return `to_ids` of plain integers, for the codes of one image in less time."""
        if codes:
            _check_range("code", min(codes), max(codes), 0, self.codebook_size)
        offset = self.code_offset
        return [offset + code for code in codes]

    def to_codes(self, ids: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """Turn ids into codes. Raises UserError for an id that is no code."""
        _check_tensor("code id", ids, self.code_offset, self.size)
        return ids - self.code_offset

    def is_code(self, ids: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Say which ids are codes."""
        return (ids >= self.code_offset) & (ids < self.size)

    def in_image(self, ids: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Say which ids stand for a token of an image: codes and `same`."""
        return self.is_code(ids) | (ids == self.same)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `vocabulary.json` into `folder`."""
        save_json(Path(folder) / VOCABULARY_FILE, to_dict(self))

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> "Vocabulary":
        """Read `vocabulary.json` of `folder`. Raises UserError where it is absent or wrong."""
        path = Path(folder) / VOCABULARY_FILE
        return from_dict(Vocabulary, load_json(path), f"{path}: ")


def _check_tensor(what: str, values: Tensor, low: int, high: int) -> None:
    if values.numel():
        _check_range(what, int(values.min()), int(values.max()), low, high)


def _check_range(what: str, lowest: int, highest: int, low: int, high: int) -> None:
    if lowest < low or highest >= high:
        wrong = lowest if lowest < low else highest
        raise UserError(
            f"{what} out of range: given {wrong}, allowed are {low} to {high - 1}; "
            "check that tokenizer and language model belong together"
        )
