"""What a server allows, each number checked when it starts: `ddt serve` shows them as options."""

from dataclasses import dataclass

from ddt_llama.config import check_range

MAX_CAPACITY = 4096  # tokens a row unless told otherwise: rows of a long context take much memory


@dataclass(frozen=True)
class Limits:
    """Bounds of what clients may ask for, and of the memory and time that it takes.

    A request needs a row for each picture that it has written, two with guidance, and one for each
    view of a picture that is described; those that need more rows than there are get them in turn.
    """

    max_queue: int = 256
    """Requests that may wait; further ones are told to come again (429)."""
    rows: int = 64
    """Rows of the batch: texts and pictures that are written side by side."""
    capacity: int | None = None
    """Tokens of a row at most; the model's own limit, up to 4096, where it is left out."""
    deadline: float = 120.0
    """Seconds from a request's arrival to its answer; what is later is given up (504)."""
    drain: float = 30.0
    """Seconds to finish what is under way once the server is told to stop."""
    max_body: float = 16.0
    """MB of a request, pictures included (413)."""
    max_pixels: float = 16.0
    """Million pixels of a picture, by its header, before it is decoded."""
    max_prompt: int = 4000
    """Characters of a prompt, an instruction or a question."""
    max_steps: int = 64
    """Denoising steps that a request may ask for."""
    decode_seconds: float = 5.0
    """Seconds that opening one picture may take."""

    def __post_init__(self) -> None:
        """Raise UserError for a number out of range."""
        check_range(self, 0, 1_000_000, "max_queue")
        check_range(self, 1, 65_536, "rows")
        check_range(self, 2, 1_000_000, "capacity")
        check_range(self, 0.05, 86_400, "deadline", "decode_seconds")
        check_range(self, 0, 86_400, "drain")
        check_range(self, 0.001, 1024, "max_body")
        check_range(self, 0.001, 64, "max_pixels")
        check_range(self, 1, 1_000_000, "max_prompt")
        check_range(self, 1, 10_000, "max_steps")
