"""Pictures of strangers, opened in processes of their own that are ended when they take too long.

A thread that hangs in a decoder cannot be stopped, a process can; and what breaks a decoder breaks
no model. What they run is `data.images.decode`: formats by content, size by the header, first.
"""

import asyncio
import contextlib
import multiprocessing
import queue
import signal
import warnings
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from ddt_llama.data.images import BrokenImage, decode, from_bytes8
from ddt_llama.serving.limits import Limits

PROCESSES = 2
OPENED, REFUSED = b"+", b"-"


class Opener:
    """A few processes that turn bytes into pictures of `size` pixels a side."""

    def __init__(self, size: int, limits: Limits) -> None:
        """Start the processes."""
        self.size, self.limits = size, limits
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        self._threads = ThreadPoolExecutor(PROCESSES, "opener")
        self._free: queue.SimpleQueue[tuple[Any, Connection]] = queue.SimpleQueue()
        for _ in range(PROCESSES):
            self._free.put(self._started())

    async def open(self, data: bytes) -> Float[Tensor, "3 h w"]:
        """Return a picture in [-1, 1]. Raises BrokenImage with the reason."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._open, data)

    def close(self) -> None:
        """End the processes."""
        self._threads.shutdown(cancel_futures=True)
        for _ in range(PROCESSES):
            _ended(*self._free.get())

    def _started(self) -> tuple[Any, Connection]:
        ours, theirs = self._context.Pipe()
        told = (theirs, self.size, round(self.limits.max_pixels * 1e6))
        process = self._context.Process(target=answer_requests, args=told, daemon=True)
        process.start()
        theirs.close()
        return process, ours

    def _open(self, data: bytes) -> Float[Tensor, "3 h w"]:
        process, connection = self._free.get()
        try:
            connection.send_bytes(data)
            if not connection.poll(self.limits.decode_seconds):
                raise TimeoutError
            reply = connection.recv_bytes()
        except TimeoutError:
            _ended(process, connection)
            process, connection = self._started()
            seconds = self.limits.decode_seconds
            raise BrokenImage("image", f"takes longer than {seconds:g} s to decode") from None
        except (OSError, EOFError):  # the decoder took its process with it
            _ended(process, connection)
            process, connection = self._started()
            raise BrokenImage("image", "cannot be decoded") from None
        finally:
            self._free.put((process, connection))
        if reply[:1] == REFUSED:
            raise BrokenImage("image", reply[1:].decode())
        pixels = np.frombuffer(reply, np.uint8, offset=1).reshape(3, self.size, self.size)
        return from_bytes8(pixels.copy())


def answer_requests(connection: Connection, size: int, max_pixels: int) -> None:
    """Open what comes through the connection until it is closed: the life of a process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which drains
    warnings.simplefilter("ignore")  # Pillow's, of odd pictures: no lines of this server's log
    with contextlib.suppress(EOFError, OSError):
        while True:
            connection.send_bytes(opened(connection.recv_bytes(), size, max_pixels))


def opened(data: bytes, size: int, max_pixels: int) -> bytes:
    """Return the 8-bit values of a picture, or why it cannot be used; a mark says which."""
    try:
        return OPENED + decode(data, size, name="image", max_pixels=max_pixels).tobytes()
    except BrokenImage as error:
        return REFUSED + error.reason.encode()


def _ended(process: Any, connection: Connection) -> None:
    connection.close()
    process.kill()
    process.join()
    process.close()
