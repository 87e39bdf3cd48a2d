"""An untrained model never ends an answer: here answers are cut short."""

import functools

import pytest

from ddt_llama.generation import programs
from ddt_llama.generation.engine import Answer


@pytest.fixture(autouse=True)
def _short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "Answer", functools.partial(Answer, most=12))
