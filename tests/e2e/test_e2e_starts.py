"""Trainings that start from something else: another run, SD3, a VAE, a language model, a text side.

Small files of each kind are made here and go through the command line as real ones would.
"""

import shutil
from pathlib import Path

import pytest
import torch
from tiny_pipeline import LANGUAGE, TOKENIZER, Pipeline, pictures, train_all
from transformers import AutoConfig, AutoModelForCausalLM

import ddt_llama
from ddt_llama.checkpoint import load_tensors
from ddt_llama.cli import main
from ddt_llama.config import load_json, save_json
from ddt_llama.language import TextTokenizer

diffusers = pytest.importorskip("diffusers")

ROUNDED = ["--objective.round-from", "0", "--objective.round-until", "1"]  # from the first step


def weights(run: Path, part: str) -> dict[str, torch.Tensor]:
    return load_tensors(run / "release" / part / "model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_decoder_trained_alone_goes_on_without_the_run_it_came_from(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    """What it keeps lies in no checkpoint, so it must lie in the run itself."""
    fields = [*TOKENIZER, "--keep-codes", "true", *ROUNDED]
    whole, cut, start = (tmp_path / name for name in ("whole", "cut", "start"))
    shutil.copytree(pipeline.tokenizer, start)
    train = ["train", "nano_tokenizer", "--start", str(start), *fields]
    assert main([*train, "--steps", "4", "--out", str(whole)]) == 0
    assert main([*train, "--steps", "4", "--minutes", "0", "--out", str(cut)]) == 0
    shutil.rmtree(start)
    assert main([*train, "--steps", "4", "--out", str(cut)]) == 0
    assert equal(weights(cut, "tokenizer"), weights(whole, "tokenizer"))
    assert ddt_llama.load(cut).history == ddt_llama.load(whole).history


def test_kept_codes_cannot_grow(
    pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["train", "nano_tokenizer", "--start", str(pipeline.tokenizer), *TOKENIZER]
    train += ["--keep-codes", "true", "--tokenizer.quantizer.codebook-size", "100000"]
    assert main([*train, *ROUNDED, "--out", str(tmp_path / "run")]) == 2
    assert "codebook_size 100000 given, there are" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_language_run_goes_on_without_the_run_it_came_from(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    whole, cut, start = (tmp_path / name for name in ("whole", "cut", "start"))
    shutil.copytree(pipeline.pretrain, start)
    train = ["train", "nano_instruct", "--start", str(start), *LANGUAGE, "--steps", "3"]
    assert main([*train, "--out", str(whole)]) == 0
    assert main([*train, "--minutes", "0", "--out", str(cut)]) == 0
    shutil.rmtree(start)
    shutil.rmtree(cut / "checkpoints")  # killed before the first: it begins again as it began
    assert main([*train, "--out", str(cut)]) == 0
    assert equal(weights(cut, "language"), weights(whole, "language"))
    assert ddt_llama.load(cut).history == ddt_llama.load(whole).history


def test_a_language_run_killed_while_it_keeps_its_start_begins_anew(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train = ["train", "nano_instruct", "--start", str(pipeline.pretrain), *LANGUAGE, "--steps", "1"]
    assert main([*train, "--out", str(whole)]) == 0
    assert main([*train, "--minutes", "0", "--out", str(cut)]) == 0
    (cut / "FINISHED").unlink()
    shutil.rmtree(cut / "checkpoints")
    for name in ("vocabulary.json", "tokenizer.json"):
        (cut / "parts" / "language" / name).unlink()
    assert main([*train, "--out", str(cut)]) == 0
    assert equal(weights(cut, "language"), weights(whole, "language"))


def test_a_caption_longer_than_the_model_reads_is_shown_cut(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data")
    for text in data.glob("*.txt"):
        text.write_text("a plain picture " * 200)
    trained = train_all(tmp_path / "runs", (str(data),))
    shown = sorted((trained.pretrain / "samples").glob("*.txt"))[-1].read_text()
    assert "a plain picture" in shown


def test_a_release_says_what_its_trainings_took(pipeline: Pipeline, tmp_path: Path) -> None:
    trainings = ddt_llama.load(pipeline.instruct).history.trainings
    assert trainings is not None
    assert [one.recipe for one in trainings] == ["nano_tokenizer", "nano_pretrain", "nano_instruct"]
    assert all(one.samples == 12 and one.flops > 0 for one in trainings)
    known = ddt_llama.load(pipeline.instruct)
    known.save(tmp_path / "copy")
    assert ddt_llama.load(tmp_path / "copy").history == known.history
    again = ["train", "nano_instruct", "--start", str(pipeline.pretrain), *LANGUAGE, "--steps", "1"]
    assert main([*again, "--train.accumulate", "2", "--out", str(tmp_path / "again")]) == 0
    told = ddt_llama.load(tmp_path / "again").history.trainings
    assert told is not None
    assert [one.samples for one in told] == [12, 12, 8]
    # Each part brings its own: a decoder trained on, and a language model on another's tokenizer.
    decoder = ["train", "nano_tokenizer", "--start", str(pipeline.instruct), *TOKENIZER]
    decoder += ["--keep-codes", "true", *ROUNDED, "--steps", "2"]
    assert main([*decoder, "--out", str(tmp_path / "decoder")]) == 0
    both = ["--tokenizer", str(tmp_path / "decoder"), "--start", str(pipeline.pretrain)]
    train = ["train", "nano_instruct", *both, *LANGUAGE, "--steps", "1"]
    assert main([*train, "--out", str(tmp_path / "both")]) == 0
    told = ddt_llama.load(tmp_path / "both").history.trainings
    assert told is not None
    assert [one.part for one in told] == ["tokenizer"] * 2 + ["language"] * 2
    assert [one.samples for one in told] == [12, 8, 12, 4]
    # What came before a start that says nothing is not known, and so the whole is not.
    described = load_json(tmp_path / "copy" / "config.json")
    del described["trainings"]
    save_json(tmp_path / "copy" / "config.json", described)
    train = ["train", "nano_instruct", "--start", str(tmp_path / "copy"), *LANGUAGE]
    assert main([*train, "--steps", "1", "--out", str(tmp_path / "on")]) == 0
    assert ddt_llama.load(tmp_path / "on").history.flops is None


def test_a_decoder_starts_from_the_image_stream_of_sd3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    sd3 = diffusers.SD3Transformer2DModel(
        sample_size=64,
        patch_size=8,
        in_channels=3,
        out_channels=3,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=12,
        caption_projection_dim=32,
        pooled_projection_dim=10,
        pos_embed_max_size=11,
    )
    sd3.save_pretrained(tmp_path / "transformer")
    run = tmp_path / "run"
    train = ["train", "nano_tokenizer", "--image-stream", str(tmp_path / "transformer")]
    train += [*TOKENIZER, "--tokenizer.decoder.token-stream", "joint", "--objective.own", "0"]
    train += ["--train.optim.lr", "0", "--train.ema", "0", "--steps", "1", "--out", str(run)]
    assert main(train) == 2
    assert "add --tokenizer.prediction velocity" in capsys.readouterr().err
    assert not run.exists()
    assert main([*train, "--tokenizer.prediction", "velocity"]) == 0
    ours = weights(run, "tokenizer")
    theirs = sd3.state_dict()
    block = "transformer_blocks.0"
    assert torch.equal(
        ours["decoder.blocks.0.image.mlp.up.weight"], theirs[f"{block}.ff.net.0.proj.weight"]
    )
    qkv = torch.cat([theirs[f"{block}.attn.to_{part}.weight"] for part in "qkv"])
    assert torch.equal(ours["decoder.blocks.0.image.qkv.weight"], qkv)
    twice = [*train, "--tokenizer.prediction", "velocity", "--start", str(run), "--out", "other"]
    assert main(twice) == 2
    assert "give one of the two" in capsys.readouterr().err


def test_a_tokenizer_works_on_the_latents_of_a_vae(pipeline: Pipeline, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 8, 8),
        norm_num_groups=2,
        latent_channels=5,
    )
    vae.save_pretrained(tmp_path / "vae")
    run = tmp_path / "run"
    latents = ["--tokenizer.latents", "VaeLatents", "--tokenizer.latents.folder"]
    sizes = ["--tokenizer.channels=5", "--tokenizer.downsample=4", "--tokenizer.patch=2"]
    train = ["train", "nano_tokenizer", *latents, str(tmp_path / "vae"), *sizes, *TOKENIZER]
    assert main([*train, "--steps", "2", "--out", str(run)]) == 0
    model = ddt_llama.load(run)
    codes = model.encode([pipeline.picture])
    assert codes.shape == (1, 8)
    picture = model.decode(codes, [3], steps=2)
    assert picture.shape == (1, 3, 64, 64)
    again = ddt_llama.load(run)
    assert torch.equal(again.encode([pipeline.picture]), codes)
    assert torch.equal(again.decode(codes, [3], steps=2), picture)
    assert not torch.equal(again.decode(codes, [4], steps=2), picture)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2"])
def test_any_causal_model_is_grown_and_trained(
    family: str, pipeline: Pipeline, tmp_path: Path
) -> None:
    text = TextTokenizer.train(["a red circle", "two blue squares"], 300)
    config = AutoConfig.for_model(
        family,
        vocab_size=text.size + 5,  # padded rows, as most checkpoints have
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
    run = tmp_path / "run"
    train = ["train", "nano_pretrain", "--tokenizer", str(pipeline.tokenizer)]
    train += ["--start", str(given), *LANGUAGE, "--steps", "2", "--out", str(run)]
    assert main(train) == 0
    grown = AutoModelForCausalLM.from_pretrained(run / "release" / "language")
    assert grown.config.model_type == family
    assert grown.get_input_embeddings().num_embeddings > text.size + 5 + 32
    out = tmp_path / "drawn.png"
    assert main(["draw", str(run), "a red circle", "--out", str(out)]) == 0


def test_a_new_model_takes_the_text_tokenizer_of_any_folder(
    pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = tmp_path / "text"
    text = TextTokenizer.train(["a red circle", "two blue squares"], 290)
    text.save(given)
    run = tmp_path / "run"
    train = ["train", "nano_pretrain", "--tokenizer", str(pipeline.tokenizer), *LANGUAGE]
    train += ["--text", str(given), "--steps", "1"]
    assert main([*train, "--out", str(run)]) == 0
    kept = ddt_llama.load(run).text
    assert kept is not None
    assert kept.encode("two red squares") == text.encode("two red squares")
    assert kept.size == text.size
    start = ["--start", str(pipeline.pretrain), "--out", str(tmp_path / "other")]
    assert main([*train, *start]) == 2
    assert "start brings its own text tokenizer" in capsys.readouterr().err
