"""Keep an eye on a training: means between two log lines, a loss that runs away, a wish to stop."""

import contextlib
import math
import signal
import statistics
import threading
from collections import deque
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any

from ddt_llama.distributed import loss_in

WINDOW = 200  # losses that the running median sees
ENOUGH = 20  # losses before the median means anything
PATIENCE = 5  # bad steps in a row before the run stops


class Means:
    """Average each figure over the steps since the last log line; only finite ones count."""

    def __init__(
        self, sums: dict[str, float] | None = None, counts: dict[str, int] | None = None
    ) -> None:
        """Start empty, or from the `to_dict` of an interrupted run."""
        self.sums = sums or {}
        self.counts = counts or {}

    def add(self, figures: Mapping[str, float]) -> None:
        """Count the figures of one step."""
        for name, value in figures.items():
            if math.isfinite(value):
                self.sums[name] = self.sums.get(name, 0.0) + value
                self.counts[name] = self.counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        """Return the means and start anew."""
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means

    def to_dict(self) -> dict[str, Any]:
        """Return what `Means(**...)` needs to go on."""
        return {"sums": dict(self.sums), "counts": dict(self.counts)}


class Watch:
    """Say when a loss has run away: above `factor` x its running median, several steps in a row."""

    def __init__(self, factor: float) -> None:
        """Start with no history; `factor` > 1."""
        self.recent: deque[float] = deque(maxlen=WINDOW)
        self._factor = factor
        self._high = self._broken = 0

    @property
    def calm(self) -> bool:
        """Say whether the last step looked as training should."""
        return self._high == self._broken == 0

    def verdict(self, loss: float, norm: float) -> str | None:
        """Return why the run must stop, or None."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        self._broken = 0 if math.isfinite(norm) else self._broken + 1
        if self._broken >= PATIENCE:
            return f"the gradient was not finite {PATIENCE} times in a row"
        # Of sizes: a loss may be of either sign.
        sizes = [abs(one) for one in self.recent]
        median = statistics.median(sizes) if len(sizes) >= ENOUGH else math.inf
        if loss > self._factor * median > 0:
            self._high += 1
            if self._high >= PATIENCE:
                multiple = f"{self._factor:g} times its running median {median:.4g}"
                return f"the loss {loss:.4g} stays above {multiple}"
        else:
            self._high = 0
            self.recent.append(loss)
        return None


class Signals:
    """Turn the first SIGINT or SIGTERM into a wish to stop; a second SIGINT stops at once."""

    def __init__(self) -> None:
        """Listen from `__enter__` on."""
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        """Listen, where this thread may."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the signals back.

        Not where another process is gone: torchrun's SIGTERM, which follows at once, would cut
        short what this one says before it ends.
        """
        if loss_in(error):
            return
        for number, before in self._before.items():
            with contextlib.suppress(TypeError):  # a handler that was not set from Python
                signal.signal(number, before)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
