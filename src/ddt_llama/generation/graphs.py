"""Decode steps as CUDA graphs: one call in place of some twenty a layer.

A GPU waits for Python where few rows are written. A step is recorded once for so many rows and
slots and replayed from then on; rows that join and leave reuse what is recorded, because there are
few widths: powers of two. Source: torch.cuda.CUDAGraph.

Written after its documentation and tested on a CPU by a stand-in for capture: no GPU has run it.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddt_llama.generation.rows import Rows

LOOK = 256  # slots: a graph looks at a whole number of these, so that few are recorded
WARM_UPS = 2  # libraries choose their kernels and take their memory before anything is recorded

Replay = Callable[[], Tensor]
Step = Callable[[Int[Tensor, " r"], Rows, int, int], Float[Tensor, "r s"]]


class Graphs:
    """Takes steps through recordings, which belong to the rows and go with them."""

    def __init__(self, capture: Callable[[Replay], Replay]) -> None:
        """Take `capture`, which runs a function and returns what does the same again."""
        self.capture = capture

    def __call__(self, step: Step, ids: Int[Tensor, " r"], rows: Rows) -> Float[Tensor, "r s"]:
        """Return `step(ids, rows, rows.count, rows.stop)`, taken over some rows and slots more.

        Free rows write rubbish into their own first slot, which nobody reads. `step` must do the
        same when it is taken again, and nothing in it may depend on what the host alone knows.
        """
        width = min(1 << (rows.count - 1).bit_length(), len(rows.positions))
        stop = min(-(-rows.stop // LOOK) * LOOK, rows.capacity)
        rows.given[: rows.count] = ids
        if (width, stop) not in rows.recorded:
            given = rows.given[:width]
            rows.recorded[width, stop] = self.capture(lambda: step(given, rows, width, stop))
        # A copy: recordings share their memory, so that any of them may write over what this wrote.
        return rows.recorded[width, stop]()[: rows.count].clone()


def on(device: torch.device) -> Graphs | None:
    """Return what records on this device; None where it has no graphs."""
    if device.type != "cuda":
        return None
    pool = torch.cuda.graph_pool_handle()
    # One stream for warm-ups and recordings: cuBLAS takes its workspace once a stream, and here
    # before a recording, so that it does not lie in the pool.
    aside = torch.cuda.Stream(device)

    def capture(step: Replay) -> Replay:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(WARM_UPS):
                    step()
            torch.cuda.current_stream().wait_stream(aside)
            # Only this thread's calls end a recording: a server's others may use the device.
            with torch.cuda.graph(graph, pool, aside, capture_error_mode="thread_local"):
                written = step()

        def replay() -> Tensor:
            graph.replay()
            return written

        return replay

    return Graphs(capture)
