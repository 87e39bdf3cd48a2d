"""Shards of codes by many processes on many machines: the same encoder, shared out by Ray Data.

Ray starts the processes, gives each shard to one that is free, and gives it to another where a
process dies. All of them have to reach the model, the pictures and the folder by the same names.
"""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

from ddt_llama.config import UserError, from_dict, to_dict
from ddt_llama.data.codes import Shard
from ddt_llama.recipes.encode import Advance, ShardEncoder, Work


class RemoteEncoder:
    """A process of the cluster: it opens model and pictures once, and encodes what it is given."""

    def __init__(self, work: Work) -> None:
        self._encoder: ShardEncoder | None = None
        self._work = work

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        """Encode shard `row["number"]`; return its line, or the mistake that prevents it."""
        try:
            self._encoder = self._encoder or ShardEncoder(self._work)
            shard = self._encoder(int(row["number"]))
        except UserError as error:
            return {"shard": "", "error": str(error)}
        return {"shard": json.dumps(to_dict(shard)), "error": ""}


def on_ray(encoder: ShardEncoder, numbers: Sequence[int], advance: Advance) -> Iterator[Shard]:
    """Encode shards on the Ray cluster at RAY_ADDRESS, or on one that is started here.

    There are as many processes as GPUs, or as CPU cores where there is no GPU. Lines come in the
    order in which shards are finished. Raises UserError for the first mistake of a process.
    """
    if not numbers:
        return
    ray = _started()
    gpus = int(ray.cluster_resources().get("GPU", 0))
    processes = min(len(numbers), gpus or int(ray.cluster_resources()["CPU"]))
    rows = [{"number": number} for number in numbers]
    done = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        RemoteEncoder,
        fn_constructor_args=(encoder.work,),
        num_cpus=None if gpus else 1,
        num_gpus=1 if gpus else None,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=processes),
    )
    for row in done.iter_rows():
        if row["error"]:
            raise UserError(row["error"])
        shard = from_dict(Shard, json.loads(row["shard"]))
        advance(len(encoder.work.config.rows_of(shard.number)))
        yield shard


def _started() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError:
        raise UserError("engine: ray is not installed; pip install 'ddt-llama[cluster]'") from None
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    return ray
