"""What a release says of the trainings behind it, so that models can be compared by their cost."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ddt_llama.config import from_dict, load_json

Part = Literal["tokenizer", "language"]


@dataclass(frozen=True)
class Training:
    """One training of the image tokenizer or of the language model.

    `samples` are the images or documents seen. `flops` are those of learning from them, by formula;
    encoding pictures for a language model, and the work of a VAE, are not counted.
    """

    part: Part
    recipe: str
    samples: int
    flops: float


@dataclass(frozen=True)
class History:
    """All trainings behind a model, each part's first one first; None where they are not known."""

    trainings: tuple[Training, ...] | None = None

    def of(self, part: Part) -> "History":
        """Return the trainings of one part."""
        if self.trainings is None:
            return self
        return History(tuple(one for one in self.trainings if one.part == part))

    def __add__(self, more: "History") -> "History":
        """Return both behind each other; what is not known stays so."""
        if self.trainings is None or more.trainings is None:
            return History()
        return History(self.trainings + more.trainings)

    @property
    def flops(self) -> float | None:
        """The FLOPs of all trainings, None where they are not known."""
        return None if self.trainings is None else sum(one.flops for one in self.trainings)


NEW = History(())  # of random weights


def history_of(folder: Path) -> History:
    """Return what the config.json of a release says; unknown where there is none.

    Raises UserError for what is no list of trainings.
    """
    file = folder / "config.json"
    described = load_json(file) if file.is_file() else {}
    known = described.get("trainings") if isinstance(described, dict) else None
    return from_dict(History, {"trainings": known})
