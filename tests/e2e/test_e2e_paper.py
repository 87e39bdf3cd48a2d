"""The paper's recipes through the command line, on tiny checkpoints of the published formats.

Only widths are shrunk: pictures of 256 px, latents of SD3's shape, 480, 512 and 1,024 tokens.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from paper_folders import (
    CAPTIONS,
    save_gemma_2,
    save_llama_3,
    save_pairs,
    save_sd3,
    save_vae,
)
from tiny_pipeline import Pipeline
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import ddt_llama
from ddt_llama.checkpoint import load_tensors
from ddt_llama.cli import main
from ddt_llama.generation.model import Model
from ddt_llama.language import Vocabulary
from ddt_llama.tokenizer import TimestepTokenizer

pytest.importorskip("diffusers")

TRAINING = [
    "--train.batch=2",
    "--train.prefetch=0",
    "--train.tensorboard=false",
    "--train.compile=false",
    "--train.ema=0",
    "--train.optim.warmup=0",
]
WIDTHS = [
    "--tokenizer.quantizer.codebook_size=64",
    "--tokenizer.encoder.dim=32",
    "--tokenizer.encoder.depth=1",
    "--tokenizer.encoder.num_heads=2",
    "--tokenizer.decoder.dim=32",
    "--tokenizer.decoder.depth=2",
    "--tokenizer.decoder.num_heads=2",
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user has put there: SD3 (VAE and transformer), and pictures with captions."""
    place = tmp_path_factory.mktemp("models")
    save_vae(place / "sd3" / "vae")
    save_sd3(place / "sd3" / "transformer")
    save_sd3(place / "sd3-in-shards" / "transformer", shard="100KB")
    save_pairs(place / "pairs")
    return place


def tokenizer_command(models: Path, recipe: str, run: Path) -> list[str]:
    command = ["train", recipe, "--tokenizer.latents.folder", str(models / "sd3" / "vae")]
    command += ["--data", str(models / "pairs"), "--steps", "2", "--out", str(run)]
    return [*command, *WIDTHS, *TRAINING]


def language_command(models: Path, recipe: str, run: Path, *options: str) -> list[str]:
    command = ["train", recipe, "--data", str(models / "pairs"), "--steps", "2"]
    command += ["--out", str(run), "--train.accumulate=1", *TRAINING]
    return [*command, "--train.optim.lr=0.01", *options]


@pytest.fixture(scope="module")
def paper_run(models: Path) -> Path:
    """DDT-LLaMA's tokenizer, trained for two steps."""
    run = models / "paper_tokenizer"
    assert main(tokenizer_command(models, "paper_tokenizer", run)) == 0
    return run


def opened(run: Path, models: Path, fifths: list[int]) -> TimestepTokenizer:
    """Open a trained tokenizer and hold it against what its paper says."""
    model = ddt_llama.load(run)
    tokenizer = model.tokenizer
    assert isinstance(tokenizer, TimestepTokenizer)
    seen = tokenizer.schedule.num_visible(torch.arange(6) / 5)
    assert seen.diff().tolist() == fifths
    assert (int(seen[0]), int(seen[-1])) == (0, tokenizer.num_tokens)
    assert tokenizer.schedule.num_visible(torch.tensor([1e-6, 1 - 1e-6])).tolist() == [
        1,
        sum(fifths),
    ]
    assert tokenizer.config.latents.normalisation == (0.0609, 1.5305)
    codes = model.encode([models / "pairs" / "0.png"])
    assert codes.shape == (1, sum(fifths))
    assert model.decode(codes, [1], steps=2).shape == (1, 3, 256, 256)
    return tokenizer


@pytest.mark.slow
def test_the_papers_tokenizer_speaks_480_tokens_of_latents(paper_run: Path, models: Path) -> None:
    tokenizer = opened(paper_run, models, [96] * 5)
    assert tokenizer.config.prediction == "clean"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "fifths", "folder"),
    [
        (512, [192, 184, 72, 48, 16], "sd3"),
        (1024, [384, 368, 144, 96, 32], "sd3-in-shards"),
    ],
)
def test_selftoks_tokenizers_start_from_sd3_and_move_it_slowly(
    count: int,
    fifths: list[int],
    folder: str,
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, transformer = tmp_path / "run", models / folder / "transformer"
    assert len(list(transformer.glob("*.safetensors.index.json"))) == (folder != "sd3")
    command = tokenizer_command(models, f"selftok_tokenizer_{count}", run)
    assert main([*command, "--image-stream", str(transformer)]) == 0
    assert f"then: ddt train paper_pretrain --tokenizer {run}-codes" in capsys.readouterr().out
    tokenizer = opened(run, models, fifths)
    assert tokenizer.config.prediction == "velocity"
    before, after = (
        load_tensors(run / place / "tokenizer" / "model.safetensors")
        for place in ("parts", "release")
    )
    sd3: dict[str, Tensor] = {}
    for shard in transformer.glob("*.safetensors"):
        sd3 |= load_tensors(shard)
    theirs = [sd3[f"transformer_blocks.1.attn.to_{part}.weight"] for part in "qkv"]
    start = before["decoder.blocks.1.image.qkv.weight"]
    assert torch.equal(start, torch.cat(theirs).float())
    # AdamW moves the farthest of many numbers by its learning rates: 1e-5 and 5e-5 a step.
    moved = {
        part: float((after[name] - before[name]).abs().max())
        for part, name in (
            ("sd3", "decoder.blocks.1.image.qkv.weight"),
            ("tokens", "decoder.blocks.0.token.qkv.weight"),
            ("encoder", "encoder.blocks.0.token.qkv.weight"),
        )
    }
    assert moved["tokens"] == pytest.approx(moved["encoder"], rel=0.05)
    assert moved["sd3"] == pytest.approx(0.2 * moved["tokens"], rel=0.05)


def text_logits(folder: Path, rows: int, ids: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(ids).logits[..., :rows]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama-3", "llama-3.1", "gemma-2"])
def test_a_published_model_is_grown_trained_saved_and_opened_by_transformers(
    family: str,
    paper_run: Path,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given, size = tmp_path / family, "paper_gemma" if family == "gemma-2" else "paper"
    if family == "gemma-2":
        save_gemma_2(given)
    else:
        save_llama_3(given, scaled=family == "llama-3.1")
    first, second = tmp_path / "first", tmp_path / "second"
    command = language_command(models, f"{size}_pretrain", first, "--tokenizer", str(paper_run))
    saved = watch_saving(monkeypatch)
    assert main([*command, "--start", str(given)]) == 0
    assert f"next: ddt train {size}_instruct --start {first}" in capsys.readouterr().out
    assert main(language_command(models, f"{size}_instruct", second, "--start", str(first))) == 0

    # What training began with: the checkpoint's own weights and text rows, bit by bit.
    rows = len(AutoTokenizer.from_pretrained(given))
    begun = first / "parts" / "language"
    checkpoint = AutoModelForCausalLM.from_pretrained(given, dtype=torch.float32).state_dict()
    grown = AutoModelForCausalLM.from_pretrained(begun).state_dict()
    assert Vocabulary.load(begun) == Vocabulary(rows, 64, 480)
    assert checkpoint.keys() == grown.keys()
    for name, weight in checkpoint.items():
        assert torch.equal(grown[name][: len(weight)], weight), name
    ids = torch.randint(rows, (2, 100), generator=torch.Generator().manual_seed(0))
    # Not bit by bit: a product with more rows may be summed in another order.
    torch.testing.assert_close(
        text_logits(begun, rows, ids), text_logits(given, rows, ids), rtol=1e-5, atol=1e-5
    )

    # What training has made of it: in the folder bit by bit what was in memory.
    assert len(saved) == 2
    for run, (ids, logits) in zip((first, second), saved, strict=True):
        folder = run / "release" / "language"
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        with torch.no_grad():
            assert torch.equal(model(ids).logits, logits)
    assert not torch.allclose(saved[0][1], saved[1][1], atol=0.01)
    own, theirs = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(given)
    text = ddt_llama.load(second).text
    assert text is not None
    for caption in (*CAPTIONS, "日本 <|end_of_text|> <eos> 🙂"):
        told = own(" " + caption, add_special_tokens=False).input_ids
        assert text.decode(text.encode(caption)) == caption
        if "<" not in caption:
            assert told == theirs(" " + caption, add_special_tokens=False).input_ids
            assert told == text.encode(caption)

    out = tmp_path / "drawn.png"
    assert main(["draw", str(second), CAPTIONS[0], "--steps", "2", "--out", str(out)]) == 0
    assert out.is_file()


def watch_saving(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Collect ids and the logits that a language model gives for them when it is saved."""
    saved: list[tuple[Tensor, Tensor]] = []
    save = Model.save

    def watched(self: Model, folder: Path, **options: Any) -> None:
        language: Any = self.language
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(language.config.vocab_size, (2, 100), generator=generator)
        with torch.no_grad():
            saved.append((ids, language(ids).logits))
        save(self, folder, **options)

    monkeypatch.setattr(Model, "save", watched)
    return saved


def refused(command: list[str], run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(command) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert not run.exists()
    return said


@pytest.mark.parametrize(
    ("recipe", "options", "changes", "expected"),
    [
        ("paper_tokenizer", [], None, "models/sd3/vae: no such folder; give the local folder"),
        (
            "paper_tokenizer",
            ["--tokenizer.latents.folder", "{given}"],
            {"latent_channels": 4},
            "the latents have 4 channels and 8 pixels a cell, the recipe 16 and 8",
        ),
        (
            "selftok_tokenizer_512",
            [],
            None,
            "models/sd3/transformer: no such folder; give the local folder of a diffusers SD3",
        ),
        (
            "selftok_tokenizer_512",
            ["--image-stream", "{given}"],
            {"num_attention_heads": 4, "caption_projection_dim": 64},
            "this SD3 has width 64 (decoder: 32), heads 4 (decoder: 2); use SD3-medium",
        ),
    ],
)
def test_a_tokenizer_refuses_what_it_cannot_start_from(
    recipe: str,
    options: list[str],
    changes: dict[str, int] | None,
    expected: str,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if changes is not None:
        (save_sd3 if "num_attention_heads" in changes else save_vae)(tmp_path / "given", **changes)
    command = tokenizer_command(models, recipe, tmp_path / "run")
    if recipe == "paper_tokenizer":  # begins with the folder that the recipe names
        del command[2:4]
    given = [option.format(given=tmp_path / "given") for option in options]
    assert expected in refused([*command, *given], tmp_path / "run", capsys)


def without_text_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def one_id_more(folder: Path) -> None:
    path = folder / "tokenizer.json"
    described = json.loads(path.read_text())
    last = described["added_tokens"][-1]
    described["added_tokens"].append({**last, "id": last["id"] + 1, "content": "<more>"})
    path.write_text(json.dumps(described))


def one_shard_less(folder: Path) -> None:
    next(folder.glob("model-00002-*")).unlink()


HARMS = {
    "": "models/llama-3-8b is no run, release or language model; give the local Hugging Face",
    "without_text_tokenizer": "no text tokenizer",
    "one_id_more": "has a text tokenizer of 328 ids and an embedding of 327 rows",
    "one_shard_less": "model-00002-of-00004.safetensors: no such file; the folder is incomplete",
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_language_model_refuses_what_it_cannot_start_from(
    harm: str,
    pipeline: Pipeline,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--tokenizer", str(pipeline.tokenizer)]
    if harm:
        globals()[harm](save_llama_3(tmp_path / "given"))
        options += ["--start", "given"]
    command = language_command(models, "paper_pretrain", tmp_path / "run", *options)
    assert HARMS[harm] in refused(command, tmp_path / "run", capsys)


@pytest.mark.slow
def test_a_language_model_needs_the_vae_of_its_tokenizer(
    paper_run: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(paper_run, tmp_path / "tokenizer"))
    described = run / "release" / "tokenizer" / "config.json"
    described.write_text(described.read_text().replace(str(models / "sd3" / "vae"), "gone/vae"))
    options = ["--tokenizer", str(run), "--start", str(save_llama_3(tmp_path / "given"))]
    command = language_command(models, "paper_pretrain", tmp_path / "run", *options)
    assert "gone/vae: no such folder" in refused(command, tmp_path / "run", capsys)
