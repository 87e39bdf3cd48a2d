"""scripts/probes.py: every probe once, with fields that it has, and a stop that loses nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ddt_llama.config import override
from ddt_llama.probes import named

SCRIPT = Path(__file__).parents[2] / "scripts" / "probes.py"

# Stands for the command: writes what it was asked, fails at `swap`, waits at `ablate` for a signal.
RECORDER = """
import json, os, pathlib, signal, sys, time
asked = sys.argv[1:]
with open(os.environ["RECORD"], "a") as file:
    print(json.dumps(asked), file=file)
if asked[1] == "swap":
    print("error: swap is too hard")
    sys.exit(2)
if "--quick" not in asked and asked[1] in ("ablate", "length"):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("saved") or 130))
    pathlib.Path(os.environ["RECORD"] + asked[1]).touch()
    time.sleep(60)
print("page")
"""


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, str]:
    package = tmp_path / "stand-in" / "ddt_llama"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(RECORDER)
    more = {"PYTHONPATH": str(package.parent), "RECORD": str(tmp_path / "record")}
    return {**os.environ, **more}


def test_every_probe_is_begun_once_and_one_that_fails_stops_no_other(
    settings: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, str(SCRIPT), "nano", "my rival", "--quick", "--out"]
    command.append(str(tmp_path / "p"))
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "swap: error: swap is too hard" in done.stdout
    asked = [json.loads(line) for line in Path(settings["RECORD"]).read_text().splitlines()]
    assert sorted(one[1] for one in asked) == sorted(named.PROBES)
    for _, name, *rest in asked:
        varied = named.PROBES[name].check is named.each_can_vary
        models = ["nano"] if varied else ["nano", "my rival"]
        assert rest[: len(models)] == models
        fields = rest[len(models) : rest.index("--quick")]
        changes = dict(zip(fields[::2], fields[1::2], strict=True))
        plan = override(
            named.PROBES[name].plan,
            {key.removeprefix("--"): value == "true" for key, value in changes.items()},
        )
        trains = name not in ("prefix", "swap")
        assert not trains or plan.course.train.compile
        assert not varied or plan.train.compile
        assert rest[-2:] == ["--out", str(tmp_path / "p" / name)]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP])
def test_a_stop_reaches_each_probe_and_begins_no_other(
    settings: dict[str, str], tmp_path: Path, how: signal.Signals
) -> None:
    out = tmp_path / "p"
    command = [sys.executable, str(SCRIPT), "nano", "--out", str(out)]
    with subprocess.Popen(command, env=settings, stderr=subprocess.PIPE, text=True) as script:
        patience = time.monotonic() + 30
        while not all(Path(settings["RECORD"] + name).exists() for name in ("ablate", "length")):
            assert time.monotonic() < patience
            time.sleep(0.05)
        script.send_signal(how)
        _, told = script.communicate(timeout=30)
    assert script.returncode == 130
    assert "the same command goes on" in told
    assert sorted(log.name for log in out.iterdir()) == ["ablate.log", "length.log"]
    assert {log.read_text() for log in out.iterdir()} == {"saved\n"}


def test_no_model_is_refused_before_anything_is_begun(
    settings: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "p")]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "p").exists()
