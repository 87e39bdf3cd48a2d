"""What every part of the server shares: the model at work, its limits, who may come in."""

import hashlib
import hmac
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from ddt_llama.config import UserError
from ddt_llama.generation import Model
from ddt_llama.serving.limits import Limits
from ddt_llama.serving.metrics import Metrics
from ddt_llama.serving.opener import Opener
from ddt_llama.serving.worker import Worker

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_KEY_FILE = 64 * 1024  # bytes


@dataclass
class Served:
    """One model being served; `keys` are digests, none where nobody is asked for a key."""

    model: Model
    limits: Limits = field(default_factory=Limits)
    keys: list[bytes] = field(default_factory=list)
    loopback: bool = True  # who cannot be reached from elsewhere need not be called by other names
    log_prompts: bool = False
    page: bool = False  # for people, beside the interface; needs ddt-llama[page]
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        """Start the worker and the processes that open pictures."""
        self.draining = False
        self.metrics = Metrics()
        self.worker = Worker(self.model, self.limits, self.metrics)
        self.opener = Opener(self.model.tokenizer.image_size, self.limits)

    def drain(self, seconds: float) -> None:
        """Take no more requests; what is under way has so long, then it is given up."""
        self.draining = True
        timer = threading.Timer(seconds, self.worker.close, [0.0])
        timer.daemon = True
        timer.start()

    def close(self) -> None:
        """Stop both, and give up what is under way."""
        self.worker.close(0.0)
        self.opener.close()

    def admits(self, given: str) -> bool:
        """Return whether this is one of the keys, in a time that does not tell how near it is."""
        digest = digest_of(given)
        return any([hmac.compare_digest(digest, key) for key in self.keys])


def digest_of(key: str) -> bytes:
    """Return what is kept of a key: all of one length."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def read_keys(path: Path) -> list[bytes]:
    """Return the digests of the keys in a file, one a line.

    Raises UserError where it cannot be read, holds none, or is open to every user of the machine.
    """
    try:
        if path.stat().st_mode & 0o007:
            raise UserError(f"{path}: every user of this machine can use it; chmod o-rwx {path}")
        with path.open("rb") as file:
            content = file.read(MAX_KEY_FILE + 1)
        lines = content.decode("ascii").split()  # as headers are
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give another file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is no plain text (ASCII); write one key a line") from None
    if len(content) > MAX_KEY_FILE or not lines:
        raise UserError(f"{path}: holds {'too much' if lines else 'no key'}; write one key a line")
    return [digest_of(key) for key in lines]
