"""Two processes with half of the batch each keep the codebook of one process that has it all."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddt_llama import distributed
from ddt_llama.tokenizer.quantizer import Quantizer, QuantizerConfig

STEPS, BATCH, TOKENS, DIM = 50, 8, 4, 4


def features(step: int) -> Tensor:
    """A batch whose features drift round the sphere, so that codes die all the time."""
    centre = torch.tensor([step / 4, step / 5, 1.0, 0.0]).sin()
    noise = torch.randn(BATCH, TOKENS, DIM, generator=torch.Generator().manual_seed(step))
    return 3 * centre + noise


def train() -> dict[str, Tensor]:
    """Return the codebook after every step, how many codes were replaced, and the counts."""
    torch.manual_seed(distributed.rank())  # ranks start apart, rank 0 wins
    net = Quantizer(QuantizerConfig(16, DIM, decay=0.8, dead_share=0.3), TOKENS)
    net.codebook.copy_(distributed.broadcast(net.codebook))
    share = BATCH // distributed.world_size()
    books, replaced = [], []
    for step in range(STEPS):
        mine = features(step)[distributed.rank() * share :][:share]
        replaced.append(net.update(mine, net(mine).codes, seed=step))
        books.append(net.codebook.clone())
    history = {"books": torch.stack(books), "replaced": torch.tensor(replaced)}
    return {**history, "usage": net.usage.clone(), "counts": net.counts.clone()}


def rank_main(folder: str) -> None:
    distributed.setup()
    save_file(train(), Path(folder) / f"rank{distributed.rank()}.safetensors")
    distributed.teardown()


def start(rank: int, port: int, folder: Path) -> subprocess.Popen[str]:
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    call = f"import test_codebook as t; t.rank_main({str(folder)!r})"
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-c", call],
        env={**os.environ, **place, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_processes_keep_the_codebook_of_one(tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [start(rank, port, tmp_path) for rank in range(2)]
    try:
        for child in children:
            output, _ = child.communicate(timeout=100)
            assert child.returncode == 0, output
    finally:
        for child in children:
            child.kill()
    one = train()
    assert one["replaced"][0] == 16
    assert (one["replaced"][1:] > 0).sum() > 20  # forced deaths
    two = [load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(2)]
    for name, values in one.items():
        assert torch.equal(two[0][name], two[1][name]), name
        torch.testing.assert_close(two[0][name], values, rtol=1e-4, atol=1e-5, msg=name)
