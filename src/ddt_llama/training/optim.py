"""One optimizer object for every stage: AdamW, or Muon for the hidden matrices and AdamW beside it.

Groups differ by learning-rate multiplier (a pattern on the parameter's name) and weight decay; the
learning rate is a closed-form function of the step. State is kept by parameter name, so that a
checkpoint does not depend on the order of groups.
Muon's learning rate is scaled to AdamW's update size, so that one `lr` serves both.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ddt_llama import distributed
from ddt_llama.config import UserError, check_range
from ddt_llama.training.muon import Muon

# Learned tokens and position tables are looked up, not multiplied: decay would only shrink them.
TABLES = ("*embed*", "*queries*", "*positions*", "*pos_*")
# Muon is for matrices between hidden activations: not the way in or the way out, nor
# for a critic, which is to learn as fast as ever beside it.
ENDS = ("*head*", "*patch*", "*code_in*", "*code_out*", "*critic*")


@dataclass(frozen=True)
class OptimConfig:
    """How parameters move. `warmup` in steps; `decay_share` is the falling end of "wsd".

    decay "cosine": half a cosine after warm-up; "wsd": warm-up, stable, linear fall over the last
    `decay_share` of the steps; both end at `floor` x lr. `multipliers` maps name patterns
    ("encoder.*") to learning-rate factors; the last match wins.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.95
    warmup: int = 200
    decay: Literal["cosine", "wsd", "constant"] = "wsd"
    decay_share: float = 0.2
    floor: float = 0.0
    multipliers: dict[str, float] = field(default_factory=dict)
    no_decay: tuple[str, ...] = TABLES
    not_muon: tuple[str, ...] = ENDS

    def __post_init__(self) -> None:
        """Refuse values that cannot train."""
        check_range(self, 0, math.inf, "lr", "eps", "weight_decay", "warmup", "floor")
        check_range(self, 0, 1, "momentum", "decay_share")
        if self.momentum == 1:
            raise UserError("momentum: given 1, allowed are 0 up to but not 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas: given {self.betas}, allowed are 0 up to but not 1")


def lr_scale(config: OptimConfig, step: int, steps: int) -> float:
    """Return the factor on the learning rate for the update number `step` (0-based) of `steps`.

    Warm-up: (step + 1) / warmup. Then 1 ("constant"), floor + (1 - floor) (1 + cos(pi s)) / 2
    ("cosine") or floor + (1 - floor) min(1, (1 - s) / decay_share) ("wsd"), where s runs from 0
    after warm-up ("wsd": at the first step) to 1 after the last step.
    """
    rising = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if config.decay == "constant":
        return rising
    if config.decay == "cosine":
        done = max(0.0, (step - config.warmup) / max(1, steps - config.warmup))
        falling = (1 + math.cos(math.pi * min(1.0, done))) / 2
    else:
        left = max(0.0, 1 - step / steps)
        falling = min(1.0, left / config.decay_share) if config.decay_share else 1.0
    return rising * (config.floor + (1 - config.floor) * falling)


class Group(NamedTuple):
    """Parameters that move alike."""

    names: tuple[str, ...]
    multiplier: float
    weight_decay: float
    muon: bool


def groups(model: nn.Module, config: OptimConfig) -> list[Group]:
    """Sort the trainable parameters into groups.

    Weight decay spares vectors, embeddings and `no_decay` patterns. With kind "muon" the weights
    of `nn.Linear` and `nn.Conv2d` that no `not_muon` pattern matches go to Muon. Raises UserError
    for a multiplier that matches nothing.
    """
    embeddings = _weights_of(model, nn.Embedding)
    hidden = _weights_of(model, nn.Linear) | _weights_of(model, nn.Conv2d)
    collected: dict[tuple[float, float, bool], list[str]] = {}
    used = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        multiplier = 1.0
        for pattern, factor in config.multipliers.items():
            if fnmatchcase(name, pattern):
                multiplier, _ = factor, used.add(pattern)
        spared = parameter.ndim < 2 or name in embeddings or _matches(name, config.no_decay)
        muon = config.kind == "muon" and name in hidden - embeddings
        muon = muon and not _matches(name, config.not_muon)
        key = (multiplier, 0.0 if spared else config.weight_decay, muon)
        collected.setdefault(key, []).append(name)
    for pattern in config.multipliers.keys() - used:
        first = ", ".join(name for name, _ in list(model.named_parameters())[:3])
        raise UserError(f"multipliers: {pattern!r} matches no parameter; names are like {first}")
    if not collected:
        raise UserError("nothing to train: every parameter is frozen; unfreeze a part of the model")
    return [Group(tuple(names), *key) for key, names in collected.items()]


class Optimizer:
    """Move the trainable parameters of a model; one object whatever the kind."""

    def __init__(self, model: nn.Module, config: OptimConfig, steps: int) -> None:
        """Prepare groups and state; `steps` is the length of the whole training."""
        self.config, self.steps = config, steps
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters: list[nn.Parameter] = list(self._named.values())
        members = groups(model, config)
        self._parts: list[torch.optim.Optimizer] = []
        if adamw := [self._settings(group) for group in members if not group.muon]:
            # Fused: one pass over memory a tensor; 4 times faster than foreach on CPU.
            self._parts.append(
                torch.optim.AdamW(adamw, betas=config.betas, eps=config.eps, fused=True)
            )
        if muon := [self._settings(group) for group in members if group.muon]:
            self._parts.append(Muon(muon, momentum=config.momentum))

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def clip(self, limit: float) -> Tensor:
        """Scale the gradients to a joint norm of at most `limit`; return the norm before.

        `limit` 0 only measures. The gradients are touched only where the norm is too large.
        """
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = distributed.whole_tensor(get_total_norm(grads))
        if limit > 0 and float(norm) > limit:
            clip_grads_with_norm_(self.parameters, limit, norm)
        return norm

    def step(self, step: int) -> float:
        """Do the update number `step` (0-based); return the learning rate used."""
        rate = self.config.lr * lr_scale(self.config, step, self.steps)
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = rate * group["multiplier"]
            part.step()
        return rate

    def state_dict(self) -> dict[str, Tensor]:
        """Return moments and counters as `name/quantity` -> tensor."""
        names = {id(parameter): name for name, parameter in self._named.items()}
        return {
            f"{names[id(parameter)]}/{quantity}": torch.as_tensor(value)
            for part in self._parts
            for parameter, values in part.state.items()
            for quantity, value in values.items()
        }

    def prepare(self, names: Sequence[str]) -> None:
        """Make room for the state of these names (`name/quantity`), zeros for now.

        What belongs to no parameter is left out.
        """
        owners = {
            id(p): part for part in self._parts for g in part.param_groups for p in g["params"]
        }
        for key in names:
            name, quantity = key.rsplit("/", 1)
            parameter = self._named.get(name)
            if parameter is None:
                continue
            # The counter of a fused optimizer lives beside its parameter.
            room = (
                torch.zeros((), device=parameter.device)
                if quantity == "step"
                else torch.zeros_like(parameter)
            )
            owners[id(parameter)].state[parameter][quantity] = room

    def _settings(self, group: Group) -> dict[str, Any]:
        return {
            "params": [self._named[name] for name in group.names],
            "lr": self.config.lr * group.multiplier,
            "multiplier": group.multiplier,
            "weight_decay": group.weight_decay,
        }


def _weights_of(model: nn.Module, kind: type[nn.Module]) -> set[str]:
    return {
        f"{prefix}.weight" if prefix else "weight"
        for prefix, module in model.named_modules()
        if isinstance(module, kind)
    }


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
