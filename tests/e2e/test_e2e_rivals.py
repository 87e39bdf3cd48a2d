"""The language side runs on a rival's codes as on our own, through the command line."""

import json
from pathlib import Path

import pytest
from tiny_pipeline import LANGUAGE

import ddt_llama
from ddt_llama.cli import main

SPATIAL = [
    "--tokenizer.widths=4,4,4,8",
    "--tokenizer.blocks=0,0,0,1",
    "--tokenizer.groups=2",
    "--tokenizer.quantizer.codebook_size=32",
    "--train.batch=4",
    "--train.prefetch=0",
    "--train.tensorboard=false",
]


@pytest.mark.slow
def test_a_spatial_tokenizer_goes_the_whole_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, pretrain, instruct = (str(tmp_path / name) for name in ("see", "pre", "ins"))
    assert main(["train", "spatial_nano", "--steps", "3", "--out", tokenizer, *SPATIAL]) == 0
    assert f"next: ddt train nano_pretrain --tokenizer {tokenizer}" in capsys.readouterr().out
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
