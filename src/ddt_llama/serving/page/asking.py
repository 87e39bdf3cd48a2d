"""What the page asks of the worker: checked as the interface checks it, shown as it comes."""

import asyncio
import html
import logging
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakSet

import gradio
import pydantic
from gradio.events import Dependency
from jaxtyping import Float
from torch import Tensor

from ddt_llama.data.images import BrokenImage
from ddt_llama.generation.settings import Options
from ddt_llama.generation.work import Program, R
from ddt_llama.serving import follow
from ddt_llama.serving.errors import of_validation, refusal
from ddt_llama.serving.jobs import Job, Preview
from ddt_llama.serving.schema import Drawing, Generation
from ddt_llama.serving.served import Served

D = TypeVar("D", bound=Drawing)
NOTHING = "Nothing to do"
STOPPED = "Stopped."
log = logging.getLogger(__name__)


def mistake(message: str, title: str = "That did not work") -> gradio.Error:
    """Return what shows one line in the page."""
    return gradio.Error(html.escape(message), title=title, print_exception=False)


@contextmanager
def told() -> Iterator[None]:
    """Show in the page what went wrong in a `with` block, in the words of the interface."""
    try:
        yield
    except gradio.Error:
        raise
    except Exception as error:
        if isinstance(error, BrokenImage):
            raise mistake(f"{error.reason[:1].upper()}{error.reason[1:]}.") from None
        name = uuid.uuid4().hex
        refused = refusal(error, name)
        if refused.status == 500:
            log.error("the page failed", exc_info=error, extra={"fields": {"id": name}})
        raise mistake(refused.body["message"] or "") from None


def checked(served: Served, text: str, what: str) -> str:
    """Return words that were given. Raises gradio.Error where there are none, or ApiError."""
    if not text.strip():
        raise mistake(f"Say {what} first.", NOTHING)
    follow.check_text(served, text, "text")
    return text


def drawing(served: Served, **fields: Any) -> tuple[int, Options]:
    """Return seed and options of a drawing. Raises ApiError for what is refused."""
    try:
        given = Generation.model_validate(fields)
    except pydantic.ValidationError as error:
        raise of_validation(error, list(Generation.model_fields)) from None
    return follow.chosen(served, given)


async def opened(served: Served, file: str | None) -> Float[Tensor, "3 h w"]:
    """Open a picture that was sent to the page, in a process of the opener."""
    if file is None:
        raise mistake("Give a picture first.", NOTHING)
    return await served.opener.open(await asyncio.to_thread(Path(file).read_bytes))


def sent(served: Served, place: gradio.Image, *begun: Any) -> gradio.State:
    """Have what is sent to a place opened once; keep its file if that went well, and tell if not.

    What depends on the picture depends on the file that is kept: Gradio's `change` of a picture
    comes again and again while functions use it.
    """
    good = gradio.State(None)

    async def look(file: str | None) -> str | None:
        with told():
            if file is not None:
                await opened(served, file)
            return file

    quiet: Any = {"show_progress": "hidden"}
    looked = gradio.on([place.upload, *begun], look, place, good, **quiet)
    looked.failure(lambda: (None, None), None, [good, place], **quiet)
    place.clear(lambda: None, None, good, **quiet)
    return good


class Ending:
    """How what one visitor waits for can end early, whether its job has begun or not."""

    def __init__(self, visitor: str | None) -> None:
        """Begin for a visitor; the job comes later."""
        self.visitor = visitor
        self.job: Job[Any] | None = None
        self.wanted = False

    def begun(self, job: Job[Any]) -> None:
        """Take the job, and give it up if that is wanted already."""
        self.job = job
        if self.wanted:
            job.cancel()

    def want(self) -> None:
        """Give up the job, or the one that is to come."""
        self.wanted = True
        if self.job is not None:
            self.job.cancel()


async def followed(
    served: Served,
    program: Program[R],
    previews: int = 0,
    ending: Ending | None = None,
) -> AsyncIterator[Preview | R]:
    """Have a program carried out: give its previews as they come, then its result.

    Who goes away gives it up. Raises what the program raises, and CancelledError (of
    concurrent.futures) where `ending` gives it up.
    """
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[Preview | Future[Any]] = asyncio.Queue()

    def put(event: Preview | Future[Any]) -> None:
        loop.call_soon_threadsafe(events.put_nowait, event)

    job = served.worker.submit(program, previews=previews, show=put)
    job.future.add_done_callback(put)
    if ending is not None:
        ending.begun(job)
    try:
        while True:
            try:
                # Not by wait_for: up to Python 3.11 it loses who goes away as an event comes.
                async with asyncio.timeout(job.deadline - time.monotonic()):
                    event = await events.get()
            except TimeoutError:
                job.give_up_late()
                event = job.future
            if isinstance(event, Future):
                yield event.result()
                return
            yield event
    finally:
        job.cancel()


class Stop:
    """A button that ends what goes on in its tab for whoever presses it.

    Not by Gradio's `cancels`, after which its page may say "Error".
    """

    def __init__(self) -> None:
        """Lay out the button; it can be pressed while something goes on."""
        self.button = gradio.Button("Stop", size="md", interactive=False, min_width=80)
        self.endings: WeakSet[Ending] = WeakSet()

    def begin(self, visitor: gradio.Request) -> Ending:
        """Return what the button ends for a visitor as long as it is held."""
        ending = Ending(visitor.session_hash)
        self.endings.add(ending)
        return ending

    def ends(self, *events: Dependency) -> None:
        """Have the button end what these events have begun."""

        async def pressed(visitor: gradio.Request) -> None:
            for ending in self.endings:
                if ending.visitor == visitor.session_hash:
                    ending.want()

        self.button.click(pressed, show_progress="hidden")
        for end in (end for event in events for end in (event.then, event.failure)):
            end(lambda: gradio.Button(interactive=False), None, self.button, show_progress="hidden")


def running() -> gradio.Button:
    """Return the button that ends what goes on, now that something does."""
    return gradio.Button(interactive=True)


async def done(served: Served, program: Program[R], ending: Ending | None = None) -> R:
    """Have a program carried out and return its result; raises what `followed` raises."""
    async for made in followed(served, program, ending=ending):
        if not isinstance(made, Preview):
            return made
    raise AssertionError("a program ends with its result")
