"""Every launcher is read by its own tool, and run with stand-ins for the commands of a cluster.

A stand-in writes down how it was called. No line runs on SLURM, Kubernetes or several machines.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from ddt_llama.cli import OWN_OPTIONS, bound, split_fields
from ddt_llama.config import override
from ddt_llama.recipes import recipe_named

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
SHELL = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]
BIN = Path(sys.executable).parent
SHELLCHECK = shutil.which("shellcheck", path=f"{BIN}:{os.environ['PATH']}")
# The processes of a machine: what stands behind --no-python.
TORCHRUN = 'while [ "$1" != --no-python ]; do shift; done; shift; "$@" || exit 1'
SRUN = 'while [ "$1" != sh ]; do shift; done; SLURM_NODEID=1 exec "$@"'
SLURM = {
    "SLURM_JOB_ID": "20123",
    "SLURM_JOB_NODELIST": "gpu[1-4]",
    "SLURM_JOB_NUM_NODES": "4",
    "SLURM_CPUS_PER_TASK": "64",
}


class Bench:
    """A folder of stand-ins, and the list of their calls."""

    def __init__(self, place: Path) -> None:
        self.place, self.record = place, place / "record"
        (place / "bin").mkdir()
        self.stand_in("torchrun", TORCHRUN)
        self.stand_in("srun", SRUN)
        self.stand_in("scontrol", '[ "$1" != show ] || printf "gpu1\\ngpu2\\n"')
        self.stand_in("sbatch", f'while [ "$1" != {SHELL[-1]} ]; do shift; done; exec bash "$@"')
        for name in ("ddt", "ray", "scancel", "sleep"):
            self.stand_in(name)

    def stand_in(self, name: str, does: str = ":") -> None:
        told = 'printf "%s\\037" "${0##*/}" "$@" >>"$RECORD"; echo >>"$RECORD"'
        path = self.place / "bin" / name
        path.write_text(f"#!/bin/sh\n{told}\n{does}\n")
        path.chmod(0o755)

    def start(self, line: str, **environment: str) -> subprocess.Popen[str]:
        path = f"{self.place / 'bin'}:/usr/bin:/bin"
        return subprocess.Popen(
            ["bash", "-c", line],
            env={"PATH": path, "RECORD": str(self.record), "HOME": str(self.place), **environment},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, line: str, **environment: str) -> int:
        process = self.start(line, **environment)
        process.communicate(timeout=60)
        return process.returncode

    def calls(self, name: str) -> list[list[str]]:
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        found = [line.removesuffix("\x1f").split("\x1f") for line in lines]
        return [arguments for called, *arguments in found if called == name]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def usages(path: Path) -> list[str]:
    """Return the commands of the comment at the head of a launcher, as they are typed there."""
    lines = re.findall(r"^#   (\S.*)$", path.read_text(), re.MULTILINE)
    return [line.replace(f"launch/{path.name}", str(path)) for line in lines]


def options(arguments: list[str]) -> dict[str, str]:
    """Return the options of torchrun with their values."""
    own = arguments[: arguments.index("--no-python")]
    pairs = zip(own, [*own[1:], "--"], strict=True)
    return {one: "" if value.startswith("--") else value for one, value in pairs if one[:2] == "--"}


def train_command(arguments: list[str]) -> Any:
    """Return the recipe that a command line of `ddt train` would train."""
    import tyro

    assert arguments[0] == "train"
    rest, fields = split_fields(arguments[1:], OWN_OPTIONS["train"])
    return override(recipe_named(bound(tyro.cli, "train", rest).keywords["recipe"]), fields)


@pytest.mark.parametrize("path", sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_the_document_shows_the_lines_that_are_tested_here(path: Path) -> None:
    shown = (ROOT / "docs" / "cluster.md").read_text().splitlines()
    for line in usages(path):
        assert line.replace(str(path), f"launch/{path.name}") in shown


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shells_find_no_mistake(path: Path) -> None:
    shell = path.read_text().splitlines()[0].removeprefix("#!/bin/")
    assert subprocess.run([shell, "-n", str(path)], check=False).returncode == 0
    if SHELLCHECK is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([SHELLCHECK, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_one_machine(bench: Bench) -> None:
    line = usages(LAUNCH / "torchrun.sh")[0]
    assert bench.run(line) == 0
    (called,) = bench.calls("torchrun")
    assert options(called)["--nproc-per-node"] == "auto"
    assert "--standalone" in called
    (trained,) = bench.calls("ddt")
    assert trained == ["train", *line.split()[1:]]
    assert train_command(trained).train.shard == "full"


@pytest.mark.parametrize("node", [0, 1])
def test_several_machines(node: int, bench: Bench) -> None:
    line = usages(LAUNCH / "torchrun.sh")[1 + node]
    assert bench.run(line, PROCESSES="8", WAIT="60") == 0
    (called,) = bench.calls("torchrun")
    found = options(called)
    assert (found["--nnodes"], found["--nproc-per-node"]) == ("2", "8")
    assert found["--rdzv-endpoint"] == "first-machine:29500"
    first = "true" if node == 0 else "false"
    assert found["--rdzv-conf"] == f"is_host={first},join_timeout=60,read_timeout=60"
    (trained,) = bench.calls("ddt")
    assert train_command(trained).name == "small_tokenizer"
    assert trained[-2:] == ["--out", "/shared/small"]


@pytest.mark.parametrize(("ends", "code", "starts"), [(0, 0, 1), (2, 2, 1), (75, 1, 4), (1, 1, 4)])
def test_only_what_may_go_better_is_tried_again(
    ends: int, code: int, starts: int, bench: Bench
) -> None:
    bench.stand_in("ddt", f"exit {ends}")
    assert bench.run(f"{LAUNCH / 'torchrun.sh'} nano_tokenizer", RESTARTS="3") == code
    assert len(bench.calls("torchrun")) == len(bench.calls("ddt")) == starts
    assert bench.calls("sleep") == [["5"]] * (starts - 1)


def test_slurm_starts_a_launcher_on_every_machine(bench: Bench) -> None:
    (line,) = usages(LAUNCH / "slurm.sbatch")
    assert bench.run(line, **SLURM) == 0
    (submitted,) = bench.calls("sbatch")
    assert submitted[:2] == ["--nodes", "4"]
    (called,) = bench.calls("srun")
    assert called[:2] == ["--cpus-per-task=64", "--kill-on-bad-exit=1"]
    found = options(bench.calls("torchrun")[0])
    assert (found["--nnodes"], found["--rdzv-endpoint"]) == ("4", "gpu1:10123")
    assert "is_host=false" in found["--rdzv-conf"]  # SLURM_NODEID is 1
    assert train_command(bench.calls("ddt")[0]).train.shard == "hybrid"
    assert not [call for call in bench.calls("scontrol") if call[0] == "requeue"]


@pytest.mark.parametrize("ends", [0, 2, 75])
def test_slurm_queues_again_what_has_to_stop(ends: int, bench: Bench) -> None:
    """USR1 comes before the time limit; the tasks, told by SIGTERM, end with some code."""
    bench.stand_in("srun", f'while [ ! -e "$RECORD.told" ]; do /bin/sleep 0.1; done; exit {ends}')
    bench.stand_in("scancel", '[ "$*" = "--signal=TERM 20123" ] && : >"$RECORD.told"')
    job = bench.start(f"exec bash {LAUNCH / 'slurm.sbatch'} nano_tokenizer", **SLURM)
    while not bench.calls("srun"):
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=60)
    again = [call for call in bench.calls("scontrol") if call[0] == "requeue"]
    assert again == ([["requeue", "20123"]] if ends == 75 else [])
    assert job.returncode == (0 if ends == 75 else ends)


def test_slurm_is_left_to_end_what_it_has_told_to_end(bench: Bench) -> None:
    bench.stand_in("ddt", "exit 75")
    bench.stand_in("srun", "exit 75")
    assert bench.run(f"bash {LAUNCH / 'slurm.sbatch'} nano_tokenizer", **SLURM) == 75
    assert bench.calls("sleep") == [["600"]]
    assert [call[0] for call in bench.calls("scontrol")] == ["show"]


def kubernetes() -> tuple[dict[str, Any], dict[str, Any]]:
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    return service, job


@pytest.mark.parametrize("version", ["1.31", "1.37"])
def test_kubernetes_knows_every_field(version: str) -> None:
    checker = pytest.importorskip("kubernetes_validate")
    for part in kubernetes():
        assert checker.validate(part, version, strict=True) == version
    service, _ = kubernetes()
    service["spec"]["clusterIp"] = "None"  # it does refuse
    with pytest.raises(checker.ValidationError):
        checker.validate(service, version, strict=True)


def test_kubernetes_starts_a_launcher_in_every_pod(bench: Bench) -> None:
    service, job = kubernetes()
    assert usages(LAUNCH / "kubernetes.yaml") == [f"kubectl apply -f {LAUNCH / 'kubernetes.yaml'}"]
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    known = {one["name"]: one for one in container["env"]}
    numbers = known.pop("NODE")["valueFrom"]["fieldRef"]["fieldPath"]
    assert numbers == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    environment = {one: entry["value"] for one, entry in known.items()}
    assert spec["completionMode"] == "Indexed"
    assert int(environment["NODES"]) == spec["completions"] == spec["parallelism"]
    # Pod 0 is found under its name: that of the job and its number, in the domain of the service.
    assert environment["HOST"] == f"{name}-0.{pod['subdomain']}"
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    command = [*container["command"], *container["args"]]
    assert bench.run(" ".join(command), NODE="1", **environment) == 0
    found = options(bench.calls("torchrun")[0])
    port = service["spec"]["ports"][0]["port"]
    assert found["--rdzv-endpoint"] == f"{environment['HOST']}:{port}"
    (trained,) = bench.calls("ddt")
    assert train_command(trained).train.shard == "hybrid"
    mounted = {one["mountPath"]: one["name"] for one in container["volumeMounts"]}
    out = trained[trained.index("--out") + 1]
    assert mounted[str(Path(out).parent)] in [one["name"] for one in pod["volumes"]]


def test_kubernetes_tells_mistakes_from_losses() -> None:
    _, job = kubernetes()
    rules = job["spec"]["podFailurePolicy"]["rules"]
    codes = {one["action"]: one["onExitCodes"]["values"] for one in rules if "onExitCodes" in one}
    assert codes == {"FailJob": [2], "Ignore": [75]}
    pod = job["spec"]["template"]["spec"]
    assert {one["onExitCodes"]["containerName"] for one in rules if "onExitCodes" in one} == {
        one["name"] for one in pod["containers"]
    }
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy asks for it
    grace = int(re.findall(r"GRACE:-(\d+)", (LAUNCH / "torchrun.sh").read_text())[0])
    assert pod["terminationGracePeriodSeconds"] > grace


def test_ray(bench: Bench) -> None:
    head, other, encode = usages(LAUNCH / "ray.sh")
    assert bench.run(head) == bench.run(other) == bench.run(encode) == 0
    token, *started = bench.calls("ray")
    assert token == ["get-auth-token", "--generate"]
    assert started[0][:3] == ["start", "--block", "--head"]
    assert started[0][3:5] == ["--port", "6379"]
    assert started[1] == ["start", "--block", "--address", "first-machine:6379"]
    import tyro

    (called,) = bench.calls("ddt")
    action = bound(tyro.cli, *_verb(called))
    assert action.keywords["engine"] == "ray"


def _verb(arguments: list[str]) -> tuple[str, list[str]]:
    verb, *rest = arguments
    kept, fields = split_fields(rest, OWN_OPTIONS[verb])
    assert not fields
    return verb, kept
