"""A renderer through the command line: behind a whole model, cut short, carried on, published."""

import shutil
from pathlib import Path

import pytest
import torch
from tiny_pipeline import LANGUAGE, TOKENIZER, Pipeline

import ddt_llama
from ddt_llama.cli import main
from ddt_llama.config import load_json
from ddt_llama.evaluation.bench import decoding, scenes
from ddt_llama.evaluation.metrics import psnr

PLAIN = ["--train.batch=4", "--train.prefetch=0", "--train.tensorboard=false"]
RENDERER = Path("tokenizer", "renderer.safetensors")
ROOT = Path(__file__).resolve().parents[2]


def train(start: Path, out: Path, *fields: str) -> int:
    command = ["train", "nano_renderer", "--start", str(start), *PLAIN, "--steps", "4"]
    return main([*command, "--out", str(out), *fields])


def files(release: Path) -> dict[Path, bytes]:
    found = (path for path in release.rglob("*") if path.is_file())
    return {path.relative_to(release): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def rendered(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a renderer behind the whole model."""
    run = tmp_path_factory.mktemp("renderer") / "run"
    assert train(pipeline.instruct, run) == 0
    return run


def test_all_else_of_the_start_comes_along(pipeline: Pipeline, rendered: Path) -> None:
    before, after = files(pipeline.instruct / "release"), files(rendered / "release")
    assert after.keys() - before.keys() == {RENDERER}
    assert {name for name in before if before[name] != after[name]} == {
        Path("config.json"),
        Path("README.md"),
    }
    one, other = (
        load_json(run / "release" / "config.json") for run in (pipeline.instruct, rendered)
    )
    assert other["generation"] == {**one["generation"], "steps": 0}
    assert other["trainings"][:-1] == one["trainings"]
    last = other["trainings"][-1]
    assert (last["part"], last["recipe"], last["samples"]) == ("tokenizer", "nano_renderer", 16)
    assert (rendered / "samples" / "step-00000004.png").is_file()


def test_the_model_draws_and_rebuilds_by_it(
    rendered: Path, pipeline: Pipeline, tmp_path: Path
) -> None:
    for name, fields in (
        ("a", []),
        ("b", ["--steps", "0", "--seed", "0"]),
        ("c", ["--steps", "1"]),
    ):
        out = ["--out", str(tmp_path / f"{name}.png")]
        assert main(["draw", str(rendered), "a red circle", *fields, *out]) == 0
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c
    out = tmp_path / "back"
    assert main(["reconstruct", str(rendered), str(pipeline.picture), "--out", str(out)]) == 0
    suite = ["--suite", "reconstruction", "--scenes", "4", "--steps=0,1", "--codebook-scenes=20"]
    file = tmp_path / "figures.json"
    assert main(["evaluate", str(rendered), *suite, "--json", str(file)]) == 0
    figures = load_json(file)
    assert figures["reconstruction.psnr.0"] != figures["reconstruction.psnr.1"]


def test_the_bench_takes_it_for_the_fast_way(rendered: Path) -> None:
    model = ddt_llama.load(rendered)
    figures = decoding(model, 1)
    for what in ("vs_all_steps", "db_less"):
        assert figures[f"decode.fast.{what}"] == figures[f"decode.renderer.{what}"]
    images = scenes(model)
    codes, most = model.encode(images), model.tokenizer.num_tokens
    few, all_steps = (
        psnr(model.decode(codes, range(len(codes)), steps), images).mean() for steps in (0, most)
    )
    assert figures["decode.renderer.db_less"].value == pytest.approx(
        float(all_steps - few), abs=1e-4
    )


def test_without_one_it_says_how_to_get_one(
    pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--steps", "0", "--out", str(tmp_path / "out.png")]
    assert main(["draw", str(pipeline.instruct), "a red circle", *place]) == 2
    told = capsys.readouterr().err
    assert "steps is 0" in told
    assert "ddt train nano_renderer --start" in told
    assert told.count("\n") == 1


def test_cut_short_it_goes_on_without_its_start(pipeline: Pipeline, tmp_path: Path) -> None:
    whole, cut, start = (tmp_path / name for name in ("whole", "cut", "start"))
    shutil.copytree(pipeline.instruct, start)
    assert train(start, whole) == 0
    assert train(start, cut, "--minutes", "0") == 0
    assert not (cut / "FINISHED").exists()
    shutil.rmtree(start)
    assert train(start, cut) == 0
    assert files(cut / "release") == files(whole / "release")
    assert not [path for path in cut.iterdir() if path.name.startswith(".release")]


def test_later_stages_carry_it_along(rendered: Path, tmp_path: Path) -> None:
    run = tmp_path / "taught"
    command = ["train", "nano_instruct", "--start", str(rendered), *LANGUAGE, "--steps", "1"]
    assert main([*command, "--out", str(run)]) == 0
    for folder in ("parts", "release"):
        assert (run / folder / RENDERER).read_bytes() == (
            rendered / "release" / RENDERER
        ).read_bytes()
    one, other = (ddt_llama.load(model) for model in (rendered, run))
    codes = torch.zeros(1, 8, dtype=torch.int64)
    assert torch.equal(one.decode(codes, [0], steps=0), other.decode(codes, [0], steps=0))


def test_one_that_is_there_learns_on(rendered: Path, tmp_path: Path) -> None:
    assert train(rendered, tmp_path / "on", "--train.optim.lr=0", "--train.seed=1") == 0
    on, before = (run / "release" / RENDERER for run in (tmp_path / "on", rendered))
    assert on.read_bytes() == before.read_bytes()


def test_published_it_is_small_and_the_settings_of_the_language_model_stay(
    rendered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mine"
    assert main(["publish", str(rendered), str(folder), "--bits", "8"]) == 0
    told = capsys.readouterr().out
    assert "the renderer: " in told
    assert "guidance" not in told
    before, after = (load_json(one / "config.json") for one in (rendered / "release", folder))
    assert {**after["generation"], "steps": 0} == before["generation"]
    assert (folder / RENDERER).stat().st_size < 0.6 * (
        (rendered / "release" / RENDERER).stat().st_size
    )
    model = ddt_llama.load(folder)
    assert model.tokenizer.renders
    assert model.vocabulary is not None


def test_a_tokenizer_alone_gets_one_and_loses_it_where_it_learns_on(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    run, on = tmp_path / "run", tmp_path / "on"
    assert train(pipeline.tokenizer, run) == 0
    assert not (run / "release" / "language").exists()
    assert ddt_llama.load(run).tokenizer.renders
    rounded = ["--objective.round-from", "0", "--objective.round-until", "1", "--steps", "1"]
    command = ["train", "nano_tokenizer", "--start", str(run), *TOKENIZER, *rounded]
    assert main([*command, "--out", str(on)]) == 0
    assert not ddt_llama.load(on).tokenizer.renders


def test_a_start_without_timesteps_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(ROOT / "weights" / "spatial-nano", tmp_path / "run") == 2
    assert "not a timestep tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
