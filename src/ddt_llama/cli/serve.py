"""The verb that serves a model to many: ddt serve."""

import importlib.util
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from ddt_llama.cli.kinds import Adapter, Model, Weights
from ddt_llama.config import UserError
from ddt_llama.serving.limits import Limits

NEEDED = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")


def serve(
    model: Model,
    limits: Annotated[Limits, arg(name="")] = Limits(),
    *,
    adapter: Adapter = None,
    weights: Weights = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_file: Path | None = None,
    log_prompts: bool = False,
) -> None:
    """Serve a model by OpenAI's interface: draw, edit, chat (docs/serving.md).

    Example: ddt serve nano --port 8000

    Args:
        model: nano (comes with the program), a folder of ddt train or ddt publish, or a hub name.
        limits: What clients may ask for.
        adapter: What LoRA has learned beside the model: a folder of ddt train lora, or a hub name.
        weights: Of the language model, while it writes: float32, bfloat16 or int8.
        host: The address to listen at; this machine alone, unless told otherwise.
        port: 0 takes any that is free; the line that is printed names it.
        api_key_file: A file with the keys that clients may give, one a line.
        log_prompts: Write what clients ask for into the log.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} is not installed; install ddt-llama[serve]")
    from ddt_llama.generation import load
    from ddt_llama.serving.logs import write_json_lines
    from ddt_llama.serving.served import LOOPBACK, Served, read_keys
    from ddt_llama.serving.server import Server, listener

    keys = [] if api_key_file is None else read_keys(api_key_file)
    with listener(host, port) as bound:
        opened = load(model, adapter=adapter, weights=weights)
        served = Served(opened, limits, keys, loopback=host in LOOPBACK, log_prompts=log_prompts)
        write_json_lines()
        Server(served, bound, f"serving {opened.name}").run_until_stopped()
