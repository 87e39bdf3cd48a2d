"""The one thread that owns the model: the work of all requests, in common batches.

Each request is a program (`generation.work`), which asks for one piece of work after the other.
Round by round the thread begins what has arrived, lets waiting tasks join the language model's one
batch, writes a token of every answer, and encodes and decodes what has gathered. Who has no client
any more, or is late, leaves with its rows. Source: Yu et al. 2022 ("Orca"), for the rounds.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ddt_llama.config import UserError
from ddt_llama.generation import Model
from ddt_llama.generation.batch import Batch
from ddt_llama.generation.engine import Codes, Task
from ddt_llama.generation.work import Decode, Encode, Program, R, Write
from ddt_llama.serving.jobs import Closed, Job, Late, Preview, QueueFull
from ddt_llama.serving.limits import MAX_CAPACITY, Limits
from ddt_llama.serving.metrics import Metrics

PATIENCE = 0.03  # seconds that pictures wait for others while tokens are being written
TOGETHER = 8  # pictures that wait for no more
GATHERED = 4  # steps between two readings of new prompts while few rows are free
LIKE = 1.25  # times the length of the shortest of the prompts that are read together
LONGEST_WAIT = 60  # seconds that a client is told to wait at most
PACE = 0.1  # seconds a request, as long as none is done
log = logging.getLogger(__name__)


class Worker:
    """Carries out programs side by side; what each returns is what `Model.run` returns for it."""

    def __init__(self, model: Model, limits: Limits, metrics: Metrics) -> None:
        """Make room for the rows and start the thread.

        Raises UserError for a model without a language model, and for too few rows.
        """
        views = model.programs.settings.views
        if limits.rows < max(2, views):
            raise UserError(f"rows: given {limits.rows}, this model needs {max(2, views)} or more")
        assert model.engine is not None
        longest = model.engine.decoder.max_positions
        self.model, self.engine, self.limits, self.metrics = model, model.engine, limits, metrics
        self.capacity = min(longest, limits.capacity or MAX_CAPACITY)
        self._batch = Batch(self.engine, self.engine.rows(limits.rows, self.capacity))
        self._tickets: dict[int, tuple[Job[Any], int]] = {}
        self._steps = 0
        self._joined = 0  # step of the last joining
        self._waiting: deque[Job[Any]] = deque()
        self._active: list[Job[Any]] = []  # in the order of their arrival
        # Since when there is work, or the latest times at which requests were finished.
        self._ends: deque[float] = deque(maxlen=4 * limits.rows)
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread is there, which ends where it is closed, and where no batch works."""
        return self._thread.is_alive()

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self.alive and not self._closing

    def submit(
        self,
        program: Program[R],
        *,
        deadline: float | None = None,
        previews: int = 0,
        show: Callable[[Preview], None] | None = None,
    ) -> Job[R]:
        """Queue a program and return at once; `deadline` is a time of `time.monotonic`.

        Raises QueueFull where too many wait, Closed where none are taken any more.
        """
        until = time.monotonic() + self.limits.deadline if deadline is None else deadline
        job = Job(program, until, previews, show)
        with self._changed:
            if not self.ready:
                raise Closed("the server is shutting down")
            if len(self._waiting) + len(self._active) >= self.limits.max_queue + self.limits.rows:
                raise QueueFull(self.expected_wait())
            self._waiting.append(job)
            self._changed.notify()
        return job

    def expected_wait(self) -> int:
        """Return in how many seconds the queue of now will be done with, by its latest pace.

        Requests end many at once, so the pace is that of many rows' worth of them.
        """
        ends = list(self._ends)
        pace = (time.monotonic() - ends[0]) / (len(ends) - 1) if len(ends) > 1 else PACE
        return max(1, min(LONGEST_WAIT, math.ceil(pace * len(self._waiting))))

    def close(self, seconds: float) -> None:
        """Take no more programs, finish those that are there, give up what takes longer."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(seconds)
        self._fail_all(Closed("the server was told to stop before this was done"))
        self._thread.join()

    def _fail_all(self, error: BaseException) -> None:
        with self._changed:
            left = [*self._waiting, *self._active]
        for job in left:
            job.fail(error)

    def _run(self) -> None:
        try:
            self._rounds()
        except BaseException as error:
            log.critical("the model's thread has ended", exc_info=True)
            with self._changed:
                self._closing = True
            self._fail_all(error)

    def _rounds(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._active or self._closing):
                    self._ends.clear()
                    self._changed.wait()
                if not (self._waiting or self._active):
                    return
                if not self._ends:
                    self._ends.append(time.monotonic())
            try:
                self._round()
            except Exception as error:  # of the batch, which may be left half changed
                log.exception("the batch failed")
                self._start_again(error)

    def _round(self) -> None:
        self._drop_unwanted()
        self._admit()
        self._join()
        self._step()
        for jobs in self._gathered():
            self._perform(jobs)
        self.metrics.waiting.set(len(self._waiting))
        self.metrics.active.set(len(self._active))
        self.metrics.rows.set(self.limits.rows - self._batch.room)

    def _drop_unwanted(self) -> None:
        """Give up what nobody waits for any more, and what is late."""
        now = time.monotonic()
        with self._changed:
            there = [*self._waiting, *self._active]
            gone = [job for job in there if job.future.done() or job.deadline < now]
            for job in gone:
                (self._active if job in self._active else self._waiting).remove(job)
        for job in gone:
            job.give_up_late()  # unless it has ended already
            self.metrics.given_up.labels(_reason(job)).inc()
            self._leave(job)
            job.program.close()

    def _admit(self) -> None:
        """Begin as many programs as there are rows."""
        while self._waiting and len(self._active) < self.limits.rows:
            with self._changed:
                job = self._waiting.popleft()
                self._active.append(job)
            self.metrics.queued.observe(time.monotonic() - job.arrived)
            self._advance(job, None)

    def _advance(self, job: Job[Any], result: Any) -> None:
        """Give a program the result of its work, and take its next piece of work."""
        try:
            work = job.program.send(result)
            while isinstance(work, Write) and not work.tasks:
                work = job.program.send([])
            if isinstance(work, Write):
                for task in work.tasks:
                    self._check(task)
                self._begin_writing(job, work)
            job.work, job.since = work, time.monotonic()
        except StopIteration as end:
            self._end(job)
            job.finish(end.value)
        except Exception as error:
            self._end(job)
            job.fail(error)

    def _check(self, task: Task) -> None:
        self.engine.check(task, self.capacity)
        if len(task.prompts) > self.limits.rows:
            raise UserError(f"this takes {len(task.prompts)} rows; there are {self.limits.rows}")

    def _begin_writing(self, job: Job[Any], work: Write) -> None:
        job.results = [None] * len(work.tasks)
        job.unbegun = list(range(len(work.tasks)))
        job.begun.clear()
        job.marks.clear()
        if job.previews and all(isinstance(task, Codes) for task in work.tasks):
            whole, parts = self.engine.vocabulary.num_tokens, job.previews + 1
            job.marks = [whole * part // parts for part in range(1, parts)]
            job.previews = 0  # of later tries nothing is shown

    def _end(self, job: Job[Any]) -> None:
        with self._changed:
            self._active.remove(job)
        self._ends.append(time.monotonic())

    def _leave(self, job: Job[Any]) -> None:
        """Free the rows of a job."""
        for ticket in [one for one, (owner, _) in self._tickets.items() if owner is job]:
            self._batch.leave(ticket)
            del self._tickets[ticket]

    def _join(self) -> None:
        """Give rows to tasks, those of the oldest request first."""
        waiting = [(job, place) for job in self._active for place in job.unbegun]
        if not waiting:
            return
        # To read few prompts at a time costs more than it gives.
        few = self._batch.room * 8 < self.limits.rows
        if len(self._batch) and few and self._steps - self._joined < GATHERED:
            return
        tasks = [job.work.tasks[place] for job, place in waiting if isinstance(job.work, Write)]
        fit = self._batch.fitting(tasks)
        for alike in _of_like_length(tasks[:fit]):
            with self._timed("read"):
                tickets = self._batch.join([tasks[index] for index in alike])
            for ticket, index in zip(tickets, alike, strict=True):
                job, place = self._tickets[ticket] = waiting[index]
                job.unbegun.remove(place)
                job.begun[ticket] = self._steps
        self._joined = self._steps

    def _step(self) -> None:
        """Write one token of every answer."""
        count = len(self._batch)
        if not count:
            return
        with self._timed("write"):
            done = self._batch.step()
        self._steps += 1
        self.metrics.tokens.inc(count)
        self.metrics.batch.observe(count)
        for ticket, ids in done:
            job, place = self._tickets.pop(ticket)
            job.results[place] = ids
            del job.begun[ticket]
            if not job.begun and not job.unbegun:
                self._advance(job, job.results)
        self._preview()

    def _gathered(self) -> Iterator[list[Job[Any]]]:
        """Give the jobs whose pictures are to be encoded, or decoded alike, now."""
        alike: dict[Hashable, list[Job[Any]]] = {}
        for job in self._active:
            if isinstance(job.work, Encode):
                alike.setdefault("encode", []).append(job)
            elif isinstance(job.work, Decode):
                alike.setdefault((job.work.steps, job.work.visible), []).append(job)
        for jobs in alike.values():
            waited = time.monotonic() - min(job.since for job in jobs)
            if not len(self._batch) or len(jobs) >= TOGETHER or waited > PATIENCE:
                yield jobs

    def _perform(self, jobs: Sequence[Job[Any]]) -> None:
        """Encode or decode the pictures of jobs at once; where that fails, of each alone."""
        try:
            parts = self._performed([job.work for job in jobs])
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    self._perform([job])
                return
            self._end(jobs[0])
            jobs[0].fail(error)
            return
        for job, part in zip(jobs, parts, strict=True):
            self._advance(job, part)

    def _performed(self, works: Sequence[Any]) -> Sequence[Tensor]:
        if isinstance(works[0], Encode):
            with self._timed("encode"):
                codes = self.model.perform(Encode(torch.cat([work.images for work in works])))
            return codes.split([len(work.images) for work in works])
        seeds = [seed for work in works for seed in work.seeds]
        codes = torch.cat([work.codes for work in works])
        with self._timed("decode"):
            images = self.model.perform(Decode(codes, seeds, works[0].steps, works[0].visible))
        return images.split([len(work.codes) for work in works])

    def _preview(self) -> None:
        """Show what is written of pictures that have come to a mark."""
        at: dict[int, list[tuple[Job[Any], int, int]]] = {}
        for job in self._active:
            for ticket, begun in job.begun.items():
                written = self._steps - begun
                if written in job.marks and not job.future.done():
                    at.setdefault(written, []).append((job, ticket, job.marks.index(written)))
        for shown in at.values():
            tasks = [self._tickets[ticket] for _, ticket, _ in shown]
            codes = torch.stack([self._batch.so_far(ticket) for _, ticket, _ in shown])
            seeds = [_task(job, place).seed for job, place in tasks]
            with self._timed("preview"):
                images = self.model.unfinished(codes, seeds)
            for (job, _, index), (_, place), image in zip(shown, tasks, images, strict=True):
                try:
                    if job.show is not None:
                        job.show(Preview(place, index, image))
                except Exception as error:
                    job.fail(error)

    def _start_again(self, error: Exception) -> None:
        """Begin with an empty batch; what was under way has failed."""
        with self._changed:
            failed, self._active = self._active, []
        for job in failed:
            job.fail(error)
        self._tickets.clear()
        self._batch = Batch(self.engine, self.engine.rows(self.limits.rows, self.capacity))

    @contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.metrics.work.labels(kind).inc(time.perf_counter() - begun)


def _of_like_length(tasks: Sequence[Task]) -> list[list[int]]:
    """Return the places of tasks, those together whose prompts are about as long.

    Prompts that are read together are padded to the longest of them.
    """
    lengths = [max(map(len, task.prompts)) for task in tasks]
    groups: list[list[int]] = []
    for index in sorted(range(len(tasks)), key=lengths.__getitem__):
        if groups and lengths[index] <= LIKE * lengths[groups[-1][0]]:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _reason(job: Job[Any]) -> str:
    """Say why a job that has ended was not finished."""
    if job.future.cancelled():
        return "client"
    return "deadline" if isinstance(job.future.exception(), Late) else "shutdown"


def _task(job: Job[Any], place: int) -> Task:
    assert isinstance(job.work, Write)
    return job.work.tasks[place]
