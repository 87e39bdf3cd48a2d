"""Fetch batches for the loop ahead of time, and measure how long it waited.

A stream is a pure function of an integer, so reading ahead, by a thread or by other processes,
changes nothing but the waiting. (Scenes are rendered on the device, or by the processes, on a CPU:
where that is another device pictures differ by rounding.)
"""

import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ddt_llama.config import UserError

Stream = Callable[[int], Any]


class TwoPart:
    """A stream whose first part needs no device and may run in other processes.

    `make(apart)` opens the first part, number -> anything; it travels to the processes by pickle,
    and `apart` says that its results must travel, too. `finish` makes batches of them, here. The
    first part is opened here in any case, so that mistakes in it show before anything is trained.
    """

    def __init__(self, make: Callable[[bool], Stream], finish: Callable[[Any], Any]) -> None:
        self.make, self.finish = make, finish
        self._here = make(False)

    def __call__(self, number: int) -> Any:
        """Return batch `number`."""
        return self.finish(self._here(number))


class _Apart(Dataset[Any]):
    """The first part of a stream in one worker process."""

    def __init__(self, make: Callable[[bool], Stream]) -> None:
        self._make, self._stream = make, None

    def __getitem__(self, number: int) -> Any:
        try:
            if self._stream is None:
                self._stream = self._make(True)
            return self._stream(number)
        except UserError as error:  # DataLoader would wrap it in its own traceback
            return UserError(str(error))


def to_device(batch: Any, device: torch.device) -> Any:
    """Move every tensor inside tuples, lists and dicts to `device`; the rest stays as it is."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


class Batches:
    """Give batch number 0, 1, 2, ... of a stream, read up to `ahead` batches in advance.

    With `workers` as many processes do the first part of a `TwoPart` stream, by torch's DataLoader,
    each two parts ahead; numbers are then to be taken one after the other.
    """

    def __init__(self, stream: Stream, device: torch.device, ahead: int, workers: int = 0) -> None:
        """Start no work yet; use as a context manager so that threads and processes end."""
        self.waited = 0.0
        self._stream, self._device, self._ahead = stream, device, ahead
        self._workers = workers
        self._parts: Iterator[Any] | None = None
        self._next = 0
        self._pool = ThreadPoolExecutor(1, "prefetch") if ahead else None
        self._coming: dict[int, Future[Any]] = {}

    def take(self, number: int) -> Any:
        """Return batch `number` on the device; the time this took is added to `waited`."""
        began = time.perf_counter()
        if self._pool is None:
            batch = self._read(number)
        else:
            for later in range(number, number + self._ahead + 1):
                if later not in self._coming:
                    self._coming[later] = self._pool.submit(self._read, later)
            batch = self._coming.pop(number).result()
        batch = to_device(batch, self._device)
        self.waited += time.perf_counter() - began
        return batch

    def _read(self, number: int) -> Any:
        stream = self._stream
        if not (self._workers and isinstance(stream, TwoPart)):
            return stream(number)
        if self._parts is None:
            numbers: Any = itertools.count(number)
            loader = DataLoader(
                _Apart(stream.make),
                batch_size=None,
                sampler=numbers,
                collate_fn=_as_it_is,
                num_workers=self._workers,
                worker_init_fn=_leave_signals,
                # A forked process would hold the locks of threads that it has not.
                multiprocessing_context="spawn",
            )
            self._parts, self._next = iter(loader), number
        assert number == self._next
        self._next += 1
        part = next(self._parts)
        if isinstance(part, UserError):
            raise part
        return stream.finish(part)

    def __enter__(self) -> "Batches":
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the thread and the processes."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._parts = None


def _as_it_is(part: Any) -> Any:
    return part


def _leave_signals(worker: int) -> None:
    """Leave the group that Ctrl-C and torchrun signal: the main process says when to stop."""
    os.setsid()
