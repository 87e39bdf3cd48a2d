"""A model that no process holds whole starts, trains, goes on and is released as a whole one."""

import ctypes
import json
import shutil
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file
from test_two_processes import in_two_processes
from transformers import AutoConfig, AutoModelForCausalLM

import ddt_llama
from ddt_llama import distributed
from ddt_llama.checkpoint import load_tensors, save_tensors
from ddt_llama.cli import main
from ddt_llama.config import UserError
from ddt_llama.language import TextTokenizer, streaming
from ddt_llama.language.lora import LoraConfig
from ddt_llama.recipes.jobs import open_job
from ddt_llama.recipes.named import recipe_named
from ddt_llama.training import sharding

TEXT = TextTokenizer.train(["a red circle", "two blue squares"] * 3, 300)
TRAIN = ["--steps", "3", "--train.batch", "4", "--train.bf16", "false", "--train.log-every", "1"]
TRAIN += ["--train.prefetch", "0", "--train.tensorboard", "false"]
SHARDS = ["--train.shard", "full"]


def checkpoint(folder: Path, family: str, tied: bool, **sizes: int) -> Path:
    """Write a tiny checkpoint in bfloat16, in several files, as a stranger would have it."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, **sizes}
    config = AutoConfig.for_model(
        family,
        vocab_size=TEXT.size + 5,  # padded rows, as most checkpoints have
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        **shape,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).bfloat16()
    model.save_pretrained(folder, max_shard_size="20KB" if not sizes else "40MB")
    TEXT.save(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def both(*commands: list[str], first: str = "pass") -> tuple[list[int], list[str]]:
    """Carry out commands in two processes, one after the other; files are to be small."""
    call = "import sys, ddt_llama.cli as c, ddt_llama.language.streaming as s; "
    call += f"s.FILE_SIZE = '40KB'; {first}; "
    call += f"sys.exit(max(c.main(one) for one in {list(commands)!r}))"
    return in_two_processes(call)


def losses(run: Path) -> list[tuple[int, float, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("model*.safetensors"))
    return {name: one for file in files for name, one in load_tensors(file).items()}


def assert_same_run(run: Path, alone: Path, tied: bool) -> None:
    for one, other in zip(losses(run), losses(alone), strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    begun, wanted = weights(run / "parts" / "language"), weights(alone / "parts" / "language")
    assert begun.keys() == wanted.keys()
    assert all(torch.equal(begun[name], wanted[name]) for name in wanted)
    released = weights(run / "release" / "language")
    wanted = weights(alone / "release" / "language")
    assert released.keys() == wanted.keys()
    assert ("lm_head.weight" in released) is not tied
    for name in wanted:
        torch.testing.assert_close(released[name], wanted[name], rtol=0, atol=2e-4)
        assert not torch.equal(released[name], begun[name])  # it has learned
    for name in ("config.json", "generation_config.json"):
        files = (folder / "release" / "language" / name for folder in (run, alone))
        one, other = (path.read_text() for path in files)
        assert one == other


@pytest.mark.slow
@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("gemma2", True)])
def test_shards_grow_a_checkpoint_as_one_process_does(
    family: str, tied: bool, tmp_path: Path
) -> None:
    """Stopped after a step; finished by the two, and by one alone that holds all of it."""
    given = checkpoint(tmp_path / "given", family, tied)
    # Files that the index does not name are none of the model's, whatever they say.
    save_file({"model.embed_tokens.weight": torch.zeros(3, 3)}, given / "consolidated.safetensors")
    train = ["train", "nano_pretrain", "--tokenizer", "nano", "--start", str(given), *TRAIN]
    alone, cut, other = (tmp_path / name for name in ("alone", "cut", "other"))
    assert main([*train, "--out", str(alone)]) == 0
    codes, outputs = both([*train, *SHARDS, "--minutes", "0", "--out", str(cut)])
    assert codes == [0, 0], "\n".join(outputs)
    assert len(losses(cut)) == 1
    assert len(list((cut / "parts" / "language").glob("model-*.safetensors"))) > 1
    shutil.copytree(cut, other)
    shutil.rmtree(given)
    codes, outputs = both([*train, *SHARDS, "--out", str(cut)])
    assert codes == [0, 0], "\n".join(outputs)
    assert main([*train, "--out", str(other)]) == 0
    for run in (cut, other):
        assert_same_run(run, alone, tied)
    released = cut / "release" / "language"
    assert len(list(released.glob("model-*.safetensors"))) > 1
    assert not list(cut.glob(".release*"))
    model = AutoModelForCausalLM.from_pretrained(released)
    assert torch.equal(
        model.get_output_embeddings().weight,
        ddt_llama.load(cut).language.get_output_embeddings().weight,
    )


@pytest.mark.slow
def test_shards_start_from_a_release_in_eight_bits(tmp_path: Path) -> None:
    given = checkpoint(tmp_path / "given", "llama", False)
    train = ["train", "nano_pretrain", "--tokenizer", "nano", "--start", str(given), *TRAIN]
    assert main([*train, "--out", str(tmp_path / "first")]) == 0
    start = tmp_path / "start"
    ddt_llama.load(tmp_path / "first").save(start, bits=8)
    alone, two = tmp_path / "alone", tmp_path / "two"
    train = ["train", "nano_instruct", "--start", str(start), *TRAIN]
    assert main([*train, "--out", str(alone)]) == 0
    codes, outputs = both([*train, *SHARDS, "--out", str(two)])
    assert codes == [0, 0], "\n".join(outputs)
    assert_same_run(two, alone, tied=False)
    assert ddt_llama.load(two).history == ddt_llama.load(alone).history


@pytest.mark.slow
def test_damaged_weights_end_both_processes_with_a_line(tmp_path: Path) -> None:
    """Of which one tells; nothing is written."""
    damages = {
        "lacks": lambda folder, file: save_file({}, file),
        "gone": lambda folder, file: file.unlink(),
        "short": lambda folder, file: file.write_bytes(file.read_bytes()[:-100]),
        "other": lambda folder, file: save_file(
            {name: tensor[:-1] for name, tensor in load_tensors(file).items()}, file
        ),
    }
    commands = []
    for name, damage in damages.items():
        folder = checkpoint(tmp_path / name, "llama", True)
        damage(folder, sorted(folder.glob("model-*.safetensors"))[1])
        commands.append(["train", "nano_pretrain", "--tokenizer", "nano", *TRAIN, *SHARDS])
        commands[-1] += ["--start", str(folder), "--out", str(tmp_path / "run")]
    codes, (first, second) = both(*commands)
    assert codes == [2, 2], first + second
    for output in (first, second):
        told = [line for line in output.splitlines() if line.startswith("error:")]
        wanted = ("12 weights are missing, such as", "no such file", "truncated", "expected")
        assert all(what in line for line, what in zip(told, wanted, strict=True)), told
        assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


def full_disk(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Stand in for `save_tensors` where only the first file of a release has room."""
    if ".release" in str(path) and "00001" not in path.name:
        raise UserError(f"{path}: cannot be written (No space left on device)")
    save_tensors(path, tensors)


@pytest.mark.slow
def test_a_disk_that_the_release_fills_ends_both_processes(tmp_path: Path) -> None:
    given, run = checkpoint(tmp_path / "given", "llama", True), tmp_path / "run"
    train = ["train", "nano_pretrain", "--tokenizer", "nano", "--start", str(given), *TRAIN]
    train += [*SHARDS, "--out", str(run)]
    fails = "import test_streaming as t; s.save_tensors = t.full_disk"
    codes, (main_said, other_said) = both(train, first=fails)
    assert codes == [2, 2], main_said + other_said
    assert "error: " in main_said
    assert "No space left" in main_said
    assert "Traceback" not in main_said + other_said
    assert "error: " not in other_said
    assert not list(run.glob("*release*"))
    assert not (run / "FINISHED").exists()
    codes, outputs = both(train)
    assert codes == [0, 0], "\n".join(outputs)
    assert [step for step, *_ in losses(run)] == [1, 2, 3]
    assert (run / "FINISHED").exists()


def peak_above(held: int) -> int:
    """Return the most bytes this process had since the last call, beyond `held`."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")  # begins to measure anew
    return 1024 * int(status.partition("VmHWM:")[2].split()[0]) - held


def rank_main(given: Path, out: Path, adapted: bool) -> None:
    """Print the memory that opening takes, and then what writing the release takes more."""
    streaming.FILE_SIZE = "80MB"  # beside this model what 4 GB are beside 8 billion weights
    recipe = replace(recipe_named("nano_pretrain"), tokenizer="nano", start=str(given))
    recipe = replace(recipe, train=replace(recipe.train, shard="full"))
    if adapted:
        recipe = replace(recipe, lora=LoraConfig(rows=True))
    distributed.setup()
    peak_above(0)
    held = psutil.Process().memory_info().rss
    job = open_job(recipe, out / "parts")
    distributed.barrier()
    assert job.keep is not None
    assert job.fill is not None
    job.keep(out / "parts")
    # glibc keeps up to 200 MB that are free again, another number each time; here they would count.
    ctypes.CDLL(None).malloc_trim(0)
    passes = sharding.Pass(job.model, job.objective)
    sharding.spread(passes, "full", offload=False, bf16=False)
    job.fill()
    opening = peak_above(held)
    held = psutil.Process().memory_info().rss
    job.release(out / "release", job.past)
    whole = sum(4 * p.numel() for p in job.model.parameters())
    figures = {"opening": opening / whole, "release": peak_above(held) / whole, "whole": whole}
    print(json.dumps(figures))
    distributed.teardown()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells peaks")
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="only glibc gives back")
@pytest.mark.parametrize("adapted", [False, True])
def test_no_process_holds_a_model_whole(adapted: bool, tmp_path: Path) -> None:
    """Half of it is what each of two has to hold, also where LoRA teaches it."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 20}
    given = checkpoint(tmp_path / "given", "llama", False, **sizes)
    call = f"t.rank_main(t.Path({str(given)!r}), t.Path({str(tmp_path)!r}), {adapted})"
    codes, outputs = in_two_processes(f"import test_streaming as t; {call}")
    assert codes == [0, 0], "\n".join(outputs)
    for output in outputs:
        figures = json.loads(output.splitlines()[-1])
        assert figures["whole"] > 800e6
        assert 0.5 < figures["opening"] < 0.95, outputs
        assert figures["release"] < 0.6, outputs
    assert len(list((tmp_path / "release" / "language").glob("model-*"))) > 5
    for name in ("given", "parts", "release"):  # pytest would keep a gigabyte
        shutil.rmtree(tmp_path / name)
