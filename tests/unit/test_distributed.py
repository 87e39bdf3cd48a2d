"""What one process sees; two processes are tested in tests/distributed."""

import platform
import resource

import pytest
import torch

from ddt_llama import distributed

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
