"""From nothing to pictures through the command line, on shapes and on a folder of pictures."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_pipeline import LANGUAGE, TOKENIZER, Pipeline, pictures, train_all

import ddt_llama
from ddt_llama.checkpoint import load_tensors
from ddt_llama.cli import main
from ddt_llama.evaluation.shapes_suite import Tuned
from ddt_llama.generation.model import Model
from ddt_llama.generation.settings import Settings
from ddt_llama.recipes import publish
from ddt_llama.training.timestep import TimestepObjective


def losses(run: Path) -> dict[int, float]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records}


def test_a_run_leaves_what_it_says(pipeline: Pipeline) -> None:
    for run, stage in ((pipeline.pretrain, "pretrain"), (pipeline.instruct, "instruct")):
        described = json.loads((run / "release" / "config.json").read_text())
        assert (described["format"], described["stage"]) == ("ddt-llama", stage)
        assert (run / "samples" / "step-00000003.png").is_file()
    assert not (pipeline.tokenizer / "release" / "language").exists()
    assert set(losses(pipeline.instruct)) == {3}
    assert not list(pipeline.instruct.glob(".release*"))


def test_the_parts_of_a_run_are_its_own(pipeline: Pipeline) -> None:
    """The tokenizer travels from run to run, so that codes keep their meaning."""
    weights = "tokenizer/model.safetensors"
    first = (pipeline.tokenizer / "release" / weights).read_bytes()
    for run in (pipeline.pretrain, pipeline.instruct):
        assert (run / "release" / weights).read_bytes() == first
        assert (run / "parts" / weights).read_bytes() == first


def test_drawing_depends_on_the_seed_alone(pipeline: Pipeline, tmp_path: Path) -> None:
    model = str(pipeline.instruct)
    several = ["draw", model, "a red circle", "--num", "2", "--seed", "5"]
    assert main([*several, "--out", str(tmp_path / "a.png")]) == 0
    alone = ["draw", model, "a red circle", "--seed", "6", "--out", str(tmp_path / "b.png")]
    assert main(alone) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-1.png", "a-2.png", "b.png"]
    assert (tmp_path / "a-2.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "b.png") as drawn:
        assert drawn.size == (64, 64)


@pytest.mark.parametrize("prompt", ["دائرة حمراء", "a 🔴 above a 🟦", "x"])
def test_any_script_is_a_prompt(pipeline: Pipeline, tmp_path: Path, prompt: str) -> None:
    out = tmp_path / "drawn.png"
    assert main(["draw", str(pipeline.pretrain), prompt, "--out", str(out)]) == 0
    assert out.is_file()


def test_edit_ask_and_describe(
    pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, picture, out = str(pipeline.instruct), str(pipeline.picture), tmp_path / "edited.png"
    assert main(["edit", model, picture, "make it green", "--out", str(out)]) == 0
    assert out.is_file()
    capsys.readouterr()
    assert main(["ask", model, picture, "how many circles are there?"]) == 0
    assert main(["describe", model, picture]) == 0
    assert capsys.readouterr().out.count("\n") >= 2


def test_reconstruct_takes_every_kind_of_picture(pipeline: Pipeline, tmp_path: Path) -> None:
    """Animations give their first frame, transparency lies on white, 16 bits are scaled."""
    base = Image.radial_gradient("L").resize((48, 48))
    frames = [base.convert("P"), Image.new("P", (48, 48))]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    base.convert("RGBA").save(tmp_path / "clear.png")
    Image.new("I;16", (48, 48), 40_000).save(tmp_path / "deep.png")
    files = [str(tmp_path / name) for name in ("moving.gif", "clear.png", "deep.png")]
    out = tmp_path / "out"
    assert main(["reconstruct", str(pipeline.tokenizer), *files, "--out", str(out)]) == 0
    names = {path.name for path in out.iterdir()}
    assert names == {"moving.png", "clear.png", "deep.png", "sheet.png"}
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.size == (3 * 66 - 2, 4 * 66 - 2)  # originals, then 1, 4 and 8 tokens


def test_a_language_model_learns_the_same_from_codes_as_from_pictures(
    pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, codes = pictures(tmp_path / "data"), tmp_path / "codes"
    (data / "broken.png").write_bytes(b"nothing")
    command = ["encode", str(pipeline.tokenizer), str(data), str(codes), "--shard-rows", "4"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert f"{codes}: codes of 6 rows, 1 skipped ({codes / 'manifest.jsonl'} says why)" in said
    (data / "broken.png").unlink()
    learned = []
    for number, given in enumerate((data, codes)):
        run = tmp_path / str(number)
        train = ["train", "nano_pretrain", "--tokenizer", str(pipeline.tokenizer), *LANGUAGE]
        fields = ["--data", str(given), "--data.held-out", "0.34", "--train.log_every=1"]
        assert main([*train, *fields, "--steps", "3", "--out", str(run)]) == 0
        learned.append(losses(run))
        assert (run / "samples" / "step-00000003.png").is_file()
    assert learned[0] == learned[1]
    assert len(learned[0]) == 3
    (tmp_path / "data").rename(tmp_path / "gone")  # pictures are needed no more
    train = ["train", "nano_instruct", "--start", str(tmp_path / "1"), "--data", str(codes)]
    assert main([*train, *LANGUAGE, "--steps", "2", "--out", str(tmp_path / "taught")]) == 0
    assert main(["publish", str(tmp_path / "taught"), str(tmp_path / "mine")]) == 0


def test_codes_of_another_tokenizer_are_refused(
    pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, codes = pictures(tmp_path / "data"), tmp_path / "codes"
    assert main(["encode", str(pipeline.tokenizer), str(data), str(codes)]) == 0
    other = tmp_path / "other"
    command = ["train", "nano_tokenizer", *TOKENIZER, "--steps", "1", "--train.seed", "1"]
    assert main([*command, "--out", str(other)]) == 0
    capsys.readouterr()
    train = ["train", "nano_pretrain", "--tokenizer", str(other), "--data", str(codes), *LANGUAGE]
    assert main([*train, "--steps", "1", "--out", str(tmp_path / "run")]) == 2
    line = capsys.readouterr().err
    for tokenizer in (pipeline.tokenizer, other):
        assert ddt_llama.load(tokenizer / "release").tokenizer.fingerprint() in line
    assert "holds codes of nano_tokenizer" in line
    assert str(other) in line
    assert not (tmp_path / "run").exists()
    learn = ["train", "nano_tokenizer", "--data", str(codes), "--out", str(tmp_path / "run")]
    assert main([*learn, *TOKENIZER]) == 2
    assert "pictures are needed here" in capsys.readouterr().err


def test_evaluate_and_report(pipeline: Pipeline, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    sizes = ["--scenes", "8", "--steps=1,2", "--codebook-scenes=40"]
    command = ["evaluate", str(pipeline.instruct), "--suite", "reconstruction"]
    assert main([*command, "--json", str(file), *sizes]) == 0
    figures = json.loads(file.read_text())
    assert figures["reconstruction.psnr.2.low"] <= figures["reconstruction.psnr.2"]
    assert main(["report", str(pipeline.instruct)]) == 0
    assert "step-00000003.png" in (pipeline.instruct / "report.html").read_text()


def test_every_line_of_the_bench_is_measured(
    pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bench.json"
    assert main(["bench", str(pipeline.instruct), "--quick", "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    for name in (
        "draw.b1.vs_plain",
        "draw.b8.vs_plain",
        "draw.b8.vs_transformers",
        "decode.fast.vs_all_steps",
        "decode.kept_tokens.vs_each_step",
        "encode.vs_bare",
        "token.b1.vs_bandwidth",
        "prefill.b8.vs_bandwidth",
        "draw.b8.vs_no_preview",
        "weights.large.float32.b8.seconds",
        "documents.late_codes.vs_laid_out",
        "train.language.vs_products",
        "train.tokenizer.vs_products",
    ):
        assert figures[f"bench.{name}"] > 0
    assert figures["bench.draw.b1.same_codes"] == 1
    assert figures["bench.draw.command.seconds"] > figures["bench.draw.b1.seconds"]
    assert figures["bench.render.images_per_second"] > 100
    assert "times as fast as two full forwards a token" in capsys.readouterr().out
    assert main(["bench", str(pipeline.tokenizer), "--quick"]) == 2
    assert "no language model" in capsys.readouterr().err


def test_evaluate_on_pictures(
    pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = pictures(tmp_path / "data")
    command = ["evaluate", str(pipeline.tokenizer), "--suite", "reconstruction", "--steps=1"]
    file = tmp_path / "figures.json"
    assert main([*command, "--data", str(data), "--json", str(file)]) == 0
    assert json.loads(file.read_text())["reconstruction.scenes"] == 6
    part = ["--split", "val", "--data.held-out", "0.34"]
    assert main([*command, "--data", str(data), *part, "--json", str(file)]) == 0
    assert json.loads(file.read_text())["reconstruction.scenes"] == 2
    assert "pictures of a training may be among them" in capsys.readouterr().out
    codes = tmp_path / "codes"
    assert main(["encode", str(pipeline.tokenizer), str(data), str(codes), *part]) == 0
    assert "codes of 2 rows" in capsys.readouterr().out


def test_the_demonstration_is_one_page(pipeline: Pipeline, tmp_path: Path) -> None:
    data = pictures(tmp_path / "mine")
    (data / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    out = tmp_path / "demo"
    command = ["demo", "--model", str(pipeline.instruct), "--images", str(data)]
    assert main([*command, "--out", str(out)]) == 0
    page = (out / "index.html").read_text()
    results = json.loads((out / "results.json").read_text())
    counts = {name: len(results[name]) for name in ("drawn", "reconstructed", "edited", "asked")}
    assert counts == {"drawn": 8, "reconstructed": 8 + 6, "edited": 3, "asked": 6}
    assert 'src="pictures/' not in page  # pictures are inside
    assert page.count("data:image/png") >= 8 + 14 * 4 + 6 + 6
    assert results["figures"].keys() >= {
        "drawn.right",
        "scenes.visible.psnr.8",
        "pictures.visible.psnr.8",
    }
    assert results["timings"]["all together"] > 0


def test_training_on_a_folder_of_pictures(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data")
    trained = train_all(tmp_path / "runs", (str(data),))
    out = tmp_path / "drawn.png"
    assert main(["draw", str(trained.instruct), "a plain picture", "--out", str(out)]) == 0
    assert out.is_file()


def test_a_published_model_is_small_and_tuned(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "best_steps", lambda *_: 5)
    tuned = Settings(guidance_scale=2.5, temperature=0.7, steps=5)

    def tune_editing(model: Model) -> tuple[Settings, Tuned]:
        return replace(model.settings, edit_temperature=0.25), {}

    monkeypatch.setattr(publish, "tune_drawing", lambda _: (tuned, {}))
    monkeypatch.setattr(publish, "tune_editing", tune_editing)
    monkeypatch.setattr(publish, "tune_words", lambda model: (model.settings, {}))
    folder = tmp_path / "mini"
    assert main(["publish", str(pipeline.instruct), str(folder)]) == 0
    model = ddt_llama.load(folder)
    assert (model.name, model.settings) == ("mini", replace(tuned, edit_temperature=0.25))
    for part in ("tokenizer", "language"):
        weights = (folder / part / "model.safetensors").stat().st_size
        full = (pipeline.instruct / "release" / part / "model.safetensors").stat().st_size
        assert weights < 0.6 * full
    assert main(["draw", str(folder), "a red circle", "--out", str(tmp_path / "a.png")]) == 0
    assert main(["publish", str(pipeline.instruct), str(pipeline.instruct / "samples")]) == 2
    (folder / "notes.txt").write_text("mine")
    assert main(["publish", str(pipeline.instruct), str(folder)]) == 2
    assert main(["publish", str(tmp_path), str(tmp_path / "other")]) == 2
    assert (folder / "notes.txt").read_text() == "mine"
    smaller = tmp_path / "smaller"
    assert main(["publish", str(pipeline.instruct), str(smaller), "--bits", "8"]) == 0
    assert main(["draw", str(smaller), "a red circle", "--out", str(tmp_path / "b.png")]) == 0


def test_what_knows_no_shapes_is_published_with_settings_that_drew_best_elsewhere(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "best_steps", lambda *_: 5)
    run = Path(shutil.copytree(pipeline.instruct, tmp_path / "run"))
    config = json.loads((run / "config.json").read_text())
    config["data"]["paths"] = [str(pictures(tmp_path / "mine"))]
    (run / "config.json").write_text(json.dumps(config))
    assert main(["publish", str(run), str(tmp_path / "mini")]) == 0
    settings = ddt_llama.load(tmp_path / "mini").settings
    assert (settings.guidance_scale, settings.temperature, settings.steps) == (1.5, 0.6, 5)


def test_a_finished_run_is_left_alone(pipeline: Pipeline) -> None:
    before = (pipeline.tokenizer / "release" / "config.json").stat().st_mtime_ns
    again = ["train", "nano_tokenizer", "--steps", "3", "--out", str(pipeline.tokenizer)]
    assert main([*again, *TOKENIZER]) == 0
    assert (pipeline.tokenizer / "release" / "config.json").stat().st_mtime_ns == before


def test_a_release_lost_between_two_renames_is_put_back(
    pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(pipeline.tokenizer, tmp_path / "run"))
    (run / "release").rename(run / ".release.old")
    again = ["train", "nano_tokenizer", "--steps", "3", "--out", str(run), *TOKENIZER]
    assert main(again) == 0
    assert (run / "release" / "config.json").is_file()
    assert not (run / ".release.old").exists()
    metrics = (run / "metrics.jsonl").read_bytes()
    shutil.rmtree(run / "checkpoints")  # to have room: longer is no more to be had, as before is
    assert main([*again, "--steps", "9"]) == 2
    assert "its states (checkpoints/) are gone" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == metrics


def test_minutes_end_a_run_that_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ["train", "nano_tokenizer", "--steps", "4", "--out", str(run), *TOKENIZER]
    assert main([*command, "--minutes", "0"]) == 0
    assert not (run / "FINISHED").exists()
    assert (run / "release" / "config.json").is_file()
    assert main(command) == 0
    assert (run / "FINISHED").exists()
    more = ["--steps", "6", "--minutes", "0"]  # the last of equal options counts
    assert main([*command, *more]) == 0
    assert not (run / "FINISHED").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_ctrl_c_and_preemption_keep_the_step(
    number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = TimestepObjective.before_step

    def interrupted(self: TimestepObjective, model: object, step: int) -> None:
        if step == 1:
            signal.raise_signal(number)
        plain(self, model, step)

    run = tmp_path / "run"
    command = ["train", "nano_tokenizer", "--steps", "4", "--out", str(run), *TOKENIZER]
    with monkeypatch.context() as patch:
        patch.setattr(TimestepObjective, "before_step", interrupted)
        assert main(command) == code
    assert (run / "checkpoints" / "step-00000002" / "COMPLETE").is_file()
    assert main(command) == 0


def test_a_killed_run_goes_on_with_the_same_losses(pipeline: Pipeline, tmp_path: Path) -> None:
    """SIGKILL after a checkpoint; the language stage, whose stream encodes pictures on the fly."""
    fields = [*LANGUAGE, "--train.log_every=1", "--train.checkpoint_every=2", "--steps", "8"]
    fields += ["--tokenizer", str(pipeline.tokenizer), "--data.scenes=12"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(["train", "nano_pretrain", "--out", str(whole), *fields]) == 0
    command = [sys.executable, "-m", "ddt_llama.cli", "train", "nano_pretrain", *fields]
    # Slow enough to be caught: the second logged step waits for the kill.
    script = "import os, runpy, sys, time; import ddt_llama.runs as r; log = r.Run.log\n"
    script += "def slow(self, record): log(self, record); time.sleep(99 * (record['step'] == 5))\n"
    script += "r.Run.log = slow; sys.argv = sys.argv[1:]; runpy.run_module('ddt_llama.cli')"
    killed = subprocess.Popen(
        [sys.executable, "-c", script, "ddt", *command[3:], "--out", str(cut)],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 60
        while 5 not in (losses(cut) if (cut / "metrics.jsonl").exists() else {}):
            assert killed.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        killed.kill()
        killed.wait()
    assert not (cut / "FINISHED").exists()
    assert main(["train", "nano_pretrain", "--out", str(cut), *fields]) == 0
    assert losses(cut) == losses(whole)


@pytest.mark.slow
def test_torchrun_goes_on_from_a_tokenizer_with_a_larger_codebook(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    """The words of scripts/speedrun.sh: without "--" torchrun takes --start for its own."""
    run = tmp_path / "run"
    fields = [field.replace("codebook_size=32", "codebook_size=40") for field in TOKENIZER]
    words = ["--standalone", "--nproc-per-node", "2", "-m", "--", "ddt_llama", "train"]
    given = [
        "nano_tokenizer",
        "--steps",
        "4",
        "--start",
        str(pipeline.tokenizer),
        "--out",
        str(run),
        *fields,
    ]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words, *given],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "model of step 4" in done.stdout + done.stderr
    before = ddt_llama.load(pipeline.tokenizer).tokenizer.code_vectors()
    after = ddt_llama.load(run).tokenizer.code_vectors()
    assert (before.shape[0], after.shape[0]) == (32, 40)
    torch.testing.assert_close(after.norm(dim=-1), torch.ones(40))


@pytest.mark.slow
def test_a_model_in_shards_is_saved_whole(pipeline: Pipeline, tmp_path: Path) -> None:
    """Begun by two processes in shards; goes on, and draws, in one."""
    run = tmp_path / "run"
    fields = [*LANGUAGE, "--tokenizer", str(pipeline.tokenizer), "--train.log_every=1"]
    command = ["train", "nano_pretrain", "--out", str(run), *fields]
    words = ["--standalone", "--nproc-per-node", "2", "-m", "--", "ddt_llama", *command]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words, "--steps=2", "--train.shard=full"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    state = run / "checkpoints" / "step-00000002"
    assert len(list(state.glob("*.safetensors"))) == 2  # one a process
    drawn = ["draw", str(run), "a red circle", "--out", str(tmp_path / "drawn.png")]
    assert main(drawn) == 0
    saved = ddt_llama.load(run).language.state_dict()
    assert main([*command, "--steps", "3"]) == 0
    assert set(losses(run)) == {1, 2, 3}
    gone_on = ddt_llama.load(run).language.state_dict()
    assert all(saved[name].shape == tensor.shape for name, tensor in gone_on.items())
    assert any(not torch.equal(saved[name], tensor) for name, tensor in gone_on.items())


def test_a_decoder_is_trained_while_the_codes_keep_their_meaning(
    pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train = ["train", "nano_tokenizer", "--keep-codes", "true", "--out", str(run)]
    assert main([*train, "--steps", "2", *TOKENIZER]) == 2
    assert "give --start RUN" in capsys.readouterr().err
    given = ["--start", str(pipeline.tokenizer), "--objective.round-from", "0"]
    assert main([*train, *given, "--objective.round-until", "1", "--steps", "2", *TOKENIZER]) == 0
    before, after = (
        load_tensors(path / "release" / "tokenizer" / "model.safetensors")
        for path in (pipeline.tokenizer, run)
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith("decoder.") for name in moved)
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["error"] > 0
