"""Image tokenizers: images to codes and back, behind one protocol."""

from pathlib import Path

from ddt_llama.config import UserError, load_json
from ddt_llama.tokenizer import spatial, timestep
from ddt_llama.tokenizer.base import Tokenizer
from ddt_llama.tokenizer.schedule import SELFTOK_PIECES, TokenSchedule
from ddt_llama.tokenizer.spatial import SpatialTokenizer, SpatialTokenizerConfig
from ddt_llama.tokenizer.timestep import TimestepTokenizer, TimestepTokenizerConfig

__all__ = [
    "SELFTOK_PIECES",
    "SpatialTokenizer",
    "SpatialTokenizerConfig",
    "TimestepTokenizer",
    "TimestepTokenizerConfig",
    "TokenSchedule",
    "Tokenizer",
    "load",
]

_KINDS = {timestep.KIND: TimestepTokenizer, spatial.KIND: SpatialTokenizer}


def load(folder: str | Path) -> Tokenizer:
    """Open a saved tokenizer folder; UserError for a wrong or damaged one."""
    described = load_json(Path(folder) / "config.json")
    kind = described.get("kind") if isinstance(described, dict) else None
    if kind not in _KINDS:
        raise UserError(
            f"{folder}: not an image tokenizer of a known kind ({', '.join(_KINDS)}); "
            "choose the folder of one"
        )
    return _KINDS[kind].load(folder)
