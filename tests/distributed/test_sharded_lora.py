"""LoRA in shards of two processes learns what one process learns, and leaves the same adapter."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sharding import documents
from test_two_processes import in_two_processes

from ddt_llama import distributed
from ddt_llama.checkpoint import load_tensors
from ddt_llama.language import Vocabulary, lora
from ddt_llama.language.backbone import BackboneConfig, build
from ddt_llama.language.lora import LoraConfig
from ddt_llama.runs import Run
from ddt_llama.training import sharding
from ddt_llama.training.language import NextToken
from ddt_llama.training.loop import TrainConfig, train
from ddt_llama.training.optim import OptimConfig

VOCABULARY = Vocabulary(text_size=21, codebook_size=30, num_tokens=4)
CONFIG = TrainConfig(
    steps=6,
    batch=8,
    bf16=False,
    log_every=1,
    checkpoint_every=3,
    tensorboard=False,
    ema=0.9,
    clip=0.5,
    optim=OptimConfig(lr=0.02, warmup=2),
)


@dataclass(frozen=True)
class Recipe:
    train: TrainConfig = field(default_factory=TrainConfig)


def fit(folder: Path, tied: bool, **changes: Any) -> None:
    """Train adapters and rows; write the merged weights and the adapter beside the run."""
    sizes = {"dim": 16, "depth": 2, "num_heads": 2, "num_kv_heads": 1, "mlp_dim": 32}
    config = replace(CONFIG, **changes)
    model: Any = build(BackboneConfig(**sizes, max_positions=32, tied=tied), VOCABULARY)
    lora.adapt(model, LoraConfig(rank=2, rows=True), VOCABULARY)
    with Run.create_or_resume(folder, Recipe(config)) as run:
        outcome = train(model, NextToken(VOCABULARY), documents, config, run)
        with outcome.ema.swapped():
            if sharding.is_sharded(config.shard):
                sharding.gather(model)
            if distributed.is_main():
                lora.save(folder.with_suffix(".adapter"), model, "base", {})
                with lora.merged(model):
                    torch.save(model.state_dict(), folder.with_suffix(".pt"))


def rank_main(folder: Path) -> None:
    """What each of two processes does."""
    distributed.setup()
    for tied in (True, False):
        fit(folder / f"two-{tied}", tied, shard="full")
    distributed.teardown()


@pytest.mark.slow
def test_shards_of_two_processes_adapt_as_one(tmp_path: Path) -> None:
    path = str(tmp_path)
    call = f"import test_sharded_lora as t; t.rank_main(t.Path({path!r}))"
    codes, outputs = in_two_processes(call)
    assert codes == [0, 0], "\n".join(outputs)
    for tied in (True, False):
        fit(tmp_path / f"one-{tied}", tied)
        series, merged, alone = [], [], []
        for name in (f"one-{tied}", f"two-{tied}"):
            lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
            series.append([(line["loss"], line["grad_norm"]) for line in lines])
            merged.append(torch.load(tmp_path / f"{name}.pt", weights_only=True))
            adapter = tmp_path / f"{name}.adapter"
            alone.append(load_tensors(adapter / "adapter_model.safetensors"))
            assert (adapter / "config.json").read_text() == (
                tmp_path / f"one-{tied}.adapter" / "config.json"
            ).read_text()
        assert len(series[0]) == 6
        torch.testing.assert_close(
            torch.tensor(series[0]), torch.tensor(series[1]), rtol=2e-3, atol=0
        )
        for one, other in (merged, alone):
            assert one.keys() == other.keys()
            for name in one:
                torch.testing.assert_close(one[name], other[name], rtol=1e-2, atol=1e-3)
