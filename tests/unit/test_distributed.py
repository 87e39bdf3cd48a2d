"""What one process sees; two processes are tested in tests/distributed."""

import pytest
import torch

from ddt_llama import distributed

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({}, False),
        ({"avx512_vnni": True}, False),
        ({"avx512_bf16": True}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"bf16": True}, True),
    ],
)
def test_bf16_is_used_only_where_the_processor_has_it(found, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert distributed.has_bf16(CPU) is expected
    weights = torch.ones(2, 2)
    with distributed.autocast(CPU, bf16=True):
        assert (weights @ weights).dtype == (torch.bfloat16 if expected else torch.float32)
    with distributed.autocast(CPU, bf16=False):
        assert (weights @ weights).dtype == torch.float32
