"""Continuous batching: answers join and leave the batch at any step.

Each answer has rows of its own (one; two with guidance; one a view), its own seed, guidance and
sampling, and what it gets does not depend on its company. Between two changes of the company the
loop is fixed, and nothing in it waits for the device. Source: Yu et al. 2022 ("Orca").
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, takewhile

import torch
from torch import Tensor

from ddt_llama.generation.engine import Answer, Codes, Engine, Task
from ddt_llama.generation.rows import Rows
from ddt_llama.generation.sampling import Sampling, choose, guide, uniforms

LOOKED = 8  # steps between two looks for the end mark where looking is a wait for the device


@dataclass
class _Running:
    """One task under way: its rows, and what it has written."""

    task: Task
    ticket: int
    rows: list[int]
    chance: Tensor
    left: int
    written: list[Tensor] = field(default_factory=list)

    @property
    def ids(self) -> Tensor:
        return torch.cat(self.written)


@dataclass
class _Group:
    """Tasks that draw by the same rule, as tensors, for as many steps as no company changes."""

    running: list[_Running]
    head: slice
    sampling: Sampling
    rows: Tensor  # task, row of the task
    scale: Tensor | None
    chance: Tensor  # step, task
    written: Tensor  # step, task


def write(engine: Engine, tasks: Sequence[Task], together: int = 32) -> list[Tensor]:
    """Carry tasks out, `together` side by side; results as of `Batch.step`, in the tasks' order.

    Raises UserError for prompts that are empty, or too long for what is to follow.
    """
    for task in tasks:
        engine.check(task)
    if not tasks:
        return []
    needed = max(len(task.prompts) for task in tasks) * min(together, len(tasks))
    rows = engine.rows(needed, max(map(engine.length, tasks)))
    batch = Batch(engine, rows)
    results: dict[int, Tensor] = {}
    begun: dict[int, int] = {}  # ticket -> place among the tasks
    waiting = list(range(len(tasks)))
    while waiting or batch:
        if 4 * batch.room >= rows.most:  # to read few prompts at a time costs more than it gives
            fit = batch.fitting(tasks[place] for place in waiting)
            tickets = batch.join([tasks[place] for place in waiting[:fit]])
            begun |= dict(zip(tickets, waiting, strict=False))
            del waiting[:fit]
        results |= {begun[ticket]: ids for ticket, ids in batch.step()}
    engine.set_aside(rows)
    return [results[place] for place in range(len(tasks))]


class Batch:
    """Answers that are written side by side, each in as many rows as it has prompts."""

    def __init__(self, engine: Engine, rows: Rows) -> None:
        """Write in these rows, which are free."""
        self.engine = engine
        self._rows = rows
        self._running: list[_Running] = []
        self._groups: list[_Group] | None = None
        self._done = 0  # steps of these groups
        self._states: Tensor | None = None
        self._tickets = 0

    @property
    def room(self) -> int:
        """Rows that are free."""
        return self._rows.room

    def __len__(self) -> int:
        """Return how many answers are being written."""
        return len(self._running)

    def fitting(self, tasks: Iterable[Task]) -> int:
        """Return how many of these tasks, taken in turn, there is room for."""
        needed = accumulate(len(task.prompts) for task in tasks)
        return sum(1 for _ in takewhile(lambda rows: rows <= self.room, needed))

    @torch.inference_mode()
    def join(self, tasks: Sequence[Task]) -> list[int]:
        """Begin tasks, for which there must be room, and return a ticket for each."""
        if not tasks:
            return []
        self._settle()
        prompts, which = self.engine.read(tasks)
        begun = self._rows.count
        self._rows.put(prompts, which)
        new = prompts.states[torch.tensor(which, device=prompts.states.device)]
        self._states = new if self._states is None else torch.cat([self._states, new])
        device = self.engine.decoder.device
        tickets = []
        for task in tasks:
            rows = list(range(begun, begun + len(task.prompts)))
            begun += len(rows)
            steps = self.engine.steps(task)
            chance = uniforms([task.seed], steps, device)[:, 0]
            self._running.append(_Running(task, self._tickets, rows, chance, steps))
            tickets.append(self._tickets)
            self._tickets += 1
        return tickets

    @torch.inference_mode()
    def leave(self, ticket: int) -> None:
        """Give up a task; its rows are free at once."""
        self._settle()
        self._drop([one for one in self._running if one.ticket == ticket], None)

    def so_far(self, ticket: int) -> Tensor:
        """Return the codes or ids that a task has written by now."""
        self._settle()
        running = next(one for one in self._running if one.ticket == ticket)
        return self.engine.finish(running.task, running.ids)

    @torch.inference_mode()
    def step(self) -> list[tuple[int, Tensor]]:
        """Write one token of every answer; return tickets and results of those that are complete.

        Codes lie in 0 .. codebook_size-1, in language order; an answer ends before the end mark.
        """
        if not self._running:
            return []
        groups, rows = self._formed(), self._rows
        ids = torch.empty(rows.count, dtype=torch.int64, device=rows.positions.device)
        for group in groups:
            chosen = self._choose(group)
            group.written[self._done] = chosen
            ids[group.rows] = chosen[:, None]
        self._done += 1
        complete = self._complete(groups)
        results = []
        if complete:
            self._settle()
            for running, length in complete:
                own = running.ids[:length].clone()
                results.append((running.ticket, self.engine.finish(running.task, own)))
            ids = self._drop([running for running, _ in complete], ids)
        self._states = self.engine.decoder.step(ids, rows) if rows.count else None
        return results

    def _choose(self, group: _Group) -> Tensor:
        """Draw the next id of every task of a group."""
        assert self._states is not None
        states, (count, each) = self._states[group.rows.flatten()], group.rows.shape
        if group.scale is not None:
            # Logits are linear in states: guided before the head, they need it once, not twice.
            told, empty = states.float().unflatten(0, (count, each)).unbind(1)
            states = guide(told, empty, group.scale).to(states.dtype)
        logits = self.engine.decoder.logits(states, group.head)
        if isinstance(group.running[0].task, Answer):
            logits = self.engine.possible(logits)
            if each > 1:
                logits = logits.log_softmax(-1).unflatten(0, (count, each)).mean(1)
        return choose(logits, group.sampling, group.chance[self._done]) + group.head.start

    def _formed(self) -> list[_Group]:
        """Return the groups of the company there is."""
        if self._groups is not None:
            return self._groups
        steps = min(one.left for one in self._running)
        alike: dict[tuple[object, ...], list[_Running]] = {}
        for one in self._running:
            head = self.engine.head(one.task)
            key = (type(one.task), head.start, one.task.sampling, len(one.rows))
            alike.setdefault(key, []).append(one)
        self._groups = [self._group(running, steps) for running in alike.values()]
        self._done = 0
        return self._groups

    def _group(self, running: list[_Running], steps: int) -> _Group:
        device, first = self._rows.positions.device, running[0].task
        scale = None
        if isinstance(first, Codes) and len(running[0].rows) > 1:
            scales = [one.task.guidance_scale for one in running if isinstance(one.task, Codes)]
            scale = torch.tensor(scales, device=device)[:, None]
        chance = [one.chance[len(one.chance) - one.left :][:steps] for one in running]
        return _Group(
            running=running,
            head=self.engine.head(first),
            sampling=first.sampling,
            rows=torch.tensor([one.rows for one in running], device=device),
            scale=scale,
            chance=torch.stack(chance, dim=1),
            written=torch.empty(steps, len(running), dtype=torch.int64, device=device),
        )

    def _complete(self, groups: Sequence[_Group]) -> list[tuple[_Running, int]]:
        """Return the tasks that have written all, and how much of it counts."""
        found = []
        device = self._rows.positions.device
        asked = device.type == "cpu" or self._done % LOOKED == 0 or self._done == _steps(groups)
        for group in groups:
            ends: list[int] = []
            if isinstance(group.running[0].task, Answer) and asked:
                at = group.written[: self._done] == self.engine.vocabulary.eos
                first = torch.where(at.any(0), at.int().argmax(0), self._done)
                ends = first.tolist()
            for index, running in enumerate(group.running):
                before = len(running.chance) - running.left
                if ends and ends[index] < self._done:
                    found.append((running, before + ends[index]))
                elif running.left == self._done:
                    found.append((running, before + self._done))
        return found

    def _settle(self) -> None:
        """Give every task what its group has written, before the company changes."""
        for group in self._groups or ():
            for index, running in enumerate(group.running):
                running.written.append(group.written[: self._done, index])
                running.left -= self._done
        self._groups = None

    def _drop(self, leaving: Sequence[_Running], ids: Tensor | None) -> Tensor:
        """Free the rows of tasks; others move into their places, with what they are to be given."""
        gone = {one.ticket for one in leaving}
        self._running = [one for one in self._running if one.ticket not in gone]
        owners = {row: (one, i) for one in self._running for i, row in enumerate(one.rows)}
        kept = list(range(self._rows.count))
        for row in sorted((row for one in leaving for row in one.rows), reverse=True):
            last = self._rows.drop(row)
            if row != last:
                one, place = owners.pop(last)
                one.rows[place] = row
                owners[row] = one, place
                kept[row] = kept[last]
            kept.pop()
        order = torch.tensor(kept, dtype=torch.int64, device=self._rows.positions.device)
        if ids is None:
            self._states = None if self._states is None else self._states[order]
            return order
        return ids[order]


def _steps(groups: Sequence[_Group]) -> int:
    return len(groups[0].written)
