"""Show how training goes: a bar on a terminal, one plain line a record elsewhere."""

from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ddt_llama import distributed

SHOWN = ("loss", "grad_norm", "lr")
# What tells whether tokens are informative, which the loss does not; shown where it was measured.
TOKENS = {
    "probe.own": "error at t = 1 with own tokens",
    "probe.wrong": "another's",
    "probe.none": "none",
    "probe.spread": "spread of features",
    "codebook.used": "codes used",
    "codebook.perplexity": "perplexity",
    "codebook.position_perplexity": "of a position",
}


def duration(seconds: float | int) -> str:
    """Return seconds as people say them.

    >>> duration(3725)
    '1 h 02 min'
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


class Display:
    """Print on the main process only."""

    def __init__(self, steps: int, step: int) -> None:
        """Start at `step` of `steps`."""
        self._steps = steps
        self._console = Console(quiet=not distributed.is_main(), highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        if self._console.is_terminal and distributed.is_main():
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=self._console, refresh_per_second=4)
            self._task = self._bar.add_task("", total=steps, completed=step)
            self._bar.start()

    def record(self, record: Mapping[str, float | int]) -> None:
        """Show the figures of a logged step."""
        speed = record["images_per_second"]
        left = (self._steps - record["step"]) * record["step_ms"] / 1000
        figures = [f"{name} {record[name]:.4g}" for name in SHOWN if name in record]
        text = f"{'  '.join(figures)}  {speed:,.0f} images/s  {duration(left)} left"
        if "probe.own" in record:
            known = [f"{words} {record[n]:.3g}" for n, words in TOKENS.items() if n in record]
            self._console.print(f"step {record['step']:>7}  tokens: {', '.join(known)}")
        if self._bar is None:
            self._console.print(f"step {record['step']:>7}/{self._steps}  {text}")
        else:
            self._bar.update(self._task, completed=record["step"], description=text)

    def message(self, text: str) -> None:
        """Print one line."""
        self._console.print(text)

    def close(self) -> None:
        """Take the bar down."""
        if self._bar is not None:
            self._bar.stop()
