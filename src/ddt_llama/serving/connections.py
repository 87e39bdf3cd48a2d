"""Connections: so many at once, and each with so long for the head of a request.

uvicorn bounds neither. Who opens connections and says nothing would take every file descriptor of
the process, and a server that cannot accept hears nobody, as long as they stay.
"""

import asyncio
import contextlib
import resource
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 20.0  # for the head of a request, from the connection or the answer before it
WANTED = 65_536  # file descriptors, where the machine allows so many


def room() -> int:
    """Return how many connections there may be: half of the file descriptors, as many as allowed.

    The other half is for forms in temporary files, pipes and logs.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = WANTED if hard == resource.RLIM_INFINITY else min(WANTED, hard)
    if soft == resource.RLIM_INFINITY:
        return WANTED // 2
    if allowed > soft:
        with contextlib.suppress(OSError, ValueError):  # macOS allows fewer than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
            soft = allowed
    return soft // 2


class Connection(H11Protocol):
    """uvicorn's connection, closed where there are too many, or where no request comes."""

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a head."""
        super().connection_made(transport)
        self.waits: asyncio.TimerHandle | None = None
        if len(self.connections) > room():
            transport.abort()
        else:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        super().connection_lost(exc)
        if self.waits is not None:
            self.waits.cancel()

    def on_response_complete(self) -> None:
        """Begin to wait for the next head, before one that is there already is read."""
        self._wait()
        super().on_response_complete()

    def _wait(self) -> None:
        if self.waits is not None:
            self.waits.cancel()
        self.waits = self.loop.call_later(HEAD_SECONDS, self._give_up, self.cycle)

    def _give_up(self, last: Any) -> None:
        if self.cycle is last:  # no request has begun since
            self.transport.close()
