"""Every probe through the command line, on a model of seconds: it runs, writes all, goes on."""

import json
import time
from pathlib import Path

import pytest
from tiny_pipeline import Pipeline

from ddt_llama.cli import main
from ddt_llama.probes.named import PROBES

MOST = 180  # seconds of --quick


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBES)
def test_a_probe_leaves_what_a_reader_needs_and_is_not_done_twice(
    pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    out = tmp_path / name
    command = ["probe", name, str(pipeline.instruct), "--quick", "--out", str(out)]
    begun = time.monotonic()
    assert main(command) == 0
    assert time.monotonic() - begun < MOST
    figures = json.loads((out / "figures.json").read_text())
    assert figures
    assert {key for key in figures if f"{key}.low" in figures}
    page = (out / "README.md").read_text()
    verdict = page.splitlines()[2]
    assert verdict.startswith("(Quick: proves the machinery only.) ")
    assert verdict in capsys.readouterr().out
    assert "| figure | value | 95 % interval |" in page
    pictures = [line.rpartition("(")[2].rstrip(")") for line in page.splitlines() if "![" in line]
    assert pictures
    assert all((out / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)
    curves = (out / "metrics.jsonl").read_text().splitlines()
    assert curves
    assert all(
        any({"plot", *kind} < set(point) for kind in (("curve",), ("row", "value"), ("law of",)))
        for point in map(json.loads, curves)
    )
    written = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    written |= {path: path.stat().st_mtime_ns for path in out.glob("parts/*.json")}
    assert written
    assert main(command) == 0
    assert all(path.stat().st_mtime_ns == at for path, at in written.items())
    assert (out / "README.md").read_text() == page
    other = [*command, "--seeds", "7"]
    assert main(other) == 2
    assert "another probe" in capsys.readouterr().err
