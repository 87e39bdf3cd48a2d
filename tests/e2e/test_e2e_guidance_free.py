"""The alignment through the command line: trained, stopped, gone on with, drawn from, published."""

import json
import math
import shutil
from pathlib import Path

import pytest
from test_e2e_lora import losses
from test_e2e_starts import equal, weights
from tiny_pipeline import Pipeline, pictures

import ddt_llama
from ddt_llama.cli import main
from ddt_llama.training.alignment import AlignmentConfig

FIELDS = ["--train.batch=8", "--train.prefetch=0", "--train.tensorboard=false", "--train.ema=0.5"]
FIELDS += ["--train.optim.lr=0.01", "--train.optim.warmup=1", "--train.log-every=1"]


def command(start: Path, out: Path, *fields: str, steps: int = 3) -> list[str]:
    given = ["--start", str(start), "--steps", str(steps), "--out", str(out)]
    return ["train", "guidance_free", *given, *FIELDS, *fields]


@pytest.fixture(scope="module")
def run(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("aligned") / "run"
    assert main(command(pipeline.instruct, out)) == 0
    return out


def test_it_is_one_stage_of_the_loop(pipeline: Pipeline, run: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    weight = AlignmentConfig().weight
    first = (1 + weight) * math.log(2) / max(weight, 1)
    assert lines[0]["loss.contrast"] == pytest.approx(first, rel=1e-3)
    assert lines[0]["r.own"] == pytest.approx(0, abs=0.01)
    assert lines[-1]["r.other"] < -0.1
    assert not equal(weights(pipeline.instruct, "language"), weights(run, "language"))
    assert equal(weights(pipeline.instruct, "tokenizer"), weights(run, "tokenizer"))
    model = ddt_llama.load(run)
    assert model.settings.guidance_scale == 1
    assert model.history.trainings is not None
    assert model.history.trainings[-1].recipe == "guidance_free"
    assert main(["draw", str(run), "a red circle", "--out", str(tmp_path / "drawn.png")]) == 0


def test_it_goes_on_without_its_start_as_if_never_stopped(
    pipeline: Pipeline, run: Path, tmp_path: Path
) -> None:
    start, cut = tmp_path / pipeline.instruct.name, tmp_path / "cut"
    shutil.copytree(pipeline.instruct, start)
    assert main([*command(start, cut), "--minutes", "0"]) == 0
    assert not (cut / "FINISHED").exists()
    shutil.rmtree(start)
    assert main(command(start, cut)) == 0
    assert losses(cut) == losses(run)
    assert equal(weights(cut, "language"), weights(run, "language"))


def test_own_pictures_are_published_without_guidance(pipeline: Pipeline, tmp_path: Path) -> None:
    data, out = pictures(tmp_path / "pictures"), tmp_path / "run"
    given = ["--data", str(data), "--alignment.kinds", "draw"]
    train = command(pipeline.instruct, out, *given)
    assert main(train) == 0
    assert main(["publish", str(out), str(tmp_path / "own")]) == 0
    assert ddt_llama.load(tmp_path / "own").settings.guidance_scale == 1


def test_shards_are_refused_in_one_line(
    pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(pipeline.instruct, tmp_path / "run", "--train.shard", "full")) == 2
    said = capsys.readouterr().err
    assert "train.shard: given full, allowed with an alignment is none" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()
