"""A server of the tiny model in a thread of the test, and a client that sends any bytes."""

import base64
import http.client
import io
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import openai
import PIL.Image
from tiny_model import SIZE, tiny_model

from ddt_llama.generation import Settings
from ddt_llama.serving.limits import Limits
from ddt_llama.serving.served import Served, digest_of
from ddt_llama.serving.server import Server, listener

KEY = "sk-test"


class Answer(NamedTuple):
    """What came back."""

    status: int
    headers: Mapping[str, str]
    body: Any

    @property
    def error(self) -> dict[str, Any]:
        """The error object, which has all its fields."""
        assert set(self.body["error"]) == {"message", "type", "param", "code"}
        assert "\n" not in self.body["error"]["message"]
        return self.body["error"]


@dataclass
class Running:
    """A server that runs."""

    served: Served
    server: Server

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.server.bound.getsockname()[1])

    @property
    def client(self) -> openai.OpenAI:
        """Return OpenAI's client of it, which tries nothing twice."""
        return openai.OpenAI(base_url=f"{self.server.address}/v1", api_key=KEY, max_retries=0)

    def send(
        self,
        path: str,
        body: Any = None,
        method: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Send a request as it is: bytes as bytes, what is no bytes as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        plain = isinstance(body, bytes | Iterator) or body is None
        content = body if plain else json.dumps(body)
        own = {} if body is None else {"Content-Type": "application/json"}
        verb = method or ("GET" if body is None else "POST")
        connection.request(verb, path, content, {**own, **(headers or {})})
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        is_json = (answer.headers["content-type"] or "").startswith("application/json")
        return Answer(
            answer.status, dict(answer.headers), json.loads(data) if is_json and data else data
        )


@contextmanager
def running(
    limits: Limits | None = None, settings: Settings | None = None, **more: Any
) -> Iterator[Running]:
    """Serve until the block ends."""
    served = Served(tiny_model(settings or Settings(steps=2)), limits or Limits(rows=12), **more)
    server = Server(served, listener("127.0.0.1", 0))
    thread = threading.Thread(target=server.run_until_stopped)
    thread.start()
    try:
        until(lambda: server.started)
        yield Running(served, server)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def until(said: Any) -> None:
    """Wait until something is so."""
    end = time.monotonic() + 20
    while not said():
        assert time.monotonic() < end
        time.sleep(0.002)


def keyed() -> dict[str, Any]:
    """Return how a server is told to ask for a key."""
    return {"keys": [digest_of("another"), digest_of(KEY)]}


def png(value: int = 128, size: int = SIZE) -> bytes:
    """Return a grey picture with a darker quarter."""
    picture = PIL.Image.new("RGB", (size, size), (value,) * 3)
    picture.paste((value // 2,) * 3, (0, 0, size // 2, size // 2))
    content = io.BytesIO()
    picture.save(content, format="PNG")
    return content.getvalue()


def data_url(data: bytes) -> str:
    """Return a picture as a URL that holds it."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def picture_of(text: str | None) -> PIL.Image.Image:
    """Return the picture in an answer's base64, or data: URL."""
    assert text
    data = base64.b64decode(text.rpartition(",")[2], validate=True)
    return PIL.Image.open(io.BytesIO(data), formats=["PNG"])
