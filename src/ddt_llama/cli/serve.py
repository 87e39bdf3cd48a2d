"""The verb that serves a model to many, ddt serve, and what ddt demo --open does."""

import importlib.util
import logging
import threading
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from ddt_llama.cli.kinds import Adapter, Model, Weights
from ddt_llama.config import UserError
from ddt_llama.serving.limits import Limits

NEEDED = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")
OF_PAGE = ("gradio",)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Door:
    """Where clients come in, and who."""

    host: str = "127.0.0.1"
    """The address to listen at; this machine alone, unless told otherwise."""
    port: int = 8000
    """0 takes any that is free; the line that is printed names it."""
    api_key_file: Path | None = None
    """A file with the keys that clients may give, one a line."""


def serve(
    model: Model,
    limits: Annotated[Limits, arg(name="")] = Limits(),
    door: Annotated[Door, arg(name="")] = Door(),
    *,
    adapter: Adapter = None,
    weights: Weights = None,
    log_prompts: bool = False,
    page: bool = True,
) -> None:
    """Serve a model by OpenAI's interface: draw, edit, chat; and a page (docs/serving.md).

    Example: ddt serve nano --port 8000

    Args:
        model: nano (comes with the program), a folder of ddt train or ddt publish, or a hub name.
        limits: What clients may ask for.
        door: Where clients come in, and who.
        adapter: What LoRA has learned beside the model: a folder of ddt train lora, or a hub name.
        weights: Of the language model, while it writes: float32, bfloat16 or int8.
        log_prompts: Write what clients ask for into the log.
        page: A page for people at "/", too, where ddt-llama[page] is installed.
    """
    _need(NEEDED, "serve")
    import torch

    from ddt_llama.generation import load
    from ddt_llama.serving.logs import write_json_lines
    from ddt_llama.serving.served import LOOPBACK, Served, read_keys
    from ddt_llama.serving.server import Server, listener

    keys = [] if door.api_key_file is None else read_keys(door.api_key_file)
    there = not _missing(OF_PAGE)
    with listener(door.host, door.port) as bound:
        gpu = torch.cuda.is_available()
        opened = load(model, adapter=adapter, weights=weights, compile=gpu)
        served = Served(opened, limits, keys, door.host in LOOPBACK, log_prompts, page and there)
        write_json_lines()
        if not (keys or served.loopback):
            log.warning("whoever reaches this address may use it; --api-key-file asks for a key")
        then = _tell_of_page if page and not there else None
        Server(served, bound, f"serving {opened.name}", then).run_until_stopped()


def show(model: str) -> None:
    """Serve a model at a free port of this machine and open its page in the browser."""
    _need((*NEEDED, *OF_PAGE), "page")
    from ddt_llama.generation import load
    from ddt_llama.serving.served import Served
    from ddt_llama.serving.server import Server, listener

    def browse(address: str) -> None:
        print("Ctrl-C ends it", flush=True)
        threading.Thread(target=webbrowser.open, args=[address], daemon=True).start()

    with listener("127.0.0.1", 0) as bound:
        served = Served(load(model), page=True)
        Server(served, bound, f"serving {served.model.name}", browse).run_until_stopped()


def _tell_of_page(_: str) -> None:
    print("the interface alone: for the page, too, install ddt-llama[page]", flush=True)


def _missing(modules: Sequence[str]) -> list[str]:
    return [name for name in modules if importlib.util.find_spec(name) is None]


def _need(modules: Sequence[str], extra: str) -> None:
    missing = _missing(modules)
    if missing:
        raise UserError(f"{', '.join(missing)} is not installed; install ddt-llama[{extra}]")
