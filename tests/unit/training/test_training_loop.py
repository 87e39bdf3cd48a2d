"""The loop learns, resumes exactly, and stops when the loss is no number."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import dataclass, field, replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ddt_llama.config import UserError
from ddt_llama.runs import Run
from ddt_llama.states import newest_state
from ddt_llama.training.loop import TrainConfig, step_seed, train
from ddt_llama.training.optim import OptimConfig
from ddt_llama.training.prefetch import Batches
from ddt_llama.training.watch import PATIENCE, Means, Watch

TRUTH = torch.tensor([[1.0, -2.0, 0.5]])


@dataclass(frozen=True)
class Recipe:
    train: TrainConfig = field(default_factory=TrainConfig)
    width: int = 3


CONFIG = TrainConfig(
    steps=20,
    batch=8,
    bf16=False,
    log_every=1,
    checkpoint_every=5,
    sample_every=1000,
    ema=0.9,
    tensorboard=False,
    optim=OptimConfig(lr=0.2, warmup=2, decay="cosine"),
)


class Line(nn.Module):
    """Linear regression with dropout noise and a buffer that counts steps."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 1)
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        return self.linear(self.drop(x)) * self.frozen


def stream(number):
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(8, 3, generator=generator)
    return x, x @ TRUTH.t()


class Regression:
    """Mean squared error; draws from its step seed, and counts into a buffer after each step."""

    def __call__(self, model, batch, step_seed):
        x, y = batch
        noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(step_seed))
        loss = (model(x) - y - 0.01 * noise).square().mean()
        return loss, {"noise": noise.mean(), "seen": float(model.seen)}

    def after_step(self, model, step):
        model.seen += step


def series(folder, *names):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [tuple(json.loads(line).get(name) for name in ("step", *names)) for line in lines]


def fit(folder, config=CONFIG, objective=None, model=None, **kwargs):
    model = model or Line()
    with Run.create_or_resume(folder, Recipe(config)) as run:
        return train(model, objective or Regression(), stream, config, run, **kwargs), model


def newest(folder):
    state = newest_state(folder / "checkpoints")
    assert state is not None
    return state


FIGURES = ("loss", "noise", "seen", "grad_norm", "lr", "images")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    outcome, model = fit(folder)
    return folder, outcome, model


def test_it_learns_and_logs_each_step_once(unbroken):
    folder, outcome, _ = unbroken
    losses = series(folder, "loss")
    assert outcome.finished
    assert [step for step, _ in losses] == list(range(1, 21))
    assert losses[-1][1] < 0.5 * losses[0][1]


def test_what_a_step_costs_is_logged(tmp_path, monkeypatch):
    """Of an accelerator that is known, the share of what it could do, too."""
    monkeypatch.setattr("ddt_llama.distributed.peak_flops", lambda device: 1e6)
    fit(tmp_path / "run", replace(CONFIG, steps=2), flops=50.0)
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert record["images_per_second"] == pytest.approx(8 * 1000 / record["step_ms"])
        assert record["flops_per_second"] == pytest.approx(50 * record["images_per_second"])
        assert record["mfu"] == pytest.approx(record["flops_per_second"] / 1e6)
        assert 0.05 < record["memory_gib"] < 100
        assert 0 <= record["data_share"] < 1


def test_stopping_by_minutes_then_resuming_changes_nothing(unbroken, tmp_path):
    """`minutes=0` stops after every step, so each step comes from its own resumed start."""
    folder, _, model = unbroken
    step = 0
    while step < CONFIG.steps:
        stopping = replace(CONFIG, minutes=0.0 if step < 7 else None)
        outcome, again = fit(tmp_path / "run", stopping)
        assert outcome.step == (step + 1 if step < 7 else 20)
        step = outcome.step
    assert series(tmp_path / "run", *FIGURES) == series(folder, *FIGURES)
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    assert torch.equal(model.seen, again.seen)


def test_log_windows_survive_a_stop_in_their_middle(tmp_path):
    config = replace(CONFIG, log_every=4, steps=8)
    fit(tmp_path / "a", config)
    for _ in range(3):
        fit(tmp_path / "b", replace(config, minutes=0.0))
    fit(tmp_path / "b", config)
    assert series(tmp_path / "b", *FIGURES) == series(tmp_path / "a", *FIGURES)
    means = [loss for _, loss in series(tmp_path / "a", "loss")]
    single = replace(CONFIG, steps=8)
    fit(tmp_path / "c", single)
    each = [loss for _, loss in series(tmp_path / "c", "loss")]
    assert means == pytest.approx([sum(each[:4]) / 4, sum(each[4:]) / 4])


def test_sigkill_then_resume_gives_the_unbroken_series(unbroken, tmp_path):
    """The killed process runs this module's own training, slowed down so that the kill lands."""
    script = textwrap.dedent("""
        import sys, time, torch
        from pathlib import Path
        torch.set_num_threads(int(sys.argv[3]))
        sys.path.insert(0, sys.argv[1])
        import test_training_loop as t
        class Slow(t.Regression):
            def after_step(self, model, step):
                super().after_step(model, step)
                time.sleep(0.05)
        t.fit(Path(sys.argv[2]), objective=Slow())
    """)
    folder = tmp_path / "run"
    here = os.path.dirname(__file__)
    threads = str(torch.get_num_threads())
    child = subprocess.Popen([sys.executable, "-c", script, here, str(folder), threads])
    metrics = folder / "metrics.jsonl"
    try:
        until = time.monotonic() + 120
        while not metrics.exists() or len(metrics.read_bytes().splitlines()) < 8:
            assert time.monotonic() < until
            assert child.poll() is None
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    written = len(metrics.read_bytes().splitlines())
    assert 8 <= written < 20
    with metrics.open("a") as file:
        file.write('{"step": 9, "lo')  # a line that the kill cut short
    outcome, model = fit(folder)
    assert outcome.finished
    assert series(folder, *FIGURES) == series(unbroken[0], *FIGURES)
    assert torch.equal(model.linear.weight, unbroken[2].linear.weight)


def test_a_signal_saves_and_a_second_start_goes_on(unbroken, tmp_path, capsys):
    class Interrupted(Regression):
        def after_step(self, model, step):
            super().after_step(model, step)
            if step == 7:
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    outcome, _ = fit(tmp_path / "run", objective=Interrupted())
    assert signal.getsignal(signal.SIGTERM) is before
    assert (outcome.step, outcome.finished) == (8, False)
    assert "SIGTERM: saved at step 8" in capsys.readouterr().out
    fit(tmp_path / "run")
    assert series(tmp_path / "run", *FIGURES) == series(unbroken[0], *FIGURES)


def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning(unbroken, tmp_path):
    fit(tmp_path / "run", replace(CONFIG, steps=12))
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    assert newest.name == "step-00000012"
    (weights,) = newest.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.warns(UserWarning, match=r"\.safetensors: damaged"):
        fit(tmp_path / "run")
    shorter = [row for row in series(tmp_path / "run", "loss", "noise") if row[0] <= 10]
    assert shorter[:3] == series(unbroken[0], "loss", "noise")[:3]
    assert [row[0] for row in series(tmp_path / "run")] == list(range(1, 21))


def test_accumulation_equals_the_larger_batch(tmp_path):
    class Plain:
        def __call__(self, model, batch, step_seed):
            x, y = batch
            return (model.linear(x) - y).square().mean(), {}

    def doubled(number):
        pairs = [stream(2 * number), stream(2 * number + 1)]
        return tuple(torch.cat(part) for part in zip(*pairs, strict=True))

    config = replace(CONFIG, steps=6)
    fit(tmp_path / "a", replace(config, accumulate=2), Plain())
    with Run.create_or_resume(tmp_path / "b", Recipe(config)) as run:
        train(Line(), Plain(), doubled, config, run)
    small, large = series(tmp_path / "a", "loss"), series(tmp_path / "b", "loss")
    assert small[-1] == pytest.approx(large[-1], rel=1e-5)


def test_batches_are_read_ahead_by_another_thread():
    read = []

    def stream(number):
        read.append((number, threading.get_ident()))
        return torch.tensor(number)

    with Batches(stream, torch.device("cpu"), ahead=2) as batches:
        assert [int(batches.take(number)) for number in (0, 1)] == [0, 1]
    assert {number for number, _ in read} >= {0, 1, 2}
    assert all(thread != threading.get_ident() for _, thread in read)


def test_figures_that_are_no_numbers_are_left_out_of_the_means():
    means = Means()
    for loss, norm in ((1.0, math.inf), (3.0, 2.0), (math.nan, math.nan)):
        means.add({"loss": loss, "grad_norm": norm})
    assert means.take() == {"loss": 2.0, "grad_norm": 2.0}


def test_prefetching_changes_nothing(unbroken, tmp_path):
    fit(tmp_path / "run", replace(CONFIG, prefetch=3))
    assert series(tmp_path / "run", *FIGURES) == series(unbroken[0], *FIGURES)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_with_the_last_checkpoint(tmp_path, bad):
    class Breaks(Regression):
        def __call__(self, model, batch, seed):
            loss, metrics = super().__call__(model, batch, seed)
            return (loss * bad if model.seen >= 28 else loss), metrics  # 1 + ... + 7: step 8

    with pytest.raises(UserError, match=f"stopped at step 8 because the loss is {bad}") as error:
        fit(tmp_path / "run", objective=Breaks())
    assert "the checkpoint of step 5 is kept" in str(error.value)
    assert "\n" not in str(error.value)
    kept = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert kept == ["step-00000005"]
    assert newest(tmp_path / "run").step == 5


def test_a_gradient_that_is_no_number_is_skipped_then_stops(tmp_path):
    class Breaks(Regression):
        def __init__(self, wanted):
            self.wanted, self.step = wanted, 0

        def before_step(self, model, step):
            self.step = step

        def __call__(self, model, batch, seed):
            loss, metrics = super().__call__(model, batch, seed)
            if self.step in self.wanted:
                loss = loss + 0 * model.linear.weight.sum().sub(model.linear.weight.sum()).sqrt()
            return loss, metrics

    outcome, model = fit(tmp_path / "few", objective=Breaks({3, 4, 9}))
    assert outcome.finished
    assert torch.isfinite(model.linear.weight).all()
    with pytest.raises(UserError, match="not finite 5 times in a row"):
        fit(tmp_path / "many", objective=Breaks(set(range(6, 20))))


def test_an_exploding_loss_stops(tmp_path):
    class Explodes(Regression):
        def __call__(self, model, batch, seed):
            loss, metrics = super().__call__(model, batch, seed)
            return loss * (1e6 if model.seen >= 25 * 26 / 2 else 1.0), metrics

    with pytest.raises(UserError, match=r"stopped at step 30 because the loss .* stays above 10"):
        fit(tmp_path / "run", replace(CONFIG, steps=40), Explodes())


def test_no_checkpoint_is_made_of_a_loss_that_has_run_away(tmp_path):
    class Explodes(Regression):
        def __call__(self, model, batch, seed):
            loss, metrics = super().__call__(model, batch, seed)
            return loss * (1e6 if model.seen >= 25 * 26 / 2 else 1.0), metrics

    config = replace(CONFIG, steps=40, checkpoint_every=14, keep=9)
    with pytest.raises(UserError, match="the checkpoint of step 14 is kept"):
        fit(tmp_path / "run", config, Explodes())
    assert newest(tmp_path / "run").step == 14  # 28 was due among the high ones


def test_a_checkpoint_missed_is_made_at_the_next_good_step(tmp_path):
    class Spikes(Regression):
        def __call__(self, model, batch, seed):
            loss, metrics = super().__call__(model, batch, seed)
            spikes = model.seen == 23 * 24 / 2  # in step 24
            return loss * (1e6 if spikes else 1.0), metrics

    fit(tmp_path / "run", replace(CONFIG, steps=30, checkpoint_every=24, keep=9), Spikes())
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {"step-00000025", "step-00000030"}


def test_the_loop_shows_its_figures_in_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    fit(tmp_path / "run", replace(CONFIG, tensorboard=True))
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


def test_samples_see_the_average_and_training_does_not(unbroken, tmp_path):
    seen = []

    def sample(model, step, run):
        seen.append((step, model.linear.weight.clone(), model.training))
        (run.samples / f"{step}.txt").write_text("x")
        return {"score": step / 10}

    outcome, model = fit(tmp_path / "run", replace(CONFIG, sample_every=8), sample=sample)
    assert [step for step, _, _ in seen] == [8, 16, 20]
    assert not any(training for _, _, training in seen)
    average = outcome.ema.state_dict()["linear.weight"]
    assert torch.equal(seen[-1][1], average)
    assert not torch.equal(average, model.linear.weight)
    assert torch.equal(model.linear.weight, unbroken[2].linear.weight)
    scores = dict(series(tmp_path / "run", "score"))
    assert (scores[8], scores[9]) == (0.8, None)
    assert newest(tmp_path / "run").step == 20
    (file,) = newest(tmp_path / "run").folder.glob("*.safetensors")
    assert torch.equal(load_file(file)["ema.linear.weight"], average)


def test_a_finished_run_started_again_does_nothing_and_may_grow(unbroken, tmp_path):
    fit(tmp_path / "run", replace(CONFIG, steps=4))
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    outcome, _ = fit(tmp_path / "run", replace(CONFIG, steps=4))
    assert (outcome.step, outcome.finished) == (4, True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    outcome, _ = fit(tmp_path / "run", replace(CONFIG, steps=6))
    assert outcome.step == 6


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    fit(tmp_path / "run", replace(CONFIG, steps=2))
    other = Line()
    other.linear = nn.Linear(3, 2)
    with pytest.raises(UserError, match=r"another model \(linear\.bias, linear\.weight\)"):
        fit(tmp_path / "run", replace(CONFIG, steps=4), model=other)


def test_compiling_takes_the_parts_that_the_objective_names(tmp_path):
    compiled = []

    class Part(nn.Linear):
        def compile(self, *args, **kwargs):
            compiled.append(self)

    class Chooses(Regression):
        def parts_to_compile(self, model):
            return [model.linear]

    model = Line()
    model.linear = Part(3, 1)
    fit(tmp_path / "off", replace(CONFIG, steps=1), Chooses(), model)
    assert compiled == []
    fit(tmp_path / "on", replace(CONFIG, steps=1, compile=True), Chooses(), model)
    assert compiled == [model.linear]


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own compiler
def test_the_tenth_training_of_a_process_is_compiled_like_the_first(tmp_path):
    compiled = []

    class Counted(Line):
        def compile(self, *args, **kwargs):
            super().compile(backend=lambda graph, inputs: compiled.append(self) or graph.forward)

    for number in range(10):
        model = Counted()
        fit(tmp_path / str(number), replace(CONFIG, steps=1, compile=True), model=model)
        assert model in compiled, f"training {number} ran plain"


def test_step_seeds_are_fixed_and_all_different():
    assert step_seed(0, 0, 0) == 759540517790923586  # another value would change every run
    seeds = {step_seed(a, b, c) for a in range(5) for b in range(50) for c in range(4)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("changes", [{"steps": 0}, {"clip": -1.0}, {"keep": 0}, {"ema": 1.0}])
def test_values_that_cannot_train_are_refused(changes):
    with pytest.raises(UserError, match=next(iter(changes))):
        replace(CONFIG, **changes)


def test_a_loss_of_either_sign_does_not_run_away_and_one_that_grows_does() -> None:
    watch = Watch(10)
    near_zero = 0.15 * torch.randn(2000, generator=torch.Generator().manual_seed(0))
    assert [watch.verdict(float(one), 1.0) for one in near_zero] == [None] * 2000
    told = [watch.verdict(5.0, 1.0) for _ in range(PATIENCE)]
    assert told[:-1] == [None] * (PATIENCE - 1)
    assert "stays above 10 times" in str(told[-1])


def test_a_wish_to_stop_waits_for_a_step_that_may_be_saved(tmp_path, capsys):
    class Spikes(Regression):
        def __call__(self, model, batch, seed):
            loss, metrics = super().__call__(model, batch, seed)
            if model.seen == 23 * 24 / 2:  # in step 24
                os.kill(os.getpid(), signal.SIGTERM)
                return loss * 1e6, metrics
            return loss, metrics

    outcome, _ = fit(tmp_path / "run", replace(CONFIG, steps=40, checkpoint_every=39), Spikes())
    assert (outcome.step, outcome.finished) == (25, False)
    assert newest(tmp_path / "run").step == 25
    assert "SIGTERM: saved at step 25" in capsys.readouterr().out


def test_a_resumed_run_still_knows_how_large_its_losses_were(tmp_path):
    class Explodes(Regression):
        def __call__(self, model, batch, seed):
            loss, metrics = super().__call__(model, batch, seed)
            return loss * 1e6, metrics

    config = replace(CONFIG, optim=replace(CONFIG.optim, decay="constant"))
    fit(tmp_path / "run", replace(config, steps=25))
    with pytest.raises(UserError, match=r"stopped at step 30 because the loss .* stays above 10"):
        fit(tmp_path / "run", replace(config, steps=40), Explodes())


def test_a_run_whose_states_are_all_damaged_does_not_begin_again(tmp_path):
    fit(tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for state in (tmp_path / "run" / "checkpoints").iterdir():
        for weights in state.glob("*.safetensors"):
            weights.write_bytes(b"cut")
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(UserError, match="none of the states can be read"),
    ):
        fit(tmp_path / "run", replace(CONFIG, steps=30))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
