"""Models side by side: what is counted, what is left out, and the page."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ddt_llama.config import UserError, load_json
from ddt_llama.evaluation.reconstruction import ReconstructionSuite
from ddt_llama.generation import Model
from ddt_llama.generation.history import History, Training
from ddt_llama.generation.settings import Settings
from ddt_llama.probes import compare as module
from ddt_llama.probes.compare import ComparisonPlan, cells, compare, network
from ddt_llama.recipes.data import DataConfig
from ddt_llama.recipes.formulas import encoder_flops, spatial_flops
from ddt_llama.reports.comparison import NOTHING
from ddt_llama.tokenizer import (
    SpatialTokenizer,
    SpatialTokenizerConfig,
    TimestepTokenizer,
    TimestepTokenizerConfig,
)
from ddt_llama.tokenizer.decoder import DecoderConfig
from ddt_llama.tokenizer.encoder import EncoderConfig
from ddt_llama.tokenizer.quantizer import GROUP, QuantizerConfig

CODES = QuantizerConfig(codebook_size=16, code_dim=4)
PLAN = ComparisonPlan(
    ReconstructionSuite(scenes=6, codebook_scenes=40, whole=False, visible_steps=1)
)


def spatial() -> SpatialTokenizer:
    torch.manual_seed(0)
    config = SpatialTokenizerConfig(
        widths=(4, 4, 4, 8), blocks=(0, 0, 0, 1), groups=2, quantizer=CODES
    )
    return SpatialTokenizer(config).eval()


def timestep() -> TimestepTokenizer:
    torch.manual_seed(0)
    config = TimestepTokenizerConfig(
        num_tokens=4,
        quantizer=CODES,
        encoder=EncoderConfig(16, 1, 2),
        decoder=DecoderConfig(16, 2, 2),
    )
    return TimestepTokenizer(config).eval()


def test_flops_are_those_of_the_formulas() -> None:
    one, other = timestep(), spatial()
    model = Model(one, name="a")
    model.history = History(
        (Training("tokenizer", "x", 10, 3e15), Training("language", "y", 5, 1e15))
    )
    found = network(model)
    wider = (CODES.code_dim + 1) * GROUP - CODES.code_dim * CODES.codebook_size  # how it searches
    assert found["flops.encode"] == encoder_flops(one) + 2 * one.num_tokens * wider
    assert found["flops.trainings"] == 4e15
    assert found["bits"] == 4 * 4
    encode, decode, _ = spatial_flops(other)
    encode += 2 * other.num_tokens * wider
    found = network(Model(other, name="b"))
    assert (found["flops.encode"], found["flops.decode"]) == (encode, decode)
    assert "flops.trainings" not in found  # nobody knows them
    assert found["parameters.tokenizer"] == sum(p.numel() for p in other.parameters())
    assert "parameters.language" not in found


def test_of_one_picture_nobody_says_how_much_of_the_codebook_is_in_use(tmp_path: Path) -> None:
    one = replace(PLAN, reconstruction=replace(PLAN.reconstruction, codebook_scenes=1))
    figures = compare([Model(spatial(), name="x")], tmp_path / "c", one)
    assert "codebook.used" not in figures["x"]
    assert "psnr" in figures["x"]


def test_models_stand_side_by_side_and_are_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [Model(timestep(), name="ours"), Model(spatial(), name="theirs")]
    figures = compare(models, tmp_path / "c", PLAN)
    table = (tmp_path / "c" / "README.md").read_text()
    assert "|  | ours | theirs | theirs less ours |" in table
    psnr = figures["ours"]["psnr"]
    assert f"| PSNR in dB | {psnr:.2f} [" in table
    assert "prompts obeyed" not in table  # nobody could
    assert "| settings of its release | 8 decoding steps | 8 decoding steps |  |" in table
    psnr, less = figures["theirs"]["psnr"], figures["theirs"]["psnr"] - psnr
    assert f"| {psnr:.2f} [" in table
    assert f"| {'+' if less > 0 else ''}{less:.2f} [" in table
    page = (tmp_path / "c" / "index.html").read_text()
    assert page.count("<img") == 6 * 3  # original, ours, theirs
    assert "Drawn" not in page
    assert load_json(tmp_path / "c" / "results.json")["models"] == ["ours", "theirs"]

    monkeypatch.setattr(module, "measure", None)
    assert compare(models, tmp_path / "c", PLAN) == figures
    with pytest.raises(UserError, match="was begun here"):
        compare(models, tmp_path / "c", ComparisonPlan())
    tuned = Model(models[0].tokenizer, name="ours", settings=Settings(steps=2))
    with pytest.raises(UserError, match="was begun here"):
        compare([tuned, models[1]], tmp_path / "c", PLAN)
    with pytest.raises(UserError, match="two models are named"):
        compare([models[0], models[0]], tmp_path / "d", PLAN)
    (tmp_path / "no pictures").mkdir()
    nothing = replace(PLAN, data=DataConfig(paths=(str(tmp_path / "no pictures"),)))
    with pytest.raises(UserError, match="no pictures"):
        compare(models, tmp_path / "d", nothing)
    assert not (tmp_path / "d").exists()  # the corrected command may use it


def test_cells_have_intervals_where_there_are_any_and_differences_with_them() -> None:
    one = {"a": 0.5, "a.low": 0.4, "a.high": 0.6, "b": 3.0}
    other = {"a": 0.8, "a.low": 0.77, "a.high": 0.84, "b": 4.0, "c": 1.0}

    def percent(value: float) -> str:
        return f"{100 * value:.0f} %"

    less = "+30 points [+20 to +41]"  # hypot(0.03, 0.1) below, hypot(0.04, 0.1) above
    assert cells([one, other], "a", percent) == ("50 % [40 to 60]", "80 % [77 to 84]", less)
    back = cells([other, one, one], "a", percent)[3:]
    assert back == ("-30 points [-41 to -20]",) * 2
    assert cells([one, other], "b", str) == ("3.0", "4.0", "")
    assert cells([one, other], "c", str) == (NOTHING, "1.0", "")
    alone = {"a": 0.5, "a.low": None, "a.high": None}  # JSON's word for bounds that are endless
    assert cells([alone, alone], "a", percent) == ("50 %", "50 %", "")


def test_a_quick_plan_is_short() -> None:
    plan, quick = ComparisonPlan(), ComparisonPlan().quick()
    assert quick.shapes.prompts < plan.shapes.prompts
    assert quick.reconstruction.scenes < plan.reconstruction.scenes
    assert not quick.reconstruction.whole
