"""LoRA through the command line: one's own pictures, merged and beside, from any start."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_e2e_starts import equal, weights
from tiny_pipeline import Pipeline, pictures
from transformers import AutoConfig, AutoModelForCausalLM

import ddt_llama
from ddt_llama.checkpoint import load_tensors
from ddt_llama.cli import main
from ddt_llama.config import UserError
from ddt_llama.language import TextTokenizer
from ddt_llama.language.lora import Adapter

FIELDS = ["--train.batch=4", "--train.prefetch=0", "--train.tensorboard=false", "--train.ema=0.5"]
FIELDS += ["--train.optim.lr=0.05", "--train.optim.warmup=1", "--train.log-every=1"]


def command(start: Path, data: Path, out: Path, *fields: str, steps: int = 3) -> list[str]:
    given = ["--start", str(start), "--data", str(data), "--steps", str(steps)]
    return ["train", "lora", *given, "--out", str(out), *FIELDS, *fields]


def losses(run: Path) -> list[tuple[float, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["loss"], line["grad_norm"]) for line in lines]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("own") / "pictures")


@pytest.fixture(scope="module")
def run(pipeline: Pipeline, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lora") / "run"
    assert main(command(pipeline.instruct, data, out)) == 0
    return out


def test_merged_or_beside_the_model_it_draws_the_same_without_peft(
    pipeline: Pipeline, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    drawn = [tmp_path / f"{name}.png" for name in ("merged", "beside", "start")]
    ways = (
        [str(run)],
        [str(pipeline.instruct), "--adapter", str(run / "adapter")],
        [str(pipeline.instruct)],
    )
    for (model, *adapter), out in zip(ways, drawn, strict=True):
        assert main(["draw", model, "a plain picture", "--out", str(out), *adapter]) == 0
    merged, beside, start = (out.read_bytes() for out in drawn)
    assert merged == beside
    assert merged != start
    one, other = ddt_llama.load(run), ddt_llama.load(pipeline.instruct, adapter=run)
    assert one.history == other.history
    assert one.history.trainings is not None
    assert [known.recipe for known in one.history.trainings][-1] == "lora"
    assert one.settings == other.settings
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(one.language(ids).logits, other.language(ids).logits)


def test_an_adapter_is_exported_merged(pipeline: Pipeline, run: Path, tmp_path: Path) -> None:
    place = tmp_path / "plain"
    fields = ["--adapter", str(run), "--dtype", "float32"]
    assert main(["export", str(pipeline.instruct), str(place), *fields]) == 0
    opened = AutoModelForCausalLM.from_pretrained(place).state_dict()
    for name, weight in ddt_llama.load(run).language.state_dict().items():
        assert torch.equal(opened[name], weight)


def test_only_what_is_aimed_at_has_changed(pipeline: Pipeline, run: Path) -> None:
    before, after = weights(pipeline.instruct, "language"), weights(run, "language")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight")}
    assert equal(weights(pipeline.instruct, "tokenizer"), weights(run, "tokenizer"))


def test_the_first_loss_is_that_of_the_model_itself(
    pipeline: Pipeline, data: Path, run: Path, tmp_path: Path
) -> None:
    whole = command(pipeline.instruct, data, tmp_path / "whole", "--lora", "none", steps=1)
    assert main(whole) == 0
    assert losses(tmp_path / "whole")[0][0] == pytest.approx(losses(run)[0][0], rel=1e-6)
    assert not (tmp_path / "whole" / "adapter").exists()


def test_it_is_published_merged_or_alone(
    pipeline: Pipeline, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["publish", str(run), str(tmp_path / "whole")]) == 0
    assert main(["publish", str(run), str(tmp_path / "alone"), "--adapter"]) == 0
    one = ddt_llama.load(tmp_path / "whole")
    other = ddt_llama.load(pipeline.instruct, adapter=tmp_path / "alone")
    assert (one.settings, other.name) == (other.settings, "alone")
    size = sum(file.stat().st_size for file in (tmp_path / "alone").iterdir())
    assert size < sum(file.stat().st_size for file in (run / "adapter").iterdir())
    capsys.readouterr()
    assert main(["publish", str(pipeline.instruct), str(tmp_path / "no"), "--adapter"]) == 2
    assert "nothing of LoRA (no adapter in it)" in capsys.readouterr().err
    assert main(["draw", str(tmp_path / "alone"), "a picture"]) == 2
    assert "an adapter alone; give its model, with --adapter" in capsys.readouterr().err
    base = str(pipeline.pretrain)
    assert main(["draw", base, "a picture", "--adapter", str(run)]) == 2
    said = capsys.readouterr().err
    assert "an adapter of instruct, and the model given is another" in said
    assert said.count("\n") == 1
    with pytest.raises(UserError, match=r"has no adapter_config.json; give the folder of ddt"):
        ddt_llama.load(pipeline.instruct, adapter=pipeline.instruct)
    with pytest.raises(UserError, match="an image tokenizer alone; give instruct"):
        ddt_llama.load(pipeline.tokenizer, adapter=run)


def test_it_goes_on_without_its_start_as_if_never_stopped(
    pipeline: Pipeline, data: Path, run: Path, tmp_path: Path
) -> None:
    start, cut = tmp_path / pipeline.instruct.name, tmp_path / "cut"
    shutil.copytree(pipeline.instruct, start)
    assert main([*command(start, data, cut), "--minutes", "0"]) == 0
    assert not (cut / "FINISHED").exists()
    shutil.rmtree(start)
    assert main(command(start, data, cut)) == 0
    assert losses(cut) == losses(run)
    assert equal(weights(cut, "language"), weights(run, "language"))
    one, other = (load_tensors(place / "adapter/adapter_model.safetensors") for place in (cut, run))
    assert equal(one, other)
    kept = load_tensors(cut / "parts" / "language" / "model.safetensors")
    assert equal(kept, weights(pipeline.instruct, "language"))
    (cut / "adapter").rename(cut / ".adapter.old")  # a kill between two renames
    assert main(command(start, data, cut)) == 0
    assert (cut / "adapter/adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_a_kill_changes_no_loss(pipeline: Pipeline, data: Path, tmp_path: Path) -> None:
    fields = ["--train.checkpoint-every=1", "--lora.dropout=0.1", "--lora.rows=true"]
    whole = command(pipeline.instruct, data, tmp_path / "whole", *fields, steps=40)
    cut = command(pipeline.instruct, data, tmp_path / "cut", *fields, steps=40)
    assert main(whole) == 0
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    child = subprocess.Popen(
        [sys.executable, "-m", "ddt_llama", *cut],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not list((tmp_path / "cut").glob("checkpoints/step-0000000[3-9]/COMPLETE")):
        assert child.poll() is None, "it was done before it was killed"
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "cut" / "FINISHED").exists()
    assert main(cut) == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert equal(weights(tmp_path / "cut", "language"), weights(tmp_path / "whole", "language"))


def test_edits_teach_editing(pipeline: Pipeline, tmp_path: Path) -> None:
    folder = tmp_path / "edits"
    folder.mkdir()
    for number in range(6):
        picture = Image.linear_gradient("L").rotate(60 * number)
        picture.save(folder / f"{number}.src.png")
        picture.rotate(90).save(folder / f"{number}.tgt.png")
        (folder / f"{number}.txt").write_text("turn it")
    assert main(command(pipeline.instruct, folder, tmp_path / "run", "--train.batch=8")) == 0
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert math.isfinite(line["loss.edit"])
    out = ["--out", str(tmp_path / "edited.png")]
    assert main(["edit", str(tmp_path / "run"), str(folder / "0.src.png"), "turn it", *out]) == 0


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2"])
def test_any_causal_model_learns_beside_its_weights(
    family: str,
    pipeline: Pipeline,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = TextTokenizer.train(["a plain picture", "number 1 2 3 4 5"], 300)
    config = AutoConfig.for_model(
        family,
        vocab_size=text.size + 5,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    given = tmp_path / "given"
    AutoModelForCausalLM.from_config(config).save_pretrained(given)
    text.save(given)
    train = command(given, data, tmp_path / "run", "--tokenizer", str(pipeline.tokenizer))
    assert main(train) == 2
    assert "random rows for marks and codes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main([*train, "--lora.rows", "true"]) == 0
    grown = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "release" / "language")
    first = AutoModelForCausalLM.from_pretrained(given)
    tables = [one.get_input_embeddings().weight for one in (grown, first)]
    assert torch.equal(tables[0][: text.size + 5], tables[1])
    # The adapter alone belongs to the grown model, which the run has kept.
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "parts" / "language")
    Adapter.read(tmp_path / "run" / "adapter").merge_into(kept.state_dict())
    assert equal(dict(kept.state_dict()), dict(grown.state_dict()))
    out = tmp_path / "drawn.png"
    assert main(["draw", str(tmp_path / "run"), "a plain picture", "--out", str(out)]) == 0
