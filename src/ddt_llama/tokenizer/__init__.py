"""Image tokenizers: images to codes and back, behind one protocol."""

from ddt_llama.tokenizer.base import Tokenizer
from ddt_llama.tokenizer.schedule import SELFTOK_PIECES, TokenSchedule
from ddt_llama.tokenizer.timestep import TimestepTokenizer, TimestepTokenizerConfig

__all__ = [
    "SELFTOK_PIECES",
    "TimestepTokenizer",
    "TimestepTokenizerConfig",
    "TokenSchedule",
    "Tokenizer",
]
