"""Image tokenizers: images to codes and back, behind one protocol."""

from pathlib import Path

from ddt_llama.tokenizer.base import Tokenizer
from ddt_llama.tokenizer.schedule import SELFTOK_PIECES, TokenSchedule
from ddt_llama.tokenizer.timestep import TimestepTokenizer, TimestepTokenizerConfig

__all__ = [
    "SELFTOK_PIECES",
    "TimestepTokenizer",
    "TimestepTokenizerConfig",
    "TokenSchedule",
    "Tokenizer",
    "load",
]


def load(folder: str | Path) -> Tokenizer:
    """Open a saved tokenizer folder; UserError for a wrong or damaged one."""
    return TimestepTokenizer.load(folder)
