"""What goes wrong while a training runs: one line, exit code 2, nothing lost, and on it goes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_pipeline import LANGUAGE, TOKENIZER, Pipeline, pictures

from ddt_llama.cli import main
from ddt_llama.runs import lock_folder

EVERY_STEP = ["--train.log_every=1", "--train.checkpoint_every=1", "--train.sample_every=1000000"]


def steps(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


@contextmanager
def under_way(command: list[str], run: Path) -> Iterator[Callable[[int], None]]:
    """Train without an end in another process, and tell it to stop afterwards.

    Gives what waits for so many steps more; enters after the first ones.
    """
    training = subprocess.Popen(
        [sys.executable, "-m", "ddt_llama", *command, "--steps", "1000000", *EVERY_STEP],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def wait_for(more: int) -> None:
        wanted = len(steps(run)) + more
        while len(steps(run)) < wanted:
            assert training.poll() is None
            time.sleep(0.05)

    try:
        wait_for(3)
        yield wait_for
        training.send_signal(signal.SIGTERM)
        assert training.wait() == 0
    finally:
        training.kill()
        training.wait()


def refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(command) == 2
    said = capsys.readouterr().err.splitlines()
    # Bars of `datasets` come before it, where another test imported it before the command line.
    assert [line for line in said if line.startswith(("error: ", "Traceback"))] == said[-1:]
    return said[-1]


@pytest.mark.slow
def test_a_second_run_in_one_folder_is_refused_and_the_first_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = ["train", "nano_tokenizer", *TOKENIZER, "--out", str(run)]
    with under_way(command, run) as wait_for:
        again = [*command, "--steps", "1000000", *EVERY_STEP]
        assert f"{run}: another process is training here; stop it" in refused(again, capsys)
        wait_for(3)
    done = steps(run)
    assert done == list(range(1, len(done) + 1))
    assert (run / f"checkpoints/step-{len(done):08d}/COMPLETE").is_file()


def test_who_is_refused_leaves_the_release_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first may stand between the two renames that put a new release in its place."""
    run = tmp_path / "run"
    command = ["train", "nano_tokenizer", *TOKENIZER, "--steps", "2", "--out", str(run)]
    assert main([*command, "--minutes", "0"]) == 0
    old = run / ".release.old"
    (run / "release").rename(old)
    with lock_folder(run, "is training"):
        assert "is training here" in refused(command, capsys)
        assert old.is_dir()
        assert not (run / "release").exists()
    assert main(command) == 0
    assert (run / "release" / "config.json").is_file()


def tars(folder: Path, place: Path) -> Path:
    """Pack pictures into shards of two."""
    place.mkdir()
    for number, picture in enumerate(sorted(folder.glob("*.png"))):
        with tarfile.open(place / f"{number // 2:05}.tar", "a") as shard:
            shard.add(picture, picture.name)
    return place


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["codes", "tar"])
def test_a_shard_deleted_under_way(
    kind: str, pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who has opened it reads on, from a copy; who opens it again is told."""
    run, folder = tmp_path / "run", pictures(tmp_path / "pictures")
    if kind == "codes":
        data = tmp_path / "codes"
        encode = ["encode", str(pipeline.tokenizer), str(folder), str(data), "--shard-rows", "2"]
        assert main(encode) == 0
        command = ["train", "nano_pretrain", "--tokenizer", str(pipeline.tokenizer), *LANGUAGE]
    else:
        data = tars(folder, tmp_path / "shards")
        command = ["train", "nano_tokenizer", *TOKENIZER]
    command += ["--data", str(data), "--data.cache_dir", str(tmp_path / "cache")]
    command += ["--out", str(run)]
    shard = sorted(data.glob("*0001.*"))[0]
    with under_way(command, run) as wait_for:
        shard.rename(tmp_path / shard.name)
        wait_for(20)
    reached = len(steps(run))
    again = [*command, "--steps", "1000000", "--minutes", "0", *EVERY_STEP]
    before = {path.name for path in (run / "checkpoints").iterdir()}
    told = refused(again, capsys)
    if kind == "codes":
        assert f"{shard} is gone or was changed; the same ddt encode as before goes on" in told
    else:
        assert f"data: {data} holds 2 files of" in told
        assert "and held 3 files of" in told
    assert {path.name for path in (run / "checkpoints").iterdir()} == before
    shutil.move(tmp_path / shard.name, shard)
    assert main(again) == 0
    assert steps(run) == list(range(1, reached + 2))


def test_a_picture_deleted_between_two_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is left would come in another order, so that it would be another training."""
    run, data = tmp_path / "run", pictures(tmp_path / "data")
    command = ["train", "nano_tokenizer", *TOKENIZER, "--data", str(data), "--out", str(run)]
    command += ["--steps", "9", "--minutes", "0"]
    assert main(command) == 0
    (data / "3.png").rename(tmp_path / "3.png")
    told = refused(command, capsys)
    assert f"data: {data} holds 5 pictures, and held 6 pictures when this training began" in told
    (tmp_path / "3.png").rename(data / "3.png")
    assert main(command) == 0
