"""Two machines, played by two groups of processes here, of which first one and then the other dies.

Through launch/torchrun.sh itself, each started once more by hand as a cluster would.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = 300
RECIPE = [
    "nano_tokenizer",
    f"--steps={STEPS}",
    "--tokenizer.num_tokens=8",
    "--tokenizer.quantizer.codebook_size=32",
    *(f"--tokenizer.{part}.dim=32" for part in ("encoder", "decoder")),
    *(f"--tokenizer.{part}.depth=1" for part in ("encoder", "decoder")),
    *(f"--tokenizer.{part}.num_heads=2" for part in ("encoder", "decoder")),
    "--train.batch=4",
    "--train.prefetch=0",
    "--train.tensorboard=false",
    "--train.log_every=1",
    "--train.checkpoint_every=5",
    "--train.sample_every=1000",
]
Machine = subprocess.Popen[bytes]
STARTED: list[Machine] = []
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def started(run: Path, log: Path, *fields: str, **environment: str) -> Machine:
    """Start launch/torchrun.sh with a log that later starts go on with."""
    bin_ = Path(sys.executable).parent
    place = {
        "PATH": f"{bin_}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "1",
        "PAUSE": "1",
    }
    with log.open("ab") as told:
        machine = subprocess.Popen(
            ["sh", str(ROOT / "launch" / "torchrun.sh"), *RECIPE, "--out", str(run), *fields],
            env={**os.environ, **place, **environment},
            cwd=run.parent,
            stdout=told,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    STARTED.append(machine)
    return machine


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    for machine in STARTED:
        if machine.poll() is None:
            lose(machine)


def lose(machine: Machine) -> None:
    """Kill everything that runs there, at once."""
    root = psutil.Process(machine.pid)
    for one in [root, *root.children(recursive=True)]:
        one.kill()
    machine.wait()


def until(reached: Callable[[], bool], *machines: Machine) -> None:
    """Wait; an end of the machines or ten minutes come too early."""
    limit = time.monotonic() + 600
    while not reached():
        assert all(machine.poll() is None for machine in machines)
        assert time.monotonic() < limit
        time.sleep(0.05)


def steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def figures(run: Path) -> list[tuple[float, ...]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [tuple(line[name] for name in ("step", "loss", "grad_norm", "lr")) for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, ...]]:
    """The figures of two processes on one machine that nothing happens to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    log = run.with_name("log")
    assert started(run, log, PROCESSES="2").wait() == 0, log.read_text()
    assert [step for step, *_ in figures(run)] == list(range(1, STEPS + 1))
    return figures(run)


def test_a_machine_lost_and_started_again_changes_nothing(
    whole: list[tuple[float, ...]], tmp_path: Path
) -> None:
    run, logs = tmp_path / "run", [tmp_path / "0.log", tmp_path / "1.log"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def start(node: int) -> Machine:
        place = {"NODES": "2", "NODE": str(node), "HOST": "127.0.0.1", "PORT": port}
        return started(run, logs[node], **place, PROCESSES="1", WAIT="300")

    machines = [start(0), start(1)]
    for lost, step in ((1, 30), (0, 150)):  # 0 is where the others meet
        until(lambda step=step: steps(run) >= step, *machines)
        lose(machines[lost])
        machines[lost] = start(lost)
    codes = [machine.wait() for machine in machines]
    told = [log.read_text() for log in logs]
    assert codes == [0, 0], "\n".join(told)
    assert figures(run) == whole
    for text in told:
        assert "beginning again from the newest state" in text
        assert "error: another process is gone (" in text
        assert "the same command goes on from step" in text
    assert (run / "FINISHED").is_file()


def test_a_machine_told_to_end_saves_and_goes_on_later(
    whole: list[tuple[float, ...]], tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    machine = started(run, log, PROCESSES="2")
    until(lambda: steps(run) >= 30, machine)
    machine.send_signal(signal.SIGTERM)  # to the script alone, as Kubernetes does
    assert machine.wait() == 75, log.read_text()
    reached = steps(run)
    assert 30 <= reached < STEPS
    assert (run / f"checkpoints/step-{reached:08d}/COMPLETE").is_file()
    assert "told to stop: the same command goes on" in log.read_text()
    assert started(run, log, PROCESSES="2").wait() == 0, log.read_text()
    assert figures(run) == whole


def test_a_process_that_dies_is_told_of_and_replaced(
    whole: list[tuple[float, ...]], tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    machine = started(run, log, PROCESSES="2")
    until(lambda: steps(run) >= 30, machine)
    trainers = [
        one
        for one in psutil.Process(machine.pid).children(recursive=True)
        if one.environ().get("RANK") == "1" and "ddt" in " ".join(one.cmdline()[:2])
    ]
    assert len(trainers) == 1
    trainers[0].kill()
    assert machine.wait() == 0, log.read_text()
    told = log.read_text()
    assert told.count("error: another process is gone (") == 1
    assert "[rank0]: Traceback" not in told
    assert figures(run) == whole


def test_a_batch_that_cannot_be_shared_is_no_training(tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    assert started(run, log, "--train.batch=3", PROCESSES="2").wait() == 2
    told = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert told == [
        "error: train.batch: given 3 for 2 processes, allowed are multiples of their number; "
        "change one of the two"
    ]
    assert not run.exists()
