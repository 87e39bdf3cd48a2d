"""The worker: what each request gets is what it gets alone, whatever the others do."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from typing import Any

import pytest
import torch
from tiny_model import SIZE, TOKENS, Cells, cut_answers_short, tiny_model
from torch import Tensor

from ddt_llama.config import UserError
from ddt_llama.generation import Model, Settings
from ddt_llama.generation.model import PREVIEW_STEPS
from ddt_llama.generation.work import Program
from ddt_llama.serving.jobs import Closed, Late, Preview, QueueFull
from ddt_llama.serving.limits import Limits
from ddt_llama.serving.metrics import Metrics
from ddt_llama.serving.worker import Worker

PLANNING = Settings(plan=True, edit_plan=True, look=True, views=3, tries=3, steps=2)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_answers_short(monkeypatch)


@pytest.fixture
def worker(request: pytest.FixtureRequest) -> Iterator[Worker]:
    changes = getattr(request, "param", {})
    settings = changes.get("settings", Settings(steps=2))
    worker = Worker(tiny_model(settings), changes.get("limits", Limits(rows=12)), Metrics())
    yield worker
    worker.close(0)


def image(value: float = 0.5) -> Tensor:
    return torch.full((3, SIZE, SIZE), value)


def cells(worker: Worker) -> Cells:
    assert isinstance(worker.model.tokenizer, Cells)
    return worker.model.tokenizer


def programs(model: Model) -> list[Program[Any]]:
    """Programs of all kinds, each with a seed of its own."""
    can = model.programs
    return [
        can.draw("a red circle", 2, seed=1),
        can.ask(image(0.25), "what is it"),
        can.edit(image(-0.5), "a ring", 1, seed=2),
        can.describe(image(0.75)),
        can.draw("two squares", 1, seed=3, options={"guidance_scale": 1.0, "steps": 3}),
        can.draw("a ring", 3, seed=4, options={"top_k": 3, "temperature": 2.0}),
        can.edit(image(0.0), "blue", 2, seed=5, options={"top_p": 0.9}),
    ]


def equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


class Gate:
    """A program that holds the worker's thread until it is opened."""

    def __init__(self) -> None:
        self.entered, self.open = threading.Event(), threading.Event()

    def program(self) -> Program[str]:
        self.entered.set()
        assert self.open.wait(20)
        return "through"
        yield


def held(worker: Worker) -> Gate:
    """Return a gate behind which the worker's thread now waits."""
    gate = Gate()
    worker.submit(gate.program())
    assert gate.entered.wait(20)
    return gate


def until(said: Any) -> None:
    end = time.monotonic() + 20
    while not said():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.parametrize(
    "worker", [{}, {"settings": PLANNING}, {"limits": Limits(rows=3)}], indirect=True
)
def test_what_each_gets_is_what_it_gets_alone(worker: Worker) -> None:
    twin = tiny_model(worker.model.settings)
    alone = [twin.run(program) for program in programs(twin)]
    jobs: dict[int, Any] = {}

    def client(number: int) -> None:
        for place, program in enumerate(programs(worker.model)):
            jobs[number * len(alone) + place] = worker.submit(program)
            time.sleep(0.003 * number)

    clients = [threading.Thread(target=client, args=(number,)) for number in range(2)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    for number, job in jobs.items():
        assert equal(job.future.result(60), alone[number % len(alone)]), number


@pytest.mark.parametrize("worker", [{"limits": Limits(rows=40)}], indirect=True)
def test_pictures_of_many_requests_go_through_the_tokenizer_together(worker: Worker) -> None:
    gate = held(worker)
    jobs = [worker.submit(worker.model.programs.ask(image(i / 8), "a ring")) for i in range(8)]
    jobs += [worker.submit(worker.model.programs.draw("a ring", 1, seed)) for seed in range(8)]
    gate.open.set()
    for job in jobs:
        job.future.result(20)
    assert cells(worker).encoded[0] == 8
    assert max(call["rows"] for call in cells(worker).decoded) == 8


@pytest.mark.parametrize("worker", [{"limits": Limits(rows=2, max_queue=3)}], indirect=True)
def test_who_comes_when_too_many_wait_is_told_when_to_come_again(worker: Worker) -> None:
    gate = held(worker)
    jobs = [worker.submit(worker.model.programs.describe(image())) for _ in range(4)]
    with pytest.raises(QueueFull, match="come again in 1 s") as told:
        worker.submit(worker.model.programs.describe(image()))
    assert told.value.seconds == 1
    gate.open.set()
    assert len({job.future.result(20)[0] for job in jobs}) == 1
    worker.submit(worker.model.programs.describe(image())).future.result(20)


@pytest.mark.parametrize("worker", [{"limits": Limits(rows=2, max_queue=3)}], indirect=True)
def test_the_wait_is_told_by_the_pace_although_many_end_at_once(worker: Worker) -> None:
    gate = held(worker)
    jobs = [worker.submit(worker.model.programs.describe(image())) for _ in range(4)]
    now = time.monotonic()
    worker._ends.clear()
    worker._ends.extend([now - 12, *[now - 6] * 3, *[now] * 3])
    assert worker.expected_wait() == 9  # four wait, two seconds each, and the time since
    gate.open.set()
    for job in jobs:
        job.future.result(20)
    until(lambda: not worker._ends)  # idle, it forgets its pace
    assert worker.expected_wait() == 1


def test_who_goes_away_leaves_the_batch_and_disturbs_nobody(worker: Worker) -> None:
    twin = tiny_model(worker.model.settings)
    alone = [twin.run(program) for program in programs(twin)]
    gate = held(worker)
    jobs = [worker.submit(program) for program in programs(worker.model)]
    jobs[1].cancel()  # while it waits
    gone = worker.submit(
        worker.model.programs.draw("a red circle", 3, seed=9),
        previews=1,
        show=lambda _: gone.cancel(),  # in the middle of its writing
    )
    gate.open.set()
    for place, job in enumerate(jobs):
        if place != 1:
            assert equal(job.future.result(20), alone[place])
    for job in (jobs[1], gone):
        with pytest.raises(CancelledError):
            job.future.result(20)
    until(lambda: not worker._active)
    assert worker._batch.room == 12
    assert worker.metrics.given_up.labels("client")._value.get() == 2


def test_what_is_late_is_given_up(worker: Worker) -> None:
    gate = held(worker)
    job = worker.submit(worker.model.programs.draw("a ring"), deadline=time.monotonic() + 0.01)
    time.sleep(0.02)
    gate.open.set()
    with pytest.raises(Late, match=r"not done after \d"):
        job.future.result(20)
    assert worker.metrics.given_up.labels("deadline")._value.get() == 1
    assert worker.submit(worker.model.programs.describe(image())).future.result(20)


def test_a_mistake_or_a_fault_is_that_of_its_own_request(worker: Worker) -> None:
    def faulty() -> Program[None]:
        raise ZeroDivisionError
        yield

    can = worker.model.programs
    gate = held(worker)
    cells(worker).broken = 6
    jobs = [worker.submit(can.draw("a ring", 1, seed)) for seed in (5, 6, 7)]
    empty, fault = worker.submit(can.draw(" ")), worker.submit(faulty())
    long = worker.submit(can.draw("a ring " * 200))
    gate.open.set()
    twin = tiny_model(worker.model.settings)
    for job, seed in ((jobs[0], 5), (jobs[2], 7)):
        assert torch.equal(job.future.result(20), twin.run(twin.programs.draw("a ring", 1, seed)))
    with pytest.raises(RuntimeError, match="secret"):
        jobs[1].future.result(20)
    with pytest.raises(UserError, match="prompt is empty"):
        empty.future.result(20)
    with pytest.raises(UserError, match="reads at most 496 and then writes 16"):
        long.future.result(20)
    with pytest.raises(ZeroDivisionError):
        fault.future.result(20)
    until(lambda: not worker._active)


@pytest.mark.parametrize("worker", [{"limits": Limits(rows=4, capacity=40)}], indirect=True)
def test_a_row_has_the_room_it_was_given(worker: Worker) -> None:
    with pytest.raises(UserError, match="reads at most 24 and then writes 16"):
        worker.submit(worker.model.programs.draw("a red circle " * 9)).future.result(20)


def test_a_batch_that_fails_is_begun_anew(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    job = worker.submit(worker.model.programs.draw("a ring"), previews=1, show=lambda _: broken())

    def broken() -> None:
        monkeypatch.setattr(worker._batch, "step", lambda: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        job.future.result(20)
    assert worker.submit(worker.model.programs.draw("a ring")).future.result(20).shape[0] == 1
    assert "the batch failed" in caplog.text


@pytest.mark.parametrize(
    ("worker", "steps"),
    [({}, 2), ({"settings": Settings(steps=0)}, PREVIEW_STEPS)],
    indirect=["worker"],
)
def test_partial_images_show_what_is_written(worker: Worker, steps: int) -> None:
    """A renderer is not asked: it has learned from all codes together."""
    shown: list[Preview] = []
    gate = held(worker)
    job = worker.submit(
        worker.model.programs.draw_codes("a ring", 2, seed=5), previews=3, show=shown.append
    )
    other = worker.submit(worker.model.programs.draw("two squares", 2))
    gate.open.set()
    codes, seeds = job.future.result(20)
    other.future.result(20)
    assert [(one.place, one.index) for one in shown] == [(p, i) for i in range(3) for p in (0, 1)]
    for one in shown:
        written = TOKENS * (one.index + 1) // 4
        kept = torch.arange(TOKENS) >= TOKENS - written  # the language order is the reverse
        tokenizer = cells(worker)
        whole = tokenizer.decode(codes[one.place][None], steps=steps, seed=[seeds[one.place]])[0]
        there = kept.view(4, 4).repeat_interleave(4, 0).repeat_interleave(4, 1)
        assert torch.equal(one.image[:, there], whole[:, there])
        assert torch.equal(one.image[:2, ~there], torch.full_like(whole[:2, ~there], -1.0))


@pytest.mark.parametrize("worker", [{"settings": PLANNING}], indirect=True)
def test_of_further_tries_nothing_is_shown(worker: Worker) -> None:
    shown: list[Preview] = []
    program = worker.model.programs.draw("a ring", 1, seed=5)
    worker.submit(program, previews=2, show=shown.append).future.result(20)
    assert [one.index for one in shown] == [0, 1]


def test_who_stops_it_waits_for_what_is_under_way_and_no_longer() -> None:
    worker = Worker(tiny_model(), Limits(rows=4), Metrics())
    jobs = [worker.submit(worker.model.programs.draw("a ring", 2, seed)) for seed in range(3)]
    worker.close(20)
    assert [len(job.future.result(0)) for job in jobs] == [2] * 3
    with pytest.raises(Closed, match="shutting down"):
        worker.submit(worker.model.programs.draw("a ring"))
    worker = Worker(tiny_model(), Limits(rows=4), Metrics())
    gate = held(worker)
    job = worker.submit(worker.model.programs.draw("a ring"))
    closing = threading.Thread(target=worker.close, args=(0.01,))
    closing.start()
    with pytest.raises(Closed, match="told to stop"):
        job.future.result(20)
    gate.open.set()
    closing.join(20)
    assert not closing.is_alive()


def test_a_model_and_rows_that_cannot_serve_are_refused() -> None:
    with pytest.raises(UserError, match="rows: given 2, this model needs 3 or more"):
        Worker(tiny_model(PLANNING), Limits(rows=2), Metrics())
    with pytest.raises(UserError, match="without a language model"):
        Worker(Model(Cells(), name="eyes"), Limits(), Metrics())
    with pytest.raises(UserError, match=r"deadline: given 0.0, allowed is 0.05 to 86400"):
        Limits(deadline=0.0)
