"""Two processes that share a batch train exactly like one process that has all of it."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from ddt_llama import distributed
from ddt_llama.cli import main
from ddt_llama.language.backbone import BackboneConfig, build
from ddt_llama.language.batches import Batch
from ddt_llama.language.vocabulary import Vocabulary
from ddt_llama.runs import Run
from ddt_llama.states import newest_state
from ddt_llama.training.alignment import Alignment, AlignmentConfig
from ddt_llama.training.language import NextToken
from ddt_llama.training.loop import TrainConfig, train
from ddt_llama.training.muon import orthogonal, orthogonal_together
from ddt_llama.training.optim import OptimConfig


@dataclass(frozen=True)
class Recipe:
    train: TrainConfig = field(default_factory=TrainConfig)


CONFIG = TrainConfig(
    steps=8,
    batch=8,
    bf16=False,
    log_every=1,
    tensorboard=False,
    ema=0.9,
    optim=OptimConfig(lr=0.05, warmup=2, weight_decay=0.1),
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(distributed.rank())  # ranks start apart; rank 0 must win
        self.body = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 2))
        self.unused = nn.Linear(
            2, 2
        )  # without gradient: weight decay must spare it, as in one process
        self.register_buffer("total", torch.zeros(2))


def stream(number):
    """Eight rows, of which each rank takes its share."""
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(number))
    share = 8 // distributed.world_size()
    return x[distributed.rank() * share :][:share]


class Squares:
    def __init__(self, stop_at=0):
        self.stop_at = stop_at

    def __call__(self, model, x, step_seed):
        out = model.body(x)
        self.sum = out.detach().sum(0)
        return (out - x[:, :2]).square().mean(), {}

    def after_step(self, model, step):
        model.total += distributed.all_reduce_sum(self.sum)
        if step == self.stop_at and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def fit(folder, config=CONFIG, stop_at=0):
    model = Net()
    with Run.create_or_resume(folder, Recipe(config)) as run:
        return train(model, Squares(stop_at), stream, config, run), model


def language_gradients(rows):
    """Gradients of the language objective on some rows of a batch, averaged over processes.

    The first row has one supervised id of text, the second nine codes.
    """
    vocabulary = Vocabulary(text_size=20, codebook_size=30, num_tokens=4)
    sizes = {"dim": 16, "depth": 1, "num_heads": 2, "num_kv_heads": 1, "mlp_dim": 32}
    model = build(BackboneConfig(**sizes, max_positions=32), vocabulary)
    ids = torch.randint(20, (2, 10), generator=torch.Generator().manual_seed(5))
    ids[1] += vocabulary.code_offset
    labels = torch.where(torch.tensor([[9], [1]]) <= torch.arange(10), ids, -100)
    objective = NextToken(vocabulary, text_weight=3.0)
    loss, _ = objective(model, (ids[rows], labels[rows], ids[rows] >= 0), 0)
    loss.backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    distributed.average_gradients(parameters)
    return [p.grad for p in parameters]


def aligned_gradients(rows):
    """Do the same with an alignment: of five documents two come under their own text and another's.

    The first process has two of them, the second three.
    """
    vocabulary = Vocabulary(text_size=20, codebook_size=30, num_tokens=4)
    sizes = {"dim": 16, "depth": 1, "num_heads": 2, "num_kv_heads": 1, "mlp_dim": 32}
    config = BackboneConfig(**sizes, max_positions=32)
    model, reference = build(config, vocabulary), build(config, vocabulary, seed=1)
    ids = torch.randint(20, (5, 10), generator=torch.Generator().manual_seed(5))
    ids[:, 5:] += vocabulary.code_offset
    labels = torch.where(torch.arange(10) >= 4, ids, -100)
    sides = torch.tensor([1, -1, 0, 1, -1])[:, None].expand(5, 10)
    objective = Alignment(NextToken(vocabulary), reference, AlignmentConfig(0.5, 3.0))
    batch = Batch(ids[rows], labels[rows], torch.ones_like(ids[rows]), contrast=sides[rows])
    loss, _ = objective(model, batch, 0)
    loss.backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    distributed.average_gradients(parameters)
    return [p.grad for p in parameters]


def rank_main(folder):
    """What each of the two processes runs: stopped by a signal to rank 1 alone, then resumed."""
    distributed.setup()
    gathered = distributed.all_gather(torch.full((1, 2), float(distributed.rank())))
    assert gathered.tolist() == [[0.0, 0.0], [1.0, 1.0]]
    assert float(distributed.broadcast(torch.tensor(float(distributed.rank())))) == 0.0
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(4 + n % 2, 6, generator=generator) for n in range(5)]
    shared = orthogonal_together(matrices)
    for mine, alone in zip(shared, orthogonal(matrices), strict=True):
        torch.testing.assert_close(mine, alone, rtol=0, atol=0.02)
    everyone = distributed.all_gather(torch.cat([part.flatten() for part in shared])[None])
    assert torch.equal(everyone[0], everyone[1])
    mine = slice(distributed.rank(), distributed.rank() + 1)
    for shared, alone in zip(
        language_gradients(mine), language_gradients(slice(0, 2)), strict=True
    ):
        torch.testing.assert_close(shared, alone, rtol=1e-4, atol=1e-6)
    mine = slice(2, 5) if distributed.rank() else slice(0, 2)
    for shared, alone in zip(aligned_gradients(mine), aligned_gradients(slice(0, 5)), strict=True):
        torch.testing.assert_close(shared, alone, rtol=1e-4, atol=1e-6)
    outcome, _ = fit(folder, stop_at=3)
    assert (outcome.step, outcome.finished) == (4, False)
    assert outcome.stopped == ("SIGTERM" if distributed.rank() else "another process stops")
    # One clock says when time is over; by the other it would be after every step.
    limit = 60.0 if distributed.is_main() else 0.0
    outcome, model = fit(folder, replace(CONFIG, minutes=limit))
    assert outcome.finished
    totals = distributed.all_gather(torch.cat([p.flatten() for p in model.parameters()])[None])
    assert torch.equal(totals[0], totals[1])
    averages = outcome.ema.state_dict().values()
    totals = distributed.all_gather(torch.cat([average.flatten() for average in averages])[None])
    assert torch.equal(totals[0], totals[1])
    distributed.teardown()


def in_two_processes(call):
    """Return exit codes and outputs of two ranks that carry out some Python code."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, **place, "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, "-c", call]
        children.append(
            subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [child.communicate(timeout=200)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    return [child.returncode for child in children], outputs


@pytest.mark.slow
def test_a_mistake_is_told_once_and_ends_both_processes(tmp_path):
    (tmp_path / "letter.txt").write_text("somebody's")
    recipe = f"nano_tokenizer --out {tmp_path} --train.batch 4 --train.tensorboard false"
    call = f"import sys, ddt_llama.cli as c; sys.exit(c.main(['train', *{recipe.split()!r}]))"
    codes, (first, other) = in_two_processes(call)
    assert codes == [2, 2], first + other
    assert f"error: {tmp_path}: not empty and not a run" in first
    assert "Traceback" not in first + other
    assert "error" not in other
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def train_until_told(folder):
    """What each of two processes runs, of which the second is told to end."""
    metrics = Path(folder, "metrics.jsonl")

    def tell():
        while not metrics.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    if distributed.rank() == 1:
        threading.Thread(target=tell, daemon=True).start()
    fields = "--train.batch 4 --train.log-every 1 --train.tensorboard false"
    sys.exit(main(["train", "nano_tokenizer", "--out", folder, *fields.split()]))


@pytest.mark.slow
def test_who_was_not_told_to_end_says_that_the_training_goes_on(tmp_path):
    run = str(tmp_path / "run")
    codes, outputs = in_two_processes(
        f"import test_two_processes as t; t.train_until_told({run!r})"
    )
    assert codes == [75, 0], "\n".join(outputs)
    assert "steps done; the same command goes on" in outputs[0]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    folder = str(tmp_path / "two")
    codes, outputs = in_two_processes(
        f"import test_two_processes as t; t.rank_main(t.Path({folder!r}))"
    )
    assert codes == [0, 0], outputs
    _, model = fit(tmp_path / "one")
    two, one = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("two", "one")
    )
    assert [row["step"] for row in two] == list(range(1, 9))
    for name in ("loss", "grad_norm", "lr", "images"):
        assert [row[name] for row in two] == pytest.approx([row[name] for row in one], rel=1e-4)
    shared = newest_state(tmp_path / "two" / "checkpoints")
    assert shared is not None
    tensors = {name: torch.zeros(shape) for name, shape in shared.shapes.items()}
    shared.read(tensors)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensors[f"model.{name}"], tensor, rtol=1e-4, atol=1e-5)


def test_one_process_needs_no_group():
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    tensor = torch.arange(3.0)
    assert distributed.all_reduce_sum(tensor) is tensor
    assert distributed.all_gather(tensor) is tensor
    assert distributed.broadcast(tensor) is tensor
    assert distributed.on_main(lambda: "done") == "done"
    assert tensor.tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("text", ["-1", "two", "1.5"])
def test_a_wrong_world_is_refused(monkeypatch, text):
    from ddt_llama.config import UserError

    monkeypatch.setenv("WORLD_SIZE", text)
    with pytest.raises(UserError, match="WORLD_SIZE: given"):
        distributed.world_size()
