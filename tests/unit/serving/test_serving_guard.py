"""Who may come in, with how much, for how long; and what the server tells of it."""

import asyncio
import contextlib
import http.client
import json
import logging
import re
import select
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from tiny_model import SIZE, cut_answers_short, tiny_model
from tiny_server import KEY, Running, data_url, keyed, picture_of, png, running, until

from ddt_llama.config import UserError
from ddt_llama.generation import Settings
from ddt_llama.serving.limits import Limits
from ddt_llama.serving.logs import JsonLines
from ddt_llama.serving.served import digest_of, read_keys
from ddt_llama.serving.server import listener

IMAGES, EDITS = "/v1/images/generations", "/v1/images/edits"
RING = {"prompt": "a ring", "seed": 1}


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_answers_short(monkeypatch)


@pytest.fixture(scope="module")
def here() -> Iterator[Running]:
    with running(Limits(rows=12, max_body=0.1), **keyed()) as server:
        yield server


@pytest.fixture(scope="module")
def local() -> Iterator[Running]:
    with running(Limits(rows=4, max_queue=0, deadline=0.6, drain=0.5)) as server:
        yield server


class Held:
    """The worker's thread, kept busy until the block ends."""

    def __init__(self, server: Running) -> None:
        self.server, self.entered, self.open = server, threading.Event(), threading.Event()

    def __enter__(self) -> "Held":
        def program() -> Any:
            self.entered.set()
            assert self.open.wait(20)
            return None
            yield

        self.server.served.worker.submit(program())
        assert self.entered.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self.open.set()
        until(lambda: not self.server.served.worker._active)


def logged(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """Return the server's lines of log."""
    own = [record for record in caplog.records if record.name.startswith("ddt_llama")]
    return [json.loads(JsonLines().format(record)) for record in own]


def with_key(key: str = KEY) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_without_a_key_there_is_no_way_in(here: Running) -> None:
    for path, body in ((IMAGES, RING), ("/v1/models", None), ("/metrics", None), ("/no", None)):
        for headers in ({}, with_key("sk-tesa"), with_key(""), {"Authorization": f"Basic {KEY}"}):
            answer = here.send(path, body, headers=headers)
            assert answer.status == 401
            assert answer.error["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/healthz", "/readyz"):
        assert here.send(path).body == {"status": "ok"}
    assert here.client.models.list().data[0].id == "tiny"
    assert here.send("/v1/models", headers=with_key("another")).status == 200
    with pytest.raises(openai.AuthenticationError, match="no valid API key"):
        openai.OpenAI(base_url=f"{here.server.address}/v1", api_key="no").models.list()
    document = here.send("/openapi.json", headers=with_key()).body
    assert document["security"] == [{"key": []}]
    assert document["paths"]["/healthz"]["get"]["security"] == []


def test_a_key_file_holds_keys_and_is_closed_to_others(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("one\n\n two \n")
    path.chmod(0o640)
    assert read_keys(path) == [digest_of("one"), digest_of("two")]
    path.chmod(0o644)
    with pytest.raises(UserError, match="chmod o-rwx"):
        read_keys(path)
    path.chmod(0o600)
    for content, message in (
        (b" \n", "no key"),
        (b"\xff", "no plain text"),
        ("clé".encode(), "no plain text"),
        (b"\xef\xbb\xbfkey", "no plain text"),
        (b"k " * 40_000, "too much"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_keys(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_keys(tmp_path / "none")
    with pytest.raises(UserError, match="cannot be read"):
        read_keys(tmp_path)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:1"}, 200),
        ({"Host": "[::1]:80"}, 200),
        ({"Host": "127.0.0.1", "Origin": "http://localhost:3000"}, 200),
        ({"Host": "rebound.example"}, 403),
        ({"Host": "127.0.0.1.example"}, 403),
        ({"Host": "["}, 403),
        ({"Host": ""}, 403),
        ({"Host": "127.0.0.1", "Origin": "https://example.org"}, 403),
        ({"Host": "127.0.0.1", "Origin": "null"}, 403),
        ({"Host": "127.0.0.1", "Origin": "http://["}, 403),
    ],
)
def test_pages_in_a_browser_are_kept_out_of_a_local_server(
    local: Running, headers: dict[str, str], status: int
) -> None:
    answer = local.send("/v1/models", headers=headers)
    assert answer.status == status
    assert not any(name.lower().startswith("access-control") for name in answer.headers)
    if status == 403:
        assert answer.error["code"] == "not_local"


def test_with_a_key_any_name_will_do(here: Running) -> None:
    headers = {"Host": "pictures.example", "Origin": "https://example.org"}
    assert here.send("/v1/models", headers={**with_key(), **headers}).status == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_refused(here: Running, chunked: bool) -> None:
    body: Any = b'{"prompt": "' + b"a" * 300_000 + b'"}'
    if chunked:
        body = iter([body[i : i + 4096] for i in range(0, len(body), 4096)])
    answer = here.send(IMAGES, body, headers=with_key())
    assert answer.status == 413
    assert "larger than 100000 bytes" in answer.error["message"]


def test_other_kinds_addresses_and_methods_are_refused(here: Running) -> None:
    for kind in ("text/plain", "", "application/x-www-form-urlencoded", "multipart/form-data"):
        answer = here.send(IMAGES, b"{}", headers={**with_key(), "Content-Type": kind})
        assert answer.status == 415
        assert "allowed is application/json" in answer.error["message"]
    for path in ("/", "/v1", "/v1/images/variations", "/docs", "/v1/../etc/passwd"):
        answer = here.send(path, headers=with_key())
        assert (answer.status, answer.error["code"]) == (404, "not_found")
        assert here.send(path, {}, headers=with_key()).status == 404
    for method in ("GET", "PUT", "DELETE", "PATCH"):
        answer = here.send(IMAGES, RING, method, with_key())
        assert (answer.status, answer.headers["allow"]) == (405, "POST")
        assert "allowed is POST" in answer.error["message"]
    assert here.send("/healthz", {}).status == 405
    for path in (IMAGES + "/", "/healthz/"):
        assert here.send(path, RING, headers=with_key()).status == 404


def test_head_is_get_without_its_body(here: Running) -> None:
    for path in ("/healthz", "/readyz", "/v1/models"):
        answer = here.send(path, method="HEAD", headers=with_key())
        length = len(json.dumps(here.send(path, headers=with_key()).body, separators=(",", ":")))
        assert (answer.status, answer.headers["content-length"]) == (200, str(length))
    assert here.send(IMAGES, method="HEAD", headers=with_key()).status == 405


def test_a_body_that_comes_too_slowly_is_refused(local: Running) -> None:
    with socket.create_connection(("127.0.0.1", local.port), timeout=20) as slow:
        head = f"POST {IMAGES} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        slow.sendall(f"{head}Content-Length: 50\r\n\r\n{{".encode())
        answer = http.client.HTTPResponse(slow)
        answer.begin()
        assert answer.status == 408
        assert json.loads(answer.read())["error"]["code"] == "body_too_slow"


def test_a_body_that_is_refused_is_read_for_a_while_only(
    here: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it take a place among those that are let in."""
    monkeypatch.setattr("ddt_llama.serving.guard.DISCARDING", 0.3)
    head = f"POST {IMAGES} HTTP/1.1\r\nHost: a\r\nContent-Length: 99999\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", here.port), timeout=20) as slow:
        slow.sendall(head)
        begun = time.monotonic()
        while not select.select([slow], [], [], 0.05)[0]:
            assert time.monotonic() < begun + 5
            slow.sendall(b"a")
        assert slow.recv(12) == b"HTTP/1.1 401"
    with running(Limits(rows=2, max_queue=0), **keyed()) as server, contextlib.ExitStack() as stack:
        for _ in range(4):
            slow = socket.create_connection(("127.0.0.1", server.port), timeout=20)
            stack.enter_context(slow)
            slow.sendall(head + b"a")
        time.sleep(0.1)
        assert server.send(IMAGES, {}, headers=with_key()).status == 400


def test_only_so_many_bodies_are_read_at_once(local: Running) -> None:
    head = f"POST {IMAGES} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            slow = socket.create_connection(("127.0.0.1", local.port), timeout=20)
            stack.enter_context(slow)
            slow.sendall(f"{head}Content-Length: 50\r\n\r\n{{".encode())
        until(lambda: local.send(IMAGES, {}).status == 429)
    until(lambda: local.send(IMAGES, {}).status == 400)


def waiting(server: Running, count: int) -> list[Future[int]]:
    """Ask for pictures of a server that is held, and return the statuses to come."""
    pool = ThreadPoolExecutor(count)
    statuses = [pool.submit(lambda: server.send(IMAGES, RING).status) for _ in range(count)]
    pool.shutdown(wait=False)
    until(lambda: len(server.served.worker._waiting) == count)
    return statuses


def test_one_too_many_is_told_when_to_come_again(local: Running) -> None:
    with Held(local):
        others = waiting(local, 3)
        answer = local.send(IMAGES, RING)
        assert answer.status == 429
        assert answer.error["type"] == "rate_limit_error"
        assert int(answer.headers["retry-after"]) == 1
        statuses = [other.result() for other in others]
    assert statuses == [504] * 3  # they were held longer than the deadline


def test_who_is_too_late_is_told_so_and_not_to_try_again(local: Running) -> None:
    client = local.client.with_options(max_retries=2)
    with Held(local), pytest.raises(openai.InternalServerError, match="not done after") as told:
        client.images.generate(prompt="a ring")
    assert told.value.status_code == 504
    assert told.value.code == "deadline_exceeded"
    assert local.served.metrics.given_up.labels("deadline")._value.get() == 4  # three above


def test_pictures_that_wait_to_be_opened_are_given_up_at_the_deadline(
    local: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def endless(_: bytes) -> None:
        await asyncio.sleep(20)

    monkeypatch.setattr(local.served.opener, "open", endless)
    answer = local.send(EDITS, {"prompt": "a", "images": [{"image_url": data_url(png())}]})
    assert (answer.status, answer.error["code"]) == (504, "deadline_exceeded")
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("streams", [False, True])
def test_a_client_that_goes_away_leaves_the_queue(here: Running, streams: bool) -> None:
    body = json.dumps({**RING, "n": 4, "stream": streams}).encode()
    worker = here.served.worker
    with Held(here):
        connection = http.client.HTTPConnection("127.0.0.1", here.port)
        connection.request("POST", IMAGES, body, {"Content-Type": "application/json", **with_key()})
        until(lambda: len(worker._waiting) == 1)
        (job,) = worker._waiting
        connection.close()
        until(job.future.cancelled)
    until(lambda: worker._batch.room == 12 and not worker._active)


def test_a_client_that_goes_away_in_a_stream_leaves_the_batch(
    here: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, step = here.served.worker, here.served.worker._batch.step

    def slow() -> Any:
        time.sleep(0.05)
        return step()

    monkeypatch.setattr(worker._batch, "step", slow)
    stream = here.client.images.generate(prompt="a ring", stream=True, partial_images=3, n=4)
    assert next(iter(stream)).type == "image_generation.partial_image"
    (job,) = worker._active
    stream.response.close()
    until(lambda: worker._batch.room == 12 and not worker._active)
    assert job.future.cancelled()


def test_a_fault_is_told_without_its_words_and_logged_without_them(
    here: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(here.served.model.tokenizer, "broken", 77)

    def of(request_id: str) -> list[dict[str, Any]]:
        return [line for line in logged(caplog) if line.get("id") == request_id]

    headers = {**with_key(), "X-Request-ID": "mine-1"}
    answer = here.send(IMAGES, {"prompt": "hidden words", "seed": 77}, headers=headers)
    assert (answer.status, answer.error["code"]) == (500, "internal_error")
    assert answer.error["message"] == "this failed; its id is mine-1"
    assert answer.headers["x-request-id"] == "mine-1"
    until(lambda: len(of("mine-1")) == 2)  # the line is written behind the answer
    (fault, request), lines = of("mine-1"), logged(caplog)
    assert fault["error"] == "RuntimeError"
    assert any("decode (" in frame for frame in fault["trace"])
    assert (request["event"], request["status"], request["path"]) == ("request", 500, IMAGES)
    assert request["seconds"] > 0
    assert "secret" not in json.dumps(lines)
    assert "hidden" not in json.dumps(lines)
    assert here.send(IMAGES, RING, headers=with_key()).status == 200


def test_prompts_are_logged_where_that_is_wanted_and_ids_are_made(
    here: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(here.served, "log_prompts", True)
    for given in ({}, {"X-Request-ID": "a b"}, {"X-Request-ID": "a" * 65}):
        answer = here.send(IMAGES, RING, headers={**with_key(), **given})
        assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])
    until(lambda: len([line for line in logged(caplog) if "prompt" in line]) == 3)
    lines = [line for line in logged(caplog) if "prompt" in line]
    assert {line["prompt"] for line in lines} == {"a ring"}
    assert len({line["id"] for line in lines}) == 3


def test_figures_tell_queue_batch_tokens_and_latencies(here: Running) -> None:
    def figures() -> dict[str, float]:
        text = here.send("/metrics", headers=with_key()).body.decode()
        lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines}

    before = figures()
    body = {"prompt": "a ring", "n": 3, "guidance_scale": 2.0}
    assert here.send(IMAGES, body, headers=with_key()).status == 200
    after = figures()

    def more(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert more("ddt_tokens_total") == 3 * 16
    assert more("ddt_batch_size_sum") == 3 * 16
    assert more("ddt_batch_size_count") == 16
    assert more("ddt_queue_seconds_count") == 1
    assert more(f'ddt_requests_total{{path="{IMAGES}",status="200"}}') == 1
    assert more(f'ddt_request_seconds_count{{path="{IMAGES}"}}') == 1
    assert more('ddt_work_seconds_total{kind="write"}') > 0
    until(lambda: figures()["ddt_batch_rows"] == 0)  # told at the end of the worker's round
    assert figures()["ddt_queue_waiting"] == 0
    assert after["process_resident_memory_bytes"] > 1e6
    here.send("/" + "x" * 99, headers=with_key())
    assert 'path="other"' in here.send("/metrics", headers=with_key()).body.decode()


def test_it_drains_what_is_under_way_and_refuses_the_rest() -> None:
    limits = Limits(rows=4, drain=20)
    with running(limits) as server, Held(server) as held:
        answers: list[Any] = []
        under_way = threading.Thread(target=lambda: answers.append(server.send(IMAGES, RING)))
        under_way.start()
        kept = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        kept.request("GET", "/readyz")
        assert kept.getresponse().read() == b'{"status":"ok"}'
        kept.close()
        until(lambda: len(server.served.worker._waiting) == 1)
        server.server.handle_exit(15, None)
        held.open.set()
        under_way.join()
    assert answers[0].status == 200
    own = tiny_model(Settings(steps=2)).draw("a ring", seed=1)[0]
    assert picture_of(answers[0].body["data"][0]["b64_json"]).tobytes() == own.tobytes()


def test_who_comes_while_it_drains_is_sent_away(local: Running) -> None:
    local.served.draining = True
    try:
        answer = local.send(IMAGES, RING)
        assert (answer.status, answer.error["code"]) == (503, "shutting_down")
        assert local.send("/readyz").status == 503
        assert local.send("/healthz").status == 200
    finally:
        local.served.draining = False


def test_a_server_whose_model_has_ended_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> Any:
        raise MemoryError

    with running() as server:
        with Held(server):
            others = waiting(server, 14)
            monkeypatch.setattr(server.served.worker._batch, "join", broken)
            monkeypatch.setattr("ddt_llama.serving.worker.Batch", broken)
        statuses = [other.result() for other in others]
        assert statuses == [500] * 14  # those that had not begun, too, and at once
        assert server.send("/healthz").error["code"] == "model_ended"
        for path, body in (("/readyz", None), (IMAGES, RING)):
            answer = server.send(path, body)
            assert (answer.status, answer.error["code"]) == (503, "shutting_down")
    assert "the model's thread has ended" in caplog.text


@pytest.mark.parametrize(("drain", "signals"), [(0.05, 1), (60, 2)])
def test_what_takes_longer_than_the_drain_is_given_up(drain: float, signals: int) -> None:
    """At once where a second signal comes."""
    with running(Limits(rows=4, drain=drain)) as server, Held(server) as held:
        answers: list[Any] = []
        under_way = threading.Thread(target=lambda: answers.append(server.send(IMAGES, RING)))
        under_way.start()
        until(lambda: len(server.served.worker._waiting) == 1)
        for _ in range(signals):
            server.server.handle_exit(15, None)
        under_way.join()
        held.open.set()
    assert answers[0].status == 503
    assert "told to stop" in answers[0].error["message"]


def test_an_address_in_use_or_unknown_is_refused() -> None:
    with listener("127.0.0.1", 0) as bound:
        bound.listen()
        port = bound.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1 port {port}: Address already in use"):
            listener("127.0.0.1", port)
    for host in ("nowhere.invalid", "192.0.2.1"):
        with pytest.raises(UserError, match="give another --port"):
            listener(host, 0)
    with pytest.raises(UserError, match="port: given 70000, allowed are 0"):
        listener("127.0.0.1", 70_000)


def test_a_picture_of_too_many_pixels_is_refused_by_its_header(here: Running) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        whole = kind + data
        return struct.pack(">I", len(data)) + whole + struct.pack(">I", zlib.crc32(whole))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + head
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )
    for data, message in (
        (bomb, "too large"),
        (png(size=8), f"at least {SIZE} on each side"),
        (png()[:60], "cannot be decoded"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"),
    ):
        body = {"prompt": "blue", "images": [{"image_url": data_url(data)}]}
        answer = here.send(EDITS, body, headers=with_key())
        assert (answer.status, answer.error["code"]) == (400, "invalid_image")
        assert message in answer.error["message"]
