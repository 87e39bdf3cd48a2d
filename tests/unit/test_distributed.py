"""What one process sees; two processes are tested in tests/distributed."""

import platform
import resource

import pytest
import torch
import torch.distributed as dist

from ddt_llama import distributed
from ddt_llama.config import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({}, False),
        ({"avx512_vnni": True}, False),
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, True),
        ({"avx512_bf16": True, "cpu_name": "Intel Xeon"}, False),
        ({"avx512_bf16": True, "amx_bf16": True, "cpu_name": "Intel Xeon"}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"bf16": True}, True),
    ],
)
def test_bf16_is_used_only_where_the_processor_gains_by_it(found, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert distributed.has_bf16(CPU) is expected
    weights = torch.ones(2, 2)
    with distributed.autocast(CPU, bf16=True):
        assert (weights @ weights).dtype == (torch.bfloat16 if expected else torch.float32)
    with distributed.autocast(CPU, bf16=False):
        assert (weights @ weights).dtype == torch.float32


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what is kept is glibc's")
def test_freed_memory_is_used_again() -> None:
    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)  # 64 MB: more than is kept without asking
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    distributed.setup()
    counts = [faults() for _ in range(10)]
    assert min(counts) < 1000, counts  # of 16,384 pages; all of them every time, else


GLOO = "[/build/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [10.0.0.1]:5: "


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            RuntimeError(f"{GLOO}Connection reset by peer. This is typically caused by"),
            "Read error [10.0.0.1]:5: Connection reset by peer",
        ),
        (dist.DistNetworkError("Broken pipe\nframe #0"), "Broken pipe"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] not enough memory"), None),
        (ValueError(f"{GLOO}Connection reset by peer"), None),
        (None, None),
    ],
)
def test_a_lost_process_is_known_by_its_error(error, told):
    assert distributed.loss_in(error) == told


def test_tensors_that_do_not_fit_are_no_lost_process():
    told = (
        "[enforce fail at /gloo/transport/tcp/pair.cc:446] op.preamble.length <= op.nbytes. 8 vs 4"
    )
    assert distributed.loss_in(RuntimeError(told)) is None


@pytest.mark.parametrize(("rank", "error"), [("0", UserError), ("1", SystemExit)])
def test_a_mistake_of_all_is_told_by_one(rank, error, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(error) as told:
        distributed.refuse("batch")
    assert told.value.args == ("batch" if rank == "0" else 2,)
