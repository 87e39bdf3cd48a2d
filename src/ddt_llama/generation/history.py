"""What a release says of the trainings behind it, so that models can be compared by their cost."""

from dataclasses import dataclass
from pathlib import Path

from ddt_llama.config import from_dict, load_json


@dataclass(frozen=True)
class Training:
    """One training of the image tokenizer or of the language model.

    `samples` are the images or documents seen; `flops` those of learning from them, by formula.
    """

    recipe: str
    samples: int
    flops: float


@dataclass(frozen=True)
class History:
    """All trainings behind a model, the first one first; None where they are not known."""

    trainings: tuple[Training, ...] | None = None

    def and_then(self, training: Training) -> "History":
        """Return this history with one more training; what is not known stays so."""
        return self if self.trainings is None else History((*self.trainings, training))

    @property
    def flops(self) -> float | None:
        """The FLOPs of all trainings, None where they are not known."""
        return None if self.trainings is None else sum(one.flops for one in self.trainings)


NEW = History(())  # of a model with random weights


def history_of(folder: Path) -> History:
    """Return what the config.json of a release says; unknown where there is none.

    Raises UserError for what is no list of trainings.
    """
    file = folder / "config.json"
    described = load_json(file) if file.is_file() else {}
    known = described.get("trainings") if isinstance(described, dict) else None
    return from_dict(History, {"trainings": known})
