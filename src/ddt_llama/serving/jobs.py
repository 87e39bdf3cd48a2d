"""A request on its way through the worker: a program, how long it is wanted, who waits for it."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic

from jaxtyping import Float
from torch import Tensor

from ddt_llama.generation.work import Program, R, Work


class Refused(Exception):
    """Say why a request is not carried out although nothing is wrong with it."""


class QueueFull(Refused):
    """Too many requests wait; `seconds` is when to come again."""

    def __init__(self, seconds: int) -> None:
        """Keep the estimate."""
        super().__init__(f"too many requests are waiting; come again in {seconds} s")
        self.seconds = seconds


class Late(Refused):
    """The deadline has passed."""

    @classmethod
    def after(cls, seconds: float) -> "Late":
        """Say how long the request was there."""
        return cls(f"not done after {seconds:.1f} s, which is the limit")


class Closed(Refused):
    """The server is shutting down."""


@dataclass(frozen=True)
class Preview:
    """Picture `place` of a request as far as it is written, as number `index` of its previews."""

    place: int
    index: int
    image: Float[Tensor, "3 h w"]


@dataclass(eq=False)
class Job(Generic[R]):
    """One program; `future` has its result, and cancelling it gives the program up at any time.

    `previews`: how many partial images of each picture are shown; `show` is called with each, in
    the worker's thread.
    """

    program: Program[R]
    deadline: float  # by time.monotonic
    previews: int = 0
    show: Callable[[Preview], None] | None = None
    future: "Future[R]" = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)
    lock: Any = field(default_factory=threading.Lock)
    # The worker's own: what the program waits for, and since when.
    work: Work | None = None
    since: float = 0.0
    # Of a Write: results by place, places without a row yet, the step at which each ticket began.
    results: list[Tensor | None] = field(default_factory=list)
    unbegun: list[int] = field(default_factory=list)
    begun: dict[int, int] = field(default_factory=dict)
    marks: list[int] = field(default_factory=list)

    def cancel(self) -> None:
        """Say that nobody waits any more; done already, nothing happens."""
        self.future.cancel()

    def finish(self, result: Any) -> None:
        """Give the result to who waits, unless there was one already."""
        if self._settles():
            self.future.set_result(result)

    def fail(self, error: BaseException) -> None:
        """Give the error to who waits, unless there was a result already."""
        if self._settles():
            self.future.set_exception(error)

    def give_up_late(self) -> None:
        """Tell who waits that the deadline has passed."""
        self.fail(Late.after(time.monotonic() - self.arrived))

    def _settles(self) -> bool:
        """Return True to the first who asks, unless nobody waits any more."""
        with self.lock:
            return not self.future.done() and self.future.set_running_or_notify_cancel()
