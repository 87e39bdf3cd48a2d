"""The one training loop: it knows models, batches and losses, never images or text.

All randomness of a step comes from `step_seed`, and a stream is a pure function of an integer, so
a run that was stopped at any moment and started again gives the losses of one that never stopped.
"""

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ddt_llama import distributed
from ddt_llama.config import UserError, check_range
from ddt_llama.runs import MAY_CHANGE, MAY_GROW, Run
from ddt_llama.states import State
from ddt_llama.training import sharding
from ddt_llama.training.ema import Ema
from ddt_llama.training.optim import OptimConfig, Optimizer
from ddt_llama.training.prefetch import Batches, Stream
from ddt_llama.training.progress import Display
from ddt_llama.training.watch import Means, Signals, Watch

Metrics = Mapping[str, float | Tensor]
ANOTHER = "another process stops"
Sampler = Callable[[nn.Module, int, Run], Mapping[str, float] | None]


@runtime_checkable
class Objective(Protocol):
    """What a stage minimises.

    May also have `before_step(model, step)`, called with the 0-based number of the update to come
    (schedules), and `after_step(model, step)`, called with the number of updates done (codebooks);
    the metrics that `after_step` may return are logged. `parts_to_compile(model)` names the modules
    that `TrainConfig.compile` compiles, in place of the whole model.
    """

    def __call__(self, model: Any, batch: Any, step_seed: int, /) -> tuple[Tensor, Metrics]:
        """Return the loss to minimise and figures to log."""
        ...


@dataclass(frozen=True)
class TrainConfig:
    """How long and how carefully to train; the optimizer has its own part.

    `batch` counts the images (or documents) of one pass, over all processes together.
    `clip` 0 only measures the gradient norm. `minutes` ends this start early with a checkpoint.
    `bf16`: compute in bf16 where the device gains by it, in float32 elsewhere.
    `prefetch`: batches read ahead. `workers`: processes that prepare the batches of each training
    process, where its device is a GPU (on a CPU they would only take its cores); no more than there
    are cores.
    `explode`: stop where the loss stays above this multiple of its running median.
    `keep` newest states stay, and with `keep_every` every one whose step it divides.
    `shard`: how several processes hold weights, gradients and moments: "none", all of them
    everything; "full", each a shard; "hybrid", each machine everything, in shards. `offload` keeps
    a GPU's shards in the memory of its CPU. `recompute`: what the backward pass needs is computed
    again, of "blocks", or of all but their matrix products ("selective"). These three change memory
    and time, nothing else.
    """

    steps: int = field(default=1000, metadata=MAY_GROW)
    batch: int = 64
    accumulate: int = 1
    clip: float = 1.0
    bf16: bool = True
    compile: bool = field(default=False, metadata=MAY_CHANGE)
    seed: int = 0
    ema: float = 0.999
    optim: OptimConfig = field(default_factory=OptimConfig)
    explode: float = field(default=10.0, metadata=MAY_CHANGE)
    log_every: int = field(default=10, metadata=MAY_CHANGE)
    sample_every: int = field(default=500, metadata=MAY_CHANGE)
    checkpoint_every: int = field(default=500, metadata=MAY_CHANGE)
    checkpoint_minutes: float = field(default=10.0, metadata=MAY_CHANGE)
    keep: int = field(default=2, metadata=MAY_CHANGE)
    keep_every: int = field(default=0, metadata=MAY_CHANGE)
    minutes: float | None = field(default=None, metadata=MAY_CHANGE)
    prefetch: int = field(default=0, metadata=MAY_CHANGE)
    workers: int = field(default=0, metadata=MAY_CHANGE)
    tensorboard: bool = field(default=True, metadata=MAY_CHANGE)
    shard: sharding.Shard = field(default="none", metadata=MAY_CHANGE)
    offload: bool = field(default=False, metadata=MAY_CHANGE)
    recompute: sharding.Recompute = field(default="none", metadata=MAY_CHANGE)

    def __post_init__(self) -> None:
        """Refuse values that cannot train."""
        check_range(self, 1, math.inf, "steps", "batch", "accumulate", "keep", "explode")
        check_range(self, 1, math.inf, "log_every", "sample_every", "checkpoint_every")
        check_range(self, 0, math.inf, "clip", "prefetch", "workers", "seed", "keep_every")
        check_range(self, 0, math.inf, "checkpoint_minutes", "minutes", "ema")
        if self.ema >= 1:
            raise UserError(f"ema: given {self.ema}, allowed is 0 up to but not 1")
        if self.seed >= 2**63:
            raise UserError(f"seed: given {self.seed}, allowed is 0 to 2^63 - 1")

    @property
    def samples_a_step(self) -> int:
        """Images or documents of one step, of all processes together."""
        return self.batch * self.accumulate


class Outcome(NamedTuple):
    """How a call of `train` ended. `ema.swapped()` puts the averaged weights into the model.

    `stopped` says what ended it before all steps were done: a signal by its name, or time.
    """

    step: int
    finished: bool
    ema: Ema
    stopped: str | None = None


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """Return the seed of everything random in one step: 63 well-mixed bits, the same for ever."""
    text = f"{seed}/{step}/{rank}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def train(
    model: nn.Module,
    objective: Objective,
    stream: Stream,
    config: TrainConfig,
    run: Run,
    *,
    sample: Sampler | None = None,
    flops: float | None = None,
    fill: Callable[[], None] | None = None,
) -> Outcome:
    """Train `model` to `config.steps` updates, going on from the newest checkpoint of `run`.

    The model stays on its device; parameters without requires_grad are neither moved nor saved.
    `stream(n)` gives the batch of forward pass n. `sample(model, step, run)` is called on the main
    process with the averaged weights in place; the figures it returns are logged. Of a model that
    is spread over processes nothing is sampled: nobody has it. `flops` of learning from one sample
    are what FLOPs a second are logged by, and their share of what the accelerators can do.
    `fill` gives a model on the meta device, which is to be spread, its weights when it has shards.
    Several processes share one folder of checkpoints, and may be others, or another number of them,
    at the next start; only the loss and `grad_norm` logged are means over all of them.
    SIGINT and SIGTERM end the call early with a checkpoint (`finished` False). Raises UserError
    where the loss is not finite or explodes; the checkpoints before it stay.
    """
    if fill is None:
        distributed.broadcast_module(model)
    passes = sharding.Pass(model, objective)
    sharding.recompute_blocks(model, config.recompute)
    if config.compile:
        torch.compiler.reset()  # after eight networks of one class a process compiles no more
        for part in sharding.parts_to_compile(model, objective, config.shard):
            part.compile()
    if sharding.is_sharded(config.shard):
        sharding.spread(passes, config.shard, offload=config.offload, bf16=config.bf16)
        sample = None
    if fill is not None:
        fill()
    trainer = _Trainer(passes, config, run, sample, flops)
    trainer.resume()
    if trainer.step >= config.steps:
        return Outcome(trainer.step, True, trainer.ema)
    display = Display(config.steps, trainer.step)
    try:
        on_gpu = trainer.device.type == "cuda"
        workers = min(config.workers, distributed.usable_cores()) if on_gpu else 0
        reading = Batches(stream, trainer.device, config.prefetch, workers)
        with reading as batches, Signals() as signals:
            stopped = trainer.run_to_end(batches, signals, display)
        run.wait()
    finally:
        display.close()
    return Outcome(trainer.step, stopped is None, trainer.ema, stopped)


class _Trainer:
    """What one call of `train` holds together."""

    def __init__(
        self,
        passes: sharding.Pass,
        config: TrainConfig,
        run: Run,
        sample: Sampler | None,
        flops: float | None,
    ) -> None:
        self.passes, self.config, self.run, self.sample = passes, config, run, sample
        self.flops = flops
        self.model, self.objective = passes.model, passes.objective
        model = self.model
        self.device = next(model.parameters()).device
        self.optimizer = Optimizer(model, config.optim, config.steps)
        self.ema = Ema(model, config.ema)
        self.means, self.watch = Means(), Watch(config.explode)
        self.step = self.saved_step = 0
        self.seconds_before = 0.0  # spent by earlier starts of this run
        self.saved_long_ago: float = False
        self.began = self.saved_at = time.perf_counter()

    def resume(self) -> None:
        """Load the newest state of the run, if there is one."""
        state = self.run.resume()
        if state is None:
            return
        kept = [one.removeprefix("optim.") for one in state.shapes if one.startswith("optim.")]
        self.optimizer.prepare(kept)
        tensors = self._tensors()
        _refuse_other_model(tensors, state.shapes, self.run.folder)
        state.read(tensors)
        self.ema.updates = state.facts["ema_updates"]
        self.means = Means(**state.facts["means"])
        self.watch.recent.extend(state.facts["recent"])
        self.seconds_before = state.facts["seconds"]
        self.step = self.saved_step = state.step

    def run_to_end(self, batches: Batches, signals: Signals, display: Display) -> str | None:
        """Do the remaining steps; return what ended them early: a signal or `minutes`.

        An uneasy step is never saved, so that a wish to stop waits for a calm one, a few at most.
        """
        config = self.config
        self.model.train()
        reason = None
        while self.step < config.steps and (reason is None or not self.watch.calm):
            reason = self._update(batches, signals) or reason
            last = self.step == config.steps
            sampled = {}
            if last or self.step % config.sample_every == 0:
                sampled = self._sample()
            if last or sampled or self.step % config.log_every == 0:
                self._log(sampled, display)
            if last or (self.watch.calm and (reason or self._checkpoint_is_due())):
                self._save()
        if self.step == config.steps:
            return None
        display.message(f"{reason}: saved at step {self.saved_step}; start again to go on")
        return reason

    def _update(self, batches: Batches, signals: Signals) -> str | None:
        """Do one update; return why to stop after it, or None."""
        began, waited = time.perf_counter(), batches.waited
        config, model = self.config, self.model
        before = getattr(self.objective, "before_step", None)
        if before is not None:
            before(model, self.step)
        self.optimizer.zero_grad()
        loss = sum(self._forward_backward(batches, part) for part in range(config.accumulate))
        figures = {"loss": loss / config.accumulate}
        if not sharding.is_sharded(config.shard):
            distributed.average_gradients(self.optimizer.parameters)
        figures["grad_norm"] = float(self.optimizer.clip(config.clip))
        reason = self._agree(figures, signals)
        self._refuse_divergence(figures)
        if math.isfinite(figures["grad_norm"]):  # else skip the update: `watch` counts these
            figures["lr"] = self.optimizer.step(self.step)
            self.ema.update()
        self.step += 1
        after = getattr(self.objective, "after_step", None)
        with sharding.whole(self.passes):
            extra = after(model, self.step) if after is not None else None
        figures |= {name: _number(value) for name, value in (extra or {}).items()}
        took = time.perf_counter() - began
        figures |= {"step_ms": 1000 * took, "data_share": (batches.waited - waited) / took}
        self.means.add(figures)
        return reason

    def _forward_backward(self, batches: Batches, part: int) -> float:
        config = self.config
        number = self.step * config.accumulate + part
        batch = batches.take(number)
        seed = step_seed(config.seed, number, distributed.rank())
        self._seed_everything(seed)
        with distributed.autocast(self.device, config.bf16, cache=config.recompute != "selective"):
            loss, metrics = self.passes(batch, seed)
        (loss / config.accumulate).backward()
        self.means.add({name: _number(value) for name, value in metrics.items()})
        return _number(loss)

    def _seed_everything(self, seed: int) -> None:
        """Seed dropout and the like, so that no generator state has to be saved.

        Not torch.manual_seed: without a GPU each call keeps a stack trace for every GPU library
        (1.6 ms and memory that is never freed).
        """
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _agree(self, figures: dict[str, float], signals: Signals) -> str | None:
        """Average the loss over processes; return why to stop, the same on all of them.

        The main process's clock says when minutes are over, and when a checkpoint is due.
        """
        reason, now = signals.received, time.perf_counter()
        limit = math.inf if self.config.minutes is None else self.config.minutes
        over = now - self.began >= 60 * limit
        self.saved_long_ago = now - self.saved_at >= 60 * self.config.checkpoint_minutes
        if distributed.world_size() > 1:
            clocks = [one and distributed.is_main() for one in (over, self.saved_long_ago)]
            mine = [figures["loss"], reason is not None, *clocks]
            shared = torch.tensor(mine, dtype=torch.float64, device=self.device)
            loss, stops, over, self.saved_long_ago = distributed.all_reduce_sum(shared).tolist()
            figures["loss"] = loss / distributed.world_size()
            reason = reason or (ANOTHER if stops else None)
        return reason or (f"{limit:g} minutes are over" if over else None)

    def _refuse_divergence(self, figures: Mapping[str, float]) -> None:
        verdict = self.watch.verdict(figures["loss"], figures["grad_norm"])
        if verdict is None:
            return
        kept = f"the checkpoint of step {self.saved_step} is kept" if self.saved_step else ""
        where = f"{self.run.folder}: stopped at step {self.step + 1} because {verdict}"
        remedy = "start a new run with a lower optim.lr or a longer optim.warmup"
        raise UserError("; ".join(part for part in (where, kept, remedy) if part))

    def _sample(self) -> dict[str, float]:
        if self.sample is None or not distributed.is_main():
            return {}
        with self.ema.swapped(), torch.no_grad():
            self.model.eval()
            figures = self.sample(self.model, self.step, self.run)
            self.model.train()
        return dict(figures or {})

    def _log(self, sampled: Mapping[str, float], display: Display) -> None:
        config = self.config
        means = self.means.take()
        per_step = config.samples_a_step
        record = {"step": self.step, **means, **sampled}
        record["images"] = self.step * per_step
        speed = 1000 / means["step_ms"]
        record["images_per_second"] = per_step * speed
        ranks = distributed.world_size()
        if "tokens" in means:
            record["tokens_per_second"] = means["tokens"] * config.accumulate * ranks * speed
        if self.flops is not None:
            record["flops_per_second"] = self.flops * per_step * speed
            peak = distributed.peak_flops(self.device)
            if peak is not None:
                record["mfu"] = record["flops_per_second"] / (peak * ranks)
        record["seconds"] = round(self._seconds(), 1)
        record["memory_gib"] = distributed.peak_memory(self.device) / 2**30
        self.run.log(record)
        if config.tensorboard:
            self.run.board(record)
        display.record(record)

    def _checkpoint_is_due(self) -> bool:
        every = self.config.checkpoint_every
        return self.step // every > self.saved_step // every or bool(self.saved_long_ago)

    def _save(self) -> None:
        facts = {
            "ema_updates": self.ema.updates,
            "means": self.means.to_dict(),
            "recent": list(self.watch.recent),
            "seconds": self._seconds(),
        }
        state = State(self.step, self._tensors(), facts)
        self.run.save(state, self.config.keep, self.config.keep_every)
        self.saved_step, self.saved_at = self.step, time.perf_counter()

    def _tensors(self) -> dict[str, Tensor]:
        """Return trainable parameters, all buffers, moments and averages by name."""
        model = self.model
        trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        # All buffers: also those that `state_dict` leaves out.
        parts = {
            "model": trained | dict(model.named_buffers()),
            "optim": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
        }
        return {f"{part}.{n}": one for part, named in parts.items() for n, one in named.items()}

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.began


def _number(value: float | Tensor) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)


def _refuse_other_model(
    own: Mapping[str, Tensor], saved: Mapping[str, torch.Size], source: str | Path
) -> None:
    wrong = [name for name in own.keys() ^ saved.keys()]
    wrong += [name for name in own.keys() & saved.keys() if own[name].shape != saved[name]]
    if wrong:
        weights = [name.removeprefix("model.") for name in wrong if name.startswith("model.")]
        first = ", ".join(sorted(weights or wrong)[:3])
        raise UserError(f"{source}: checkpoint of another model ({first}); choose another folder")
