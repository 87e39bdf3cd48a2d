"""Connections that say nothing, or say it slowly, do not make the server deaf."""

import contextlib
import http.client
import resource
import socket
import time

import pytest
from tiny_server import running, until

from ddt_llama.serving import connections

HEAD = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"


def opened(stack: contextlib.ExitStack, port: int) -> socket.socket:
    return stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))


def ended(one: socket.socket) -> bool:
    with contextlib.suppress(ConnectionResetError):
        while one.recv(1000):
            pass
    return True


def status(one: socket.socket) -> int:
    answer = http.client.HTTPResponse(one)
    answer.begin()
    answer.read()
    return answer.status


def test_who_sends_no_whole_head_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.4)
    with running() as server, contextlib.ExitStack() as stack:
        silent, slow, kept = (opened(stack, server.port) for _ in range(3))
        begun = time.monotonic()
        kept.sendall(HEAD + b"\r\n")
        assert status(kept) == 200
        kept.sendall(HEAD)  # of a second request
        slow.sendall(b"GET")
        time.sleep(0.3)
        slow.sendall(b" /")  # which does not begin the time anew
        assert all(ended(one) for one in (silent, slow, kept))
        assert time.monotonic() - begun < 3


def test_a_request_may_take_longer_than_its_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.2)
    with running() as server, contextlib.ExitStack() as stack:
        two = opened(stack, server.port)
        body = b'{"prompt": "a ring"}'
        head = b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\n"
        head += b"Content-Type: application/json\r\n"
        two.sendall(HEAD + b"\r\n" + head + b"Content-Length: %d\r\n\r\n" % len(body))
        assert status(two) == 200
        time.sleep(0.4)
        two.sendall(body)
        assert status(two) == 200


def test_there_are_only_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    with running() as server, contextlib.ExitStack() as stack:
        monkeypatch.setattr(connections, "room", lambda: 3)
        idle = [opened(stack, server.port) for _ in range(3)]
        until(lambda: len(server.server.server_state.connections) == 3)
        assert ended(opened(stack, server.port))
        idle[0].close()
        until(lambda: len(server.server.server_state.connections) == 2)
        assert server.send("/healthz").status == 200


def test_half_of_the_file_descriptors_are_room_for_connections() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        most = connections.room()
        assert most == resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
        assert most > 128  # more were allowed
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_machine_that_allows_fewer_descriptors_than_it_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuses(*_: object) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", refuses)
    assert connections.room() == 128
