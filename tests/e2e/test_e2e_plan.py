"""The verb plan from the command line: tables, a file, and one line for what cannot be."""

import json
from pathlib import Path

import pytest

from ddt_llama.cli import main
from ddt_llama.hardware import ACCELERATORS

SMALL = [
    "--tokenizer.encoder.depth=1",
    "--tokenizer.decoder.depth=1",
    "--tokenizer.quantizer.codebook-size=256",
]


@pytest.mark.slow
def test_a_plan_is_told_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    command = ["plan", "nano_tokenizer", "--gpus", "16", "--gpu", "h200", "--images", "1000000"]
    assert main([*command, "--price", "3", "--json", str(out), *SMALL]) == 0
    said = capsys.readouterr().out
    for word in ("parameters:", "activations", "moments", "largest micro-batch", "cost", "fits: "):
        assert word in said
    assert "published" not in said
    told = json.loads(out.read_text())
    assert (told["gpus"], told["samples"], told["price"]) == (16, 1_000_000, 3)
    assert len(told["rows"]) == 12
    first = told["rows"][0]
    assert first["largest_micro_batch"] > told["micro_batch"] == 4
    assert first["memory"]["total"] < ACCELERATORS["h200"].memory
    seconds = told["learn"] * 1e6 / (16 * ACCELERATORS["h200"].flops * 0.4)
    assert first["gpu_hours"] == pytest.approx(16 * seconds / 3600)
    assert first["cost"] == pytest.approx(3 * first["gpu_hours"])


@pytest.mark.slow
def test_the_plan_of_a_paper_stands_beside_what_was_published(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shallow = ["--backbone.depth", "2", "--backbone.dim", "512", "--codes"]
    assert main(["plan", "paper_pretrain", "--gpus", "8", "--gpu", "910b", *shallow]) == 0
    said = capsys.readouterr().out
    assert "DDT-LLaMA, stage 1: 512 in 336 hours" in said
    assert "each of them once is a utilisation of" in said
    assert "Selftok, tokenizer: 32 in 96 hours" in said
    assert "how many there were is not published" in said


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("nano --gpus 1 --gpu h100", "unknown recipe 'nano'"),
        ("nano_tokenizer --gpus 0 --gpu h100", "gpus: given 0"),
        ("nano_tokenizer --gpus 1 --gpu b200", "gpu: given 'b200', allowed are h200, h100"),
        ("nano_tokenizer --gpus 1 --gpu h100 --images 0", "images: given 0"),
        ("nano_tokenizer --gpus 1 --gpu h100 --utilisation 40", "utilisation: given 40"),
        ("nano_tokenizer --gpus 1 --gpu h100 --json plan.txt", "names that end in .json"),
        ("nano_tokenizer --gpus many --gpu h100", "--gpus"),
        ("nano_tokenizer --gpus 1 --gpu h100 --train.lr 1", "fields of train are"),
    ],
)
def test_what_cannot_be_is_one_line(
    typed: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *typed.split()]) == 2
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1


def test_a_recipe_that_fits_nowhere_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "paper_pretrain", "--gpus", "1", "--gpu", "h100", "--codes"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: paper_pretrain does not fit 1 x h100: weights, gradients and ")
    assert " alone need 145 GB on each" in said
    assert said.count("\n") == 1
