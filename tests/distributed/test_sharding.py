"""A training in shards is the training of one process: its losses, its states, its weights."""

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_two_processes import in_two_processes
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ddt_llama import distributed
from ddt_llama.language.backbone import BackboneConfig, build
from ddt_llama.language.vocabulary import Vocabulary
from ddt_llama.runs import Run
from ddt_llama.tokenizer import SpatialTokenizer, TimestepTokenizer, TimestepTokenizerConfig
from ddt_llama.tokenizer.decoder import DecoderConfig
from ddt_llama.tokenizer.encoder import EncoderConfig
from ddt_llama.tokenizer.quantizer import QuantizerConfig
from ddt_llama.tokenizer.spatial import SpatialTokenizerConfig
from ddt_llama.training import sharding
from ddt_llama.training.language import NextToken
from ddt_llama.training.loop import TrainConfig, train
from ddt_llama.training.optim import OptimConfig
from ddt_llama.training.spatial import SpatialObjective, SpatialObjectiveConfig
from ddt_llama.training.timestep import TimestepObjective, TimestepObjectiveConfig

VOCABULARY = Vocabulary(text_size=21, codebook_size=30, num_tokens=4)
CONFIG = TrainConfig(
    steps=8,
    batch=8,
    bf16=False,
    log_every=1,
    checkpoint_every=4,
    sample_every=4,
    tensorboard=False,
    ema=0.9,
    clip=0.5,
    optim=OptimConfig(lr=0.01, warmup=2, weight_decay=0.1),
)
KINDS = ("language", "timestep", "spatial")


@dataclass(frozen=True)
class Recipe:
    train: TrainConfig = field(default_factory=TrainConfig)


def share(rows: Tensor) -> Tensor:
    """Return what this process has of a batch."""
    return rows.chunk(distributed.world_size())[distributed.rank()]


def numbered(step: int) -> torch.Generator:
    return torch.Generator().manual_seed(step)


def documents(step: int) -> tuple[Tensor, ...]:
    ids = torch.randint(20, (8, 12), generator=numbered(step))
    ids[:, 5:9] += VOCABULARY.code_offset
    return share(ids), share(ids), share(ids >= 0)


def images(step: int) -> Tensor:
    return share(torch.rand(8, 3, 16, 16, generator=numbered(step)) * 2 - 1)


def trained(kind: str) -> tuple[nn.Module, Any, Any]:
    """Return a small network of each kind, its objective and its batches."""
    torch.manual_seed(0)
    probed = torch.rand(2, 3, 16, 16, generator=numbered(99)) * 2 - 1
    book = QuantizerConfig(codebook_size=16, code_dim=4)
    if kind == "language":
        sizes = {"dim": 16, "depth": 3, "num_heads": 2, "num_kv_heads": 1, "mlp_dim": 32}
        model = build(BackboneConfig(**sizes, max_positions=32), VOCABULARY)
        return model, NextToken(VOCABULARY), documents
    if kind == "spatial":
        shape = SpatialTokenizerConfig(16, (8, 8, 8), (1, 1, 1), groups=4, quantizer=book)
        objective = SpatialObjective(SpatialObjectiveConfig(probe_every=4), probed)
        return SpatialTokenizer(shape), objective, images
    shape = TimestepTokenizerConfig(
        image_size=16,
        patch=4,
        num_tokens=5,
        quantizer=book,
        encoder=EncoderConfig(dim=24, depth=2, num_heads=2),
        decoder=DecoderConfig(dim=24, depth=3, num_heads=2),
    )
    # Nothing random that depends on the rank, so that two processes can equal one.
    chosen = TimestepObjectiveConfig(probe_every=4, round_from=0, round_until=2, own=0.0)
    return TimestepTokenizer(shape), Same(TimestepObjective(chosen, probed)), images


class Same:
    """Gives every row of the batch the same noise and times, whichever process has it."""

    def __init__(self, objective: TimestepObjective) -> None:
        self.objective = objective
        self.before_step, self.after_step = objective.before_step, objective.after_step

    def __call__(self, model: Any, batch: Tensor, step_seed: int) -> tuple[Tensor, Any]:
        losses = [self.objective(model, row[None], 7) for row in batch]
        loss = torch.stack([loss for loss, _ in losses]).mean()
        return loss, losses[0][1]


def config_of(kind: str, **changes: Any) -> TrainConfig:
    muon = replace(CONFIG.optim, kind="muon" if kind == "language" else "adamw")
    recompute = {"language": "blocks", "timestep": "none", "spatial": "none"}[kind]
    return replace(CONFIG, optim=muon, recompute=recompute, **changes)


def fit(kind: str, folder: Path, **changes: Any) -> tuple[Any, nn.Module]:
    """Train one kind of network, or go on with it."""
    model, objective, stream = trained(kind)
    config = config_of(kind, **changes)
    with Run.create_or_resume(folder, Recipe(config)) as run:
        return train(model, objective, stream, config, run), model


def first_half(kind: str, folder: Path, **changes: Any) -> None:
    """Train to the middle, as if killed there: the whole length decides the learning rate."""
    model, objective, stream = trained(kind)
    config = config_of(kind, **changes)

    def stopped(step: int) -> Any:
        if step == 4:
            raise KeyboardInterrupt
        return stream(step)

    with Run.create_or_resume(folder, Recipe(config)) as run:
        try:
            train(model, objective, stopped, config, run)
        except KeyboardInterrupt:
            run.wait()


def losses(folder: Path) -> list[tuple[int, float, float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def rank_main(folder: Path) -> None:
    """What each of two processes does: half of one training, the other half of another, a whole."""
    distributed.setup()
    for kind in KINDS:
        first_half(kind, folder / f"{kind}-two-one", shard="full")
        fit(kind, folder / f"{kind}-one-two", shard="full")
        # One clock says when to save, or the other process would wait for ever.
        minutes = 10.0 * distributed.is_main()
        place = folder / f"{kind}-two"
        outcome, model = fit(kind, place, shard="hybrid", checkpoint_minutes=minutes)
        held = sum(p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor))
        whole = sum(p.numel() for p in model.parameters())
        assert all(isinstance(p, DTensor) for p in model.parameters())
        assert held < 0.65 * whole, (kind, held, whole)
        with outcome.ema.swapped():
            sharding.gather(model)
        if distributed.is_main():
            assert not any(isinstance(p, DTensor) for p in model.parameters())
            torch.save(model.state_dict(), folder / f"{kind}.pt")
    distributed.teardown()


@pytest.mark.slow
def test_shards_of_two_processes_train_as_one(tmp_path: Path) -> None:
    """Begun by two and finished by one, begun by one and finished by two, and by two alone."""
    alone = {}
    for kind in KINDS:
        alone[kind] = fit(kind, tmp_path / kind)
        first_half(kind, tmp_path / f"{kind}-one-two")
        assert [step for step, *_ in losses(tmp_path / f"{kind}-one-two")] == [1, 2, 3, 4]
    path = str(tmp_path)
    codes, outputs = in_two_processes(f"import test_sharding as t; t.rank_main(t.Path({path!r}))")
    assert codes == [0, 0], "\n".join(outputs)
    for kind in KINDS:
        fit(kind, tmp_path / f"{kind}-two-one")
        wanted = losses(tmp_path / kind)
        assert len(wanted) == 8
        for way in ("one-two", "two-one", "two"):
            found = losses(tmp_path / f"{kind}-{way}")
            assert [step for step, *_ in found] == list(range(1, 9)), (kind, way)
            for one, other in zip(found, wanted, strict=True):
                assert one[1:] == pytest.approx(other[1:], rel=2e-3), (kind, way, one, other)
        outcome, model = alone[kind]
        begun = trained(kind)[0].state_dict()
        gathered = torch.load(tmp_path / f"{kind}.pt", weights_only=True)
        with outcome.ema.swapped():
            for name, tensor in model.state_dict().items():
                # Not number by number: Muon's products are rounded to bfloat16 where a CPU has it.
                # What begins at zero has no gradient but noise at first, which both blow up.
                if not begun[name].any():
                    continue
                apart = (gathered[name].float() - tensor.float()).norm()
                assert apart <= 0.01 * tensor.float().norm() + 1e-6, (kind, name)


def test_blocks_are_the_outermost_members_of_lists() -> None:
    names = {}
    for kind in KINDS:
        model = trained(kind)[0]
        places = {id(module): name for name, module in model.named_modules()}
        names[kind] = [places[id(block)] for block in sharding.blocks_of(model)]
    assert names["language"] == [f"model.layers.{n}" for n in range(3)]
    encoder = [f"encoder.blocks.{n}" for n in range(2)]
    assert names["timestep"] == [*encoder, *(f"decoder.blocks.{n}" for n in range(3))]
    assert names["spatial"] == []
    decoder_block = sharding.blocks_of(trained("timestep")[0])[-1]
    assert set(sharding.methods_of(decoder_block)) == {"remember", "denoise", "joint"}


@pytest.mark.parametrize("kind", ["blocks", "selective"])
@pytest.mark.parametrize("network", ["language", "timestep"])
def test_what_is_computed_again_changes_no_gradient(kind: Any, network: str) -> None:
    gradients = []
    for recompute in ("none", kind):
        model, objective, stream = trained(network)
        sharding.recompute_blocks(model, recompute)
        if hasattr(objective, "before_step"):
            objective.before_step(model, 0)
        loss, _ = sharding.Pass(model, objective)(stream(0), 3)
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_one_process_alone_has_nothing_to_spread(tmp_path: Path) -> None:
    assert "WORLD_SIZE" not in os.environ
    assert not sharding.is_sharded("full")
    outcome, model = fit("language", tmp_path / "run", shard="full", steps=1)
    assert outcome.finished
    assert not any(isinstance(p, DTensor) for p in model.parameters())
