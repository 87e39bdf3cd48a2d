"""The process around the application: its socket, its signals, its end."""

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from ddt_llama.config import UserError
from ddt_llama.serving.api import application
from ddt_llama.serving.connections import Connection
from ddt_llama.serving.served import Served

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 10  # seconds for answers of what was given up at the end of the drain
BACKLOG = 256  # connections that are accepted at once, before `Connection` can count them


def listener(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address, before any model is opened.

    Raises UserError where that cannot be.
    """
    if not 0 <= port < 65536:
        raise UserError(f"port: given {port}, allowed are 0 (any that is free) to 65535")
    bound = None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        if bound is not None:
            bound.close()
        raise UserError(
            f"{host} port {port}: {error.strerror}; give another --port (0: any) or --host"
        ) from None
    return bound


class Server(uvicorn.Server):
    """uvicorn, that ends with what is under way done, and then without a complaint."""

    def __init__(
        self,
        served: Served,
        bound: socket.socket,
        line: str | None = None,
        then: Callable[[str], None] | None = None,
    ) -> None:
        """Serve at the socket.

        Once that is so `line` is printed, with the address, and `then` called with it.
        """
        self.served, self.bound, self.line, self.then = served, bound, line, then
        self.hurried = False
        config = uvicorn.Config(
            application(served),
            log_config=None,
            access_log=False,
            server_header=False,
            http=Connection,
            backlog=BACKLOG,
            ws="none",
            timeout_graceful_shutdown=round(served.limits.drain) + GRACE,
        )
        super().__init__(config)

    @property
    def address(self) -> str:
        """Where clients find it."""
        host, port = self.bound.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def run_until_stopped(self) -> None:
        """Serve until a signal says to stop, and what was under way then is done."""
        self.run(sockets=[self.bound])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say so."""
        await super().startup(sockets)
        if self.line is not None:
            print(f"{self.line} at {self.address}", flush=True)
        if self.then is not None:
            self.then(self.address)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take both signals as the wish to end well, not to be raised again afterwards."""
        if threading.current_thread() is not threading.main_thread():  # where none arrive
            yield
            return
        before = {one: signal.signal(one, self.handle_exit) for one in SIGNALS}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Refuse what is new from now on; a second signal gives up what is under way, too."""
        self.force_exit = self.hurried  # by a third one: clients are told nothing any more
        self.hurried = self.should_exit
        self.served.drain(0.0 if self.hurried else self.served.limits.drain)
        self.should_exit = True
