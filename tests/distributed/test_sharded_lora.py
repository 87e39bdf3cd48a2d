"""LoRA in shards of two processes learns what one process learns, and leaves the same adapter."""

from pathlib import Path

import pytest
import torch
from test_streaming import SHARDS, TRAIN, checkpoint, losses, weights
from test_two_processes import in_two_processes

import ddt_llama
from ddt_llama import distributed
from ddt_llama.checkpoint import load_tensors
from ddt_llama.cli import main
from ddt_llama.config import load_json
from ddt_llama.language import streaming
from ddt_llama.recipes import jobs
from ddt_llama.recipes.samples import DrawingSamples

LORA = ["train", "lora", "--data", "shapes", *TRAIN, "--train.ema", "0.5", "--lora.rank", "2"]
LORA += ["--train.optim.lr", "0.01", "--train.optim.warmup", "1"]
STOP = ["--minutes", "0"]
ROWS = ["--tokenizer", "nano", "--lora.rows", "true"]

READ = (
    lambda run: weights(run / "parts" / "language"),
    lambda run: weights(run / "release" / "language"),
    lambda run: load_tensors(run / "adapter" / "adapter_model.safetensors"),
    lambda run: load_json(run / "adapter" / "config.json")["adapter_of"],
)


def train(folder: Path, name: str, run: str, *fields: str) -> None:
    """Carry out `ddt train lora` beside the model `name`."""
    rows = [] if name == "ours" else ROWS
    start = folder / ("one-plain" if name == "ours" else name)
    out = folder / f"{run}-{name}"
    assert main([*LORA, "--start", str(start), *rows, "--out", str(out), *fields]) == 0


def rank_main(folder: Path) -> None:
    """What each of two processes does: the second part of a training, a whole, a first part."""
    streaming.FILE_SIZE, jobs.LENGTHS_OF = "40KB", 4
    distributed.teardown = distributed.barrier  # one group for all
    train(folder, "tied", "two", *SHARDS)
    train(folder, "plain", "two", *SHARDS, *STOP)
    train(folder, "plain", "two", *SHARDS)
    train(folder, "ours", "two", *SHARDS, *STOP)


@pytest.mark.slow
def test_shards_of_two_processes_adapt_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With rows, tied and not, and without; begun by one, by two, and finished by the others."""
    monkeypatch.setattr(jobs, "LENGTHS_OF", 4)
    monkeypatch.setattr(DrawingSamples, "__call__", lambda *_: {})  # in shards there are none
    checkpoint(tmp_path / "tied", "gemma2", tied=True)
    checkpoint(tmp_path / "plain", "llama", tied=False)
    for name in ("tied", "plain", "ours"):
        train(tmp_path, name, "one")
    train(tmp_path, "tied", "two", *STOP)
    call = f"import test_sharded_lora as t; t.rank_main(t.Path({str(tmp_path)!r}))"
    codes, outputs = in_two_processes(call)
    assert codes == [0, 0], "\n".join(outputs)
    for name in ("tied", "plain", "ours"):
        released = tmp_path / f"two-{name}" / "release" / "language"
        assert len(list(released.glob("model-*"))) > 1
    assert len(losses(tmp_path / "two-ours")) == 1
    beside = ddt_llama.load(tmp_path / "one-plain", adapter=tmp_path / "two-ours")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        merged = ddt_llama.load(tmp_path / "two-ours").language(ids).logits
        assert torch.equal(beside.language(ids).logits, merged)
    train(tmp_path, "ours", "two")
    for name, ends in (
        ("tied", ("_proj.weight", "tokens.weight")),
        ("plain", ("_proj.weight", "tokens.weight", "head.weight")),
        ("ours", ("_proj.weight",)),
    ):
        assert_same(tmp_path / f"two-{name}", tmp_path / f"one-{name}", ends)


def assert_same(run: Path, alone: Path, ends: tuple[str, ...]) -> None:
    """Losses, kept and merged weights, adapter; only weights whose names end so have learned."""
    assert len(losses(alone)) == 3
    for one, other in zip(losses(run), losses(alone), strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    before, after, learned, told = ([of(one) for one in (run, alone)] for of in READ)
    assert told[0] == told[1]
    for found, wanted in (before, after, learned):
        assert found.keys() == wanted.keys()
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=2e-4)
    for name, weight in before[0].items():
        assert torch.equal(weight, before[1][name])
        assert torch.equal(weight, after[0][name]) is not name.endswith(ends), name
