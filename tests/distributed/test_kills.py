"""Killed at twenty random moments, a training repeats no step, loses none, and learns the same."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn

from ddt_llama.runs import Run
from ddt_llama.training.loop import TrainConfig, train
from ddt_llama.training.optim import OptimConfig

KILLS = 20
SLOW = float(os.environ.get("SLOW", "0"))  # seconds a step, so that a kill comes between two
CONFIG = TrainConfig(
    steps=500,
    batch=4,
    bf16=False,
    log_every=1,
    sample_every=100,
    checkpoint_every=3,
    tensorboard=False,
    ema=0.9,
    optim=OptimConfig(lr=0.01, warmup=5),
)


@dataclass(frozen=True)
class Recipe:
    train: TrainConfig = field(default_factory=TrainConfig)


class Noisy:
    """Mean squared error of a network that also draws random numbers of its own."""

    def __call__(self, model, batch, step_seed):
        noise = torch.randn(batch.shape, generator=torch.Generator().manual_seed(step_seed))
        return (model(batch) - batch + 0.1 * noise).square().mean(), {}


def stream(number):
    time.sleep(SLOW)
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(number))


def fit(folder):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.1), nn.Linear(8, 3))
    with Run.create_or_resume(folder, Recipe(CONFIG)) as run:
        train(model, Noisy(), stream, CONFIG, run)


def in_a_child(folder):
    """Train in a copy of this process, which has imported everything; return its number."""
    child = os.fork()
    if child:
        return child
    try:
        fit(folder)
    finally:
        os._exit(0)


def kill_often(folder):
    """Kill a training again and again, at moments of which each is as likely; then let it end."""
    chance = random.Random(0)
    reached = []
    for _ in range(KILLS):
        child = in_a_child(folder)
        time.sleep(chance.uniform(0.1, 1.5))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "it was done before it was killed often enough"
        reached.append(len(series(folder)))
    os.waitpid(in_a_child(folder), 0)
    print(reached)


def series(folder):
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in lines if line.endswith("}")]


def figures(folder):
    return [
        tuple(record[name] for name in ("step", "loss", "grad_norm", "lr"))
        for record in map(json.loads, series(folder))
    ]


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path):
    """In a process of its own: one that has computed gradients cannot be copied."""
    call = f"import test_kills as t; t.kill_often(t.Path({str(tmp_path / 'cut')!r}))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SLOW": "0.03"}
    environment["PYTHONPATH"] = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", call], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    reached = json.loads(done.stdout.splitlines()[-1])
    assert len(set(reached)) > KILLS // 4  # kills came at many moments of the training
    fit(tmp_path / "whole")
    assert [step for step, *_ in figures(tmp_path / "whole")] == list(range(1, 501))
    assert figures(tmp_path / "cut") == figures(tmp_path / "whole")
