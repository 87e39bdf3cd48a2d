"""Every probe, the longest first, some of them side by side.

Stopped at any moment, the same command goes on where it was. Each probe writes into a folder of its
name and a log beside it; `length` and `ablate` vary the first model, the others look at all.

    python scripts/probes.py nano weights/spatial-nano
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

LESSONS = ("--course.train.compile", "true")
TOKENIZERS = ("--train.compile", "true")
# The longest first, and what has to be compiled.
PROBES: dict[str, tuple[str, ...]] = {
    "ablate": (*LESSONS, *TOKENIZERS),
    "length": (*LESSONS, *TOKENIZERS),
    "scaling": LESSONS,
    "entropy": LESSONS,
    "shuffle": LESSONS,
    "synergy": LESSONS,
    "prefix": (),
    "swap": (),
}
VARIED = ("length", "ablate")  # one model, trained anew
PAUSE = 0.2  # seconds between two looks


def begin(
    name: str, models: tuple[str, ...], out: Path, more: tuple[str, ...]
) -> subprocess.Popen[bytes]:
    """Begin one probe, or go on with it, in a process of its own with one thread."""
    asked = models[:1] if name in VARIED else models
    command = [sys.executable, "-m", "ddt_llama", "probe", name, *asked, *more]
    with (out / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            [*command, "--out", str(out / name)],
            stdout=log,
            stderr=log,
            env={"OMP_NUM_THREADS": "1", **os.environ},
            start_new_session=True,  # signals reach it once, from here
        )


def last_line(log: Path) -> str:
    """Return what a probe said last."""
    return (log.read_text(encoding="utf-8", errors="replace").splitlines() or ["no word"])[-1]


def main(
    models: Annotated[tuple[str, ...], tyro.conf.Positional],
    out: Path | None = None,
    at_once: int = 2,
    quick: bool = False,
    compiled: Annotated[bool, tyro.conf.arg(name="compile")] = True,
) -> int:
    """Carry all out; returns 0, 1 if one failed, 2 without a model, 130 if stopped.

    `out` is probes unless given, probes-quick of a quick run.
    """
    if not models or at_once < 1:
        print("give one or more models, such as nano, and --at-once 1 or more", file=sys.stderr)
        return 2
    out = out or Path("probes-quick" if quick else "probes")
    out.mkdir(parents=True, exist_ok=True)
    for one in (signal.SIGTERM, signal.SIGHUP):  # a terminal that is closed, too
        signal.signal(one, signal.default_int_handler)
    waiting, running, failed = list(PROBES), dict[str, subprocess.Popen[bytes]](), 0
    try:
        with tqdm(total=len(PROBES), desc="probes") as bar:
            while waiting or running:
                while waiting and len(running) < at_once:
                    name = waiting.pop(0)
                    more = (PROBES[name] if compiled else ()) + (("--quick",) if quick else ())
                    running[name] = begin(name, models, out, more)
                for name in [name for name, one in running.items() if one.poll() is not None]:
                    failed |= running.pop(name).returncode != 0
                    bar.write(f"{name}: {last_line(out / f'{name}.log')}")
                    bar.update()
                time.sleep(PAUSE)
    except KeyboardInterrupt:
        for one in running.values():
            one.terminate()  # each saves what it has
        for one in running.values():
            one.wait()
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return int(failed)


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))
