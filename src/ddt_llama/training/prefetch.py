"""Fetch batches for the loop, one thread ahead where asked, and measure how long it waited.

A stream is a pure function of an integer, so reading ahead changes nothing but the waiting.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

Stream = Callable[[int], Any]


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
    """Give batch number 0, 1, 2, ... of a stream, read up to `ahead` batches in advance."""

    def __init__(self, stream: Stream, device: torch.device, ahead: int) -> None:
        """Start no work yet; use as a context manager so that the thread ends."""
        self.waited = 0.0
        self._stream, self._device, self._ahead = stream, device, ahead
        self._pool = ThreadPoolExecutor(1, "prefetch") if ahead else None
        self._coming: dict[int, Future[Any]] = {}

    def take(self, number: int) -> Any:
        """Return batch `number` on the device; the time this took is added to `waited`."""
        began = time.perf_counter()
        if self._pool is None:
            batch = self._stream(number)
        else:
            for later in range(number, number + self._ahead + 1):
                if later not in self._coming:
                    self._coming[later] = self._pool.submit(self._stream, later)
            batch = self._coming.pop(number).result()
        batch = to_device(batch, self._device)
        self.waited += time.perf_counter() - began
        return batch

    def __enter__(self) -> "Batches":
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the thread."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
