"""Every probe through the command line, on a model of seconds: it runs, writes all, goes on."""

import json
from pathlib import Path

import pytest
from tiny_pipeline import Pipeline

from ddt_llama.cli import main
from ddt_llama.probes.named import PROBES

LESSON = [
    "--course.train.steps",
    "2",
    "--course.train.batch",
    "4",
    "--course.train.sample-every",
    "1",
]
LESSON += [
    "--course.shape.dim",
    "16",
    "--course.shape.depth",
    "1",
    "--course.train.optim.warmup",
    "1",
]
SEQUENCES = [*LESSON, "--pictures", "60", "--held-out", "30", "--seeds", "0,1"]
VARIANTS = [*SEQUENCES, "--recipe.train.steps", "1", "--recipe.train.batch", "4", "--scenes", "2"]
VARIANTS += ["--drawn", "0", "--steps", "1"]
LEVELS = ["--scenes", "2", "--levels", "4", "--steps", "1", "--seeds", "0,1"]
SCALING = [*LESSON, "--amounts", "4,8", "--held-out", "4", "--drawn", "0", "--seeds", "0"]
FIELDS = {
    "shuffle": SEQUENCES,
    "entropy": SEQUENCES,
    "synergy": SEQUENCES,
    "prefix": LEVELS,
    "swap": LEVELS,
    "length": VARIANTS,
    "ablate": VARIANTS,
    "scaling": SCALING,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBES)
def test_a_probe_leaves_what_a_reader_needs_and_is_not_done_twice(
    pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    out = tmp_path / name
    command = ["probe", name, str(pipeline.instruct), "--out", str(out), *FIELDS[name]]
    assert main(command) == 0
    figures = json.loads((out / "figures.json").read_text())
    assert figures
    assert {key for key in figures if f"{key}.low" in figures}
    page = (out / "README.md").read_text()
    verdict = page.splitlines()[2]
    assert verdict in capsys.readouterr().out
    assert "| figure | value | 95 % interval |" in page
    pictures = [line.rpartition("(")[2].rstrip(")") for line in page.splitlines() if "![" in line]
    assert pictures
    assert all((out / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)
    curves = (out / "metrics.jsonl").read_text().splitlines()
    assert all({"plot", "curve"} < set(json.loads(line)) for line in curves)
    written = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    written |= {path: path.stat().st_mtime_ns for path in out.glob("parts/*.json")}
    assert written
    assert main(command) == 0
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    assert (out / "README.md").read_text() == page
    other = [*command, "--seeds", "0,1,2"]
    assert main(other) == 2
    assert "another probe" in capsys.readouterr().err
