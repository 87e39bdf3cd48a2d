"""Text to ids and back: a byte-level BPE trained here, or the text tokenizer of any checkpoint.

Stands before `documents`, which encodes every part of a document on its own. Source: byte-level
BPE as in GPT-2 (Radford et al., 2019), by the `tokenizers` library.
"""

import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ddt_llama.config import UserError, replace_file, save_json

TOKENIZER_FILE = "tokenizer.json"
NUM_BYTES = 256
KNOWN_TEXTS = 4096  # whose ids are kept: words of layouts and captions come again and again
_PROBE = "x"


class TextTokenizer:
    """One face for every text tokenizer.

    Each text is encoded as if one space stood before it, and decoding takes that space away. So
    `red circle` has the same ids at the start of a caption, in the middle of it and behind
    `USER:`, and `decode(encode(text)) == text` holds for any text with a byte-level tokenizer.
    No id has a special meaning: a prompt that spells `</s>` is just these four letters.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Wrap a tokenizer of the `tokenizers` library; it no longer pads, cuts or reads marks."""
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self._size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        # SentencePiece-like tokenizers put the space there themselves; two would be one too many.
        first = tokenizer.encode(_PROBE, add_special_tokens=False).tokens[:1]
        self._prefix = "" if first and first[0].startswith(("▁", "Ġ")) else " "
        probe = tokenizer.encode(self._prefix + _PROBE, add_special_tokens=False).ids
        self._space_comes_back = tokenizer.decode(probe).startswith(" ")
        self._encoded = lru_cache(KNOWN_TEXTS)(self._encode)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by way of the constructor: a pickled tokenizer forgets how it is to read marks."""
        return TextTokenizer, (self._tokenizer,)

    @property
    def size(self) -> int:
        """The number of ids; every id that `encode` returns is below it."""
        return self._size

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; none for the empty text.

        Raises UserError for text that is not valid Unicode (half of a surrogate pair).
        """
        return list(self._encoded(text))

    def _encode(self, text: str) -> list[int]:
        if not text:
            return []
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"text is not valid Unicode at character {error.start}: {text[:40]!r}; "
                "give the text as UTF-8"
            ) from None
        return self._tokenizer.encode(self._prefix + text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`.

        Ids without text (rows that a checkpoint only padded, marks, codes) read as nothing, and
        bytes that are no UTF-8 read as U+FFFD: a model may write both.
        """
        text = self._tokenizer.decode([index for index in ids if 0 <= index < self._size])
        return text.removeprefix(" ") if self._space_comes_back else text

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int = 1024) -> "TextTokenizer":
        """Train a byte-level BPE; the same texts in the same order give the same tokenizer.

        It has at most `vocab_size` ids, fewer where the texts hold fewer pairs that occur twice.
        The first 256 ids are the bytes, so that any text (Arabic, emoji) encodes without loss.
        Raises UserError for `vocab_size` below 256.
        """
        if vocab_size < NUM_BYTES:
            raise UserError(
                f"vocab_size of text: given {vocab_size}, allowed are {NUM_BYTES} (one id a byte) "
                "and more"
            )
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=[],
            show_progress=False,
        )
        # The space is there in training too: else the first word of a text would miss its merges.
        tokenizer.train_from_iterator((" " + text for text in texts), trainer)
        return TextTokenizer(tokenizer)

    def to_json(self) -> str:
        """Return everything that determines it, as the text of a tokenizer.json."""
        return self._tokenizer.to_str(pretty=False)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `tokenizer.json` and what `AutoTokenizer` needs to open it into `folder`."""
        folder = Path(folder)
        replace_file(folder / TOKENIZER_FILE, self.to_json().encode())
        save_json(
            folder / "tokenizer_config.json",
            {"backend": "tokenizers", "tokenizer_class": "TokenizersBackend"},
        )

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> "TextTokenizer":
        """Open the text tokenizer of a folder: ours, or that of any Hugging Face checkpoint.

        Reads this folder only: no network, no code of the folder is run. Raises UserError where
        there is no folder or no tokenizer in it that the `tokenizers` library can run.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give the folder of a text tokenizer")
        path = folder / TOKENIZER_FILE
        if not path.is_file():
            return TextTokenizer(_convert(folder))
        try:
            return TextTokenizer(Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{path}: not a tokenizer file ({one_line(error)})") from None


def _convert(folder: Path) -> Tokenizer:
    """Let transformers convert an older format (vocab.json + merges.txt, SentencePiece)."""
    from transformers import AutoTokenizer  # seconds of import that only this path needs

    try:
        slow = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # ValueError, OSError, ImportError, by format
        raise UserError(
            f"{folder}: no text tokenizer that can be opened ({one_line(error)}); "
            f"allowed is a folder with {TOKENIZER_FILE}"
        ) from None
    backend = getattr(slow, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise UserError(
            f"{folder}: its text tokenizer ({type(slow).__name__}) runs in Python only; "
            f"save it as {TOKENIZER_FILE} first"
        )
    # Of a folder without one transformers makes an empty tokenizer for some families.
    if _PROBE not in backend.decode(backend.encode(_PROBE, add_special_tokens=False).ids):
        raise UserError(
            f"{folder}: holds no text tokenizer; allowed is a folder with {TOKENIZER_FILE}"
        )
    return backend


def one_line(error: Exception) -> str:
    """Return the message of another library on one line of at most 120 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 120 else text[:117] + "..."
