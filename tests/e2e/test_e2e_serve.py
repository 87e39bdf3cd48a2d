"""ddt serve as a process: by OpenAI's client, under load, until it is told to stop."""

import base64
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import PIL.Image
import pytest

import ddt_llama
from ddt_llama.cli import main
from ddt_llama.serving.server import Server, listener

ROOT = Path(__file__).resolve().parents[2]
KEY = "sk-of-this-test"


@contextmanager
def serving(*options: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """Start a server of the bundled model; gives the process and its address."""
    command = [sys.executable, "-m", "ddt_llama", "serve", "nano", "--port", "0", "--no-page"]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, *options], **pipes, env=os.environ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("serving nano at http://127.0.0.1:")
            yield process, line.split()[-1]
        finally:
            process.kill()


def pixels(text: str | None) -> bytes:
    assert text
    return PIL.Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB").tobytes()


def test_it_serves_what_the_model_draws_and_ends_with_what_is_under_way(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(KEY)
    keys.chmod(0o600)
    with serving("--api-key-file", str(keys), "--max-queue", "8") as (process, address):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="sk-other").models.list()
        (model,) = client.models.list().data
        assert model.id == "nano"
        headers = {"Authorization": f"Bearer {KEY}"}
        headers["Content-Type"] = "multipart/form-data; boundary=x"
        request = urllib.request.Request(f"{address}/v1/images/edits", b"no form", headers)
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(request, timeout=20)
        made: list[Any] = []

        def ask() -> None:
            prompt, extra = "a red circle", {"seed": 5}
            made.append(client.images.generate(prompt=prompt, n=2, extra_body=extra))

        under_way = threading.Thread(target=ask)
        under_way.start()
        time.sleep(0.15)
        process.send_signal(signal.SIGTERM)
        under_way.join(60)
        out, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out == ""
    own = ddt_llama.load("nano").draw("a red circle", num=2, seed=5)
    assert [pixels(one.b64_json) for one in made[0].data] == [one.tobytes() for one in own]
    lines = [json.loads(line) for line in said.splitlines()]
    complaint = lines.pop(2)  # of the library that reads forms
    assert complaint["event"].startswith("python_multipart")
    assert [line["status"] for line in lines] == [401, 200, 400, 200]
    assert all(line["event"] == "request" and len(line["id"]) == 32 for line in lines)
    assert "red circle" not in said
    assert KEY not in said


def test_under_load_every_answer_is_the_one_computed_alone(tmp_path: Path) -> None:
    """The small form; `scripts/load_test.py` alone is the whole (experiments/0055)."""
    figures = tmp_path / "load.json"
    script = [sys.executable, str(ROOT / "scripts" / "load_test.py"), "--json", str(figures)]
    done = subprocess.run(
        [*script, "--clients", "16", "--requests", "40"],
        capture_output=True,
        text=True,
        env=os.environ,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(figures.read_text())
    assert found["strange"] == {}
    assert found["not_equal"] == 0
    assert found["refused"] == 4
    assert found["answered"] + found["cancelled"] == 36
    assert found["mean_batch"] > 3
    assert found["flat"] is None  # so few do not tell


def test_memory_grows_where_each_request_leaves_something_and_not_in_waves() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "load_test.py"))
    warming = [500_000_000 + 2_000_000 * request for request in range(200)]
    after = [900_000_000 + 60_000_000 * (request % 50 == 0) for request in range(300)]
    leaking = [size + 500_000 * request for request, size in enumerate(after)]
    flat, grown = script["flat"], script["grown"]
    assert flat(*grown([*warming, *after]))
    assert not flat(*grown([*warming, *leaking]))


def refused(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    capsys.readouterr()
    assert main(["serve", *command]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with listener("127.0.0.1", 0) as bound:
        bound.listen()
        port = str(bound.getsockname()[1])
        assert "Address already in use" in refused(capsys, "nano", "--port", port)
    keys = tmp_path / "keys"
    assert "cannot be read" in refused(capsys, "nano", "--api-key-file", str(keys))
    keys.write_text(KEY)
    keys.chmod(0o644)
    assert "chmod o-rwx" in refused(capsys, "nano", "--api-key-file", str(keys))
    tokenizer = str(ROOT / "weights" / "nano-ordered")
    assert "without a language model" in refused(capsys, tokenizer, "--port", "0")
    assert "rows: given 1, this model needs" in refused(
        capsys, "nano", "--port", "0", "--rows", "1"
    )
    assert "max_queue: given -1" in refused(capsys, "nano", "--max-queue=-1")
    assert "unknown model" in refused(capsys, "no-such-model", "--port", "0")
    assert "--port" in refused(capsys, "nano", "--port", "many")


def test_what_it_needs_is_named_where_it_is_not_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ddt_llama.cli import serve

    monkeypatch.setattr(serve, "NEEDED", ("fastapi", "no_such_module"))
    assert "no_such_module is not installed; install ddt-llama[serve]" in refused(capsys, "nano")


def test_without_the_page_it_says_how_to_get_it_and_without_a_key_who_may_come(
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ddt_llama.cli import serve

    def started(server: Server) -> None:
        assert not server.served.page
        assert server.then is not None
        server.then(server.address)
        server.served.close()

    monkeypatch.setattr(serve, "OF_PAGE", ("no_such_module",))
    monkeypatch.setattr("ddt_llama.serving.logs.write_json_lines", lambda: None)
    monkeypatch.setattr(Server, "run_until_stopped", started)
    assert main(["serve", "nano", "--port", "0"]) == 0
    assert "whoever reaches" not in caplog.text
    assert main(["serve", "nano", "--port", "0", "--host", "0.0.0.0"]) == 0
    assert "whoever reaches this address may use it; --api-key-file asks for a key" in caplog.text
    assert capsys.readouterr().out == (
        "the interface alone: for the page, too, install ddt-llama[page]\n" * 2
    )
    assert main(["demo", "--open"]) == 2
    assert "no_such_module is not installed; install ddt-llama[page]" in capsys.readouterr().err
    assert main(["demo", "--open", "--images", "x"]) == 2
    assert "--images: with --open" in capsys.readouterr().err
