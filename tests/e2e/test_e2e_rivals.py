"""The language side runs on a rival's codes as on our own, through the command line."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_pipeline import LANGUAGE, pictures

import ddt_llama
from ddt_llama.cli import main
from ddt_llama.cli.measure import opened
from ddt_llama.evaluation.reconstruction import ReconstructionSuite
from ddt_llama.evaluation.shapes_suite import ShapesSuite
from ddt_llama.evaluation.text import TextSuite
from ddt_llama.probes.compare import ComparisonPlan

SPATIAL = [
    "--tokenizer.widths=4,4,4,8",
    "--tokenizer.blocks=0,0,0,1",
    "--tokenizer.groups=2",
    "--tokenizer.quantizer.codebook_size=32",
    "--train.batch=4",
    "--train.prefetch=0",
    "--train.tensorboard=false",
]
# Of the suites, what seconds allow.
QUICK = ComparisonPlan(
    ReconstructionSuite(scenes=6, codebook_scenes=40, whole=False, visible_steps=1),
    ShapesSuite(prompts=1, images=1, edits=3, questions=6),
    TextSuite(captions=4),
)


@pytest.mark.slow
def test_a_spatial_tokenizer_goes_the_whole_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, pretrain, instruct = (str(tmp_path / name) for name in ("to see", "pre", "ins"))
    assert main(["train", "spatial_nano", "--steps", "3", "--out", tokenizer, *SPATIAL]) == 0
    told = capsys.readouterr().out
    assert f"next: ddt publish '{tokenizer}' '{tokenizer}-codes' --bits 8\n" in told
    then = f"nano_pretrain --tokenizer '{tokenizer}-codes' --out '{tokenizer}_pretrain'\n"
    assert f"then: ddt train {then}" in told
    stages = (
        ["nano_pretrain", "--tokenizer", tokenizer, "--out", pretrain],
        ["nano_instruct", "--start", pretrain, "--out", instruct],
    )
    for stage in stages:
        assert main(["train", *stage, "--steps", "3", *LANGUAGE]) == 0
    model = ddt_llama.load(instruct)
    assert (model.tokenizer.num_tokens, model.tokenizer.refines) == (64, False)
    picture = model.draw(["a red circle"], seed=1)[0]
    assert picture.size == (64, 64)
    assert model.edit(picture, "remove the circle")[0].size == (64, 64)
    assert isinstance(model.ask(picture, "how many?"), str)

    out, file = str(tmp_path / "back"), tmp_path / "figures.json"
    picture.save(tmp_path / "drawn.png")
    assert main(["reconstruct", tokenizer, str(tmp_path / "drawn.png"), "--out", out]) == 0
    command = ["evaluate", tokenizer, "--suite", "reconstruction", "--json", str(file)]
    assert main([*command, "--scenes", "6", "--codebook_scenes", "6"]) == 0
    figures = json.loads(file.read_text())
    steps = {key for key in figures if key.startswith("reconstruction.psnr.")}
    assert steps == {f"reconstruction.psnr.1{end}" for end in ("", ".low", ".high")}
    prefix = ["reconstruct", tokenizer, str(tmp_path / "drawn.png"), "--visible", "4"]
    assert main([*prefix, "--out", out]) == 2
    assert "all 64 codes only" in capsys.readouterr().err
    assert main(["recipes", "spatial_nano"]) == 0
    assert "bits an image, of nano_tokenizer's" in capsys.readouterr().out

    side = tmp_path / "side"
    command = ["compare", instruct, tokenizer, "--out", str(side), "--quick"]
    monkeypatch.setattr(ComparisonPlan, "quick", lambda plan: QUICK)
    assert main(command) == 0
    assert "|  | nano_instruct | spatial_nano |" in capsys.readouterr().out
    table = (side / "README.md").read_text()
    assert all(words in table for words in ("prompts obeyed", "bits a character", "seconds"))
    shown = json.loads((side / "results.json").read_text())
    assert [bool(one["pictures"][1]) for one in shown["drawn"]] == [False] * 6
    assert main(["compare", instruct, "--out", str(side)]) == 2
    mine, both = str(pictures(tmp_path / "mine")), ["compare", tokenizer, "--quick"]
    assert main([*both, "--data", mine, "--out", str(tmp_path / "own")]) == 0
    table = (tmp_path / "own" / "README.md").read_text()
    assert "given pictures, PSNR" in table
    assert f"Given pictures: {mine}." in table
    assert len(list((tmp_path / "own" / "pictures").glob("rebuilt-original-*.png"))) == 6 + 6
    names = [
        one.name
        for one in opened([instruct, tokenizer, str(shutil.copytree(instruct, side / "x"))])
    ]
    assert names == ["ins", "spatial_nano", "x"]


def test_a_critic_is_trained_beside_and_a_run_with_one_goes_on(tmp_path: Path) -> None:
    run = str(tmp_path / "see")
    train = ["train", "spatial_nano", "--out", run, *SPATIAL]
    critic = ["--objective.adversarial", "0.1", "--objective.critic_widths", "8,16"]
    assert main([*train, "--steps", "3", *critic]) == 0
    assert main([*train, "--steps", "6", *critic, "--train.log_every", "1"]) == 0
    rows = [
        json.loads(line) for line in (tmp_path / "see" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows] == [3, 4, 5, 6]
    assert all(row["critic"] > 0 for row in rows)
    assert ddt_llama.load(run).tokenizer.num_tokens == 64
