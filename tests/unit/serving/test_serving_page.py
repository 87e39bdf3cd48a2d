"""The page's door and its pictures; how it is used is in tests/e2e/test_e2e_page.py."""

import base64
import http.client
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import SIZE, tiny_model
from tiny_server import KEY, Running, keyed, png, running

from ddt_llama.serving.jobs import Job
from ddt_llama.serving.limits import Limits

pytest.importorskip("gradio", reason="the page needs ddt-llama[page]")

LIMITS = Limits(rows=12, max_body=0.05)


@pytest.fixture(scope="module")
def here() -> Iterator[Running]:
    with running(LIMITS, page=True) as server:
        yield server


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    with running(LIMITS, page=True, **keyed()) as server:
        yield server


def test_the_page_stands_beside_an_interface_that_is_as_it_was(here: Running) -> None:
    page = here.send("/")
    assert page.status == 200
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    assert b"ddt-llama" in page.body
    other = here.send("/?deep_link=..%2Fx&page=y")
    assert b'"deep_link_state":"none"' in other.body
    with running(LIMITS) as alone:
        assert here.send("/openapi.json").body == alone.send("/openapi.json").body
        assert alone.send("/").status == 404
    answer = here.send("/v1/images/generations")
    assert (answer.status, answer.headers["allow"]) == (405, "POST")
    assert here.send("/healthz").status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/info",
        "/gradio_api/proxy=http://127.0.0.1/",
        "/gradio_api/run/run",
        "/gradio_api/call/run",
        "/gradio_api/component_server",
        "/gradio_api/custom_component/a/client/component/x.js",
        "/config",
        "/monitoring",
        "/nothing",
        "/gradio_api/file=http://127.0.0.1/",
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=pyproject.toml",
        "/gradio_api/cancel",
        "/gradio_api/reset",
        "/v1/nothing",
    ],
)
def test_what_the_page_does_not_need_is_not_there(here: Running, path: str) -> None:
    answer = here.send(path)
    assert (answer.status, answer.error["code"]) == (404, "not_found")


@pytest.mark.parametrize("name", ["/etc/passwd", "http://127.0.0.1/a.png", "//x/y", "a/../../b"])
def test_no_request_names_a_file_of_others_or_an_address(here: Running, name: str) -> None:
    given = {"meta": {"_type": "gradio.FileData"}, "path": name}
    for data in ([given], [{"deep": [{"value": given}]}], [{**given, "path": "", "url": name}]):
        body = {"data": data, "fn_index": 0, "session_hash": "a"}
        answer = here.send("/gradio_api/queue/join", body)
        assert (answer.status, answer.error["code"]) == (404, "not_found")
    own = str(next(Path(os.environ["GRADIO_TEMP_DIR"]).glob("*.png")))
    for path, url, passes in (
        (own, "data:,x", True),
        ("data:,x", own, False),
        (own, "file:,x", False),
    ):
        body = {"data": [{**given, "path": path, "url": url}], "fn_index": 9999}
        answer = here.send("/gradio_api/queue/join", {**body, "session_hash": "a"})
        assert (answer.status != 404) == passes
    assert here.send("/gradio_api/queue/join", b"[" * 9000).error["code"] == "invalid_json"


def test_other_sites_are_sent_away(locked: Running) -> None:
    key = base64.b64encode(f"me:{KEY}".encode()).decode()
    own = {"Authorization": f"Basic {key}"}
    here = f"http://127.0.0.1:{locked.port}"
    assert locked.send("/", headers=own).status == 200
    assert locked.send("/", headers={**own, "Origin": here}).status == 200
    for origin in ("http://127.0.0.1:1", "https://example.com", "null", "http://[", "x"):
        answer = locked.send("/gradio_api/queue/join", {}, headers={**own, "Origin": origin})
        assert answer.status == 403


def test_a_key_is_asked_for_by_the_browser_and_of_the_page_only(locked: Running) -> None:
    def with_password(password: str) -> dict[str, str]:
        text = base64.b64encode(f":{password}".encode()).decode()
        return {"Authorization": f"Basic {text}"}

    for headers in ({}, with_password("other"), {"Authorization": "Basic ?"}):
        answer = locked.send("/", headers=headers)
        assert answer.status == 401
        assert answer.headers["www-authenticate"].startswith("Basic realm=")
    assert locked.send("/theme.css", headers=with_password(KEY)).status == 200
    answer = locked.send("/v1/models", headers=with_password(KEY))
    assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")


def test_what_is_sent_is_bounded(here: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def sent(content: bytes) -> Any:
        body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        kind = {"Content-Type": "multipart/form-data; boundary=x"}
        return here.send("/gradio_api/upload", body + content + b"\r\n--x--\r\n", headers=kind)

    answer = sent(png())
    assert answer.status == 200
    (file,) = map(Path, answer.body)
    assert file.parts[-3].startswith("ddt-page-")
    assert file.read_bytes() == png()
    assert sent(bytes(60_000)).status == 413
    from ddt_llama.serving.page import mount

    monkeypatch.setattr(mount, "MOST_KEPT", 0)
    assert (sent(png()).status, sent(png()).error["code"]) == (429, "storage_full")


def test_an_open_page_does_not_hold_up_the_end() -> None:
    with running(LIMITS, page=True) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        connection.request("GET", "/gradio_api/heartbeat/somebody")
        answer = connection.getresponse()
        assert answer.readline() == b"data: ALIVE\n"
        server.served.drain(30.0)
        assert b"data" not in answer.read()
        connection.close()


@pytest.mark.parametrize("first", ["wanted", "begun"])
def test_an_end_that_is_wanted_ends_the_job_before_it_begins_and_after(first: str) -> None:
    from ddt_llama.serving.page import inside
    from ddt_llama.serving.page.asking import Ending

    ending, job = Ending("a"), Job(inside.from_first(torch.zeros(3, SIZE, SIZE), [1], 1), 0.0)
    steps = [lambda: ending.begun(job), ending.want]
    for step in steps if first == "begun" else reversed(steps):
        assert not job.future.cancelled()
        step()
    assert job.future.cancelled()
    after = Job(job.program, 0.0)
    Ending("a").begun(after)
    assert not after.future.cancelled()


def test_its_pictures_go_with_time_and_with_the_server(tmp_path: Path) -> None:
    from ddt_llama.serving.page.pictures import Files

    files = Files(tmp_path, SIZE)
    first = {place for place, _ in files.edits + files.questions}
    (tmp_path / "sent").mkdir()
    (tmp_path / "sent" / "old.png").write_bytes(png())
    os.utime(tmp_path / "sent" / "old.png", (0, time.time() - 100))
    (tmp_path / "new.png").write_bytes(png())
    files.forget(50)
    there = {str(file) for file in tmp_path.rglob("*") if file.is_file()}
    assert there == first | {str(tmp_path / "new.png")}
    assert files.size() == sum(Path(file).stat().st_size for file in there)
    with running(LIMITS, page=True):
        own = Path(os.environ["GRADIO_TEMP_DIR"])
        assert own.is_dir()
    assert not own.exists()


def test_programs_of_the_inside_rebuild_swap_and_leave_out() -> None:
    from ddt_llama.serving.page import inside

    model = tiny_model()
    count = model.tokenizer.num_tokens
    pair = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    whole = model.decode(model.encode(pair), [inside.SEED] * 2, 2)
    made = model.run(inside.from_first(pair[0], [1, count], 2))
    assert torch.equal(made[1], whole[0])
    assert not torch.equal(made[0], whole[0])
    a, b, mixed = model.run(inside.swapped(pair, 1, count, 2))
    assert torch.equal(torch.stack([a, b]), whole)
    assert torch.equal(mixed, b)
    # The coarsest of A and all else of B is B with the coarsest of A.
    one, other = (
        model.run(inside.swapped(images, *ends, 2))[2]
        for images, ends in ((pair, (2, count)), (pair.flip(0), (1, 1)))
    )
    assert torch.equal(one, other)
    groups = inside.groups(count)
    assert [token for group in groups for token in group] == list(range(1, count + 1))
    kept, *lacking = model.run(inside.without(pair[0], [range(2, count + 1), range(1, 2)], 2))
    assert torch.equal(kept, whole[0])
    assert torch.equal(lacking[0], made[0])
    assert not torch.equal(lacking[1], whole[0])


def test_many_tokens_are_left_out_in_groups() -> None:
    from ddt_llama.serving.page import inside

    groups = inside.groups(150)
    assert len(groups) == 50
    assert (groups[0], groups[-1]) == (range(1, 4), range(148, 151))


def test_maps_show_what_changed_and_by_which() -> None:
    from ddt_llama.serving.page.pictures import difference, marked, owners

    image = torch.zeros(3, 4, 4)
    other = image.clone()
    other[:, 0, 0] = 1.0
    amount = difference(image, other)
    assert amount[0, 0] == 0.5
    assert amount.sum() == 0.5
    shown = marked(image, amount)
    assert shown[0, 0, 0] > shown[1, 0, 0]  # coloured
    assert torch.equal(shown[0, 1:], shown[1, 1:])  # grey
    owner, colours = owners(torch.stack([amount, amount * 0, amount.flip(0, 1) * 2]))
    assert owner[0, 0] == 0
    assert owner[3, 3] == 2
    assert torch.equal(colours[:, 0, 0], torch.tensor([1.0, -1.0, -1.0]))  # the first is red
    assert colours[2, 3, 3] == 1.0  # the last is blue and more
    assert torch.equal(colours[:, 1, 1], torch.full((3,), -1.0))


def test_the_config_names_no_address_outside(here: Running) -> None:
    text = here.send("/").body.decode()
    config = text.partition("window.gradio_config = ")[2].partition(";</script>")[0]
    assert json.loads(config)["analytics_enabled"] is False
    assert "googleapis" not in text
    assert "cdn" not in text
