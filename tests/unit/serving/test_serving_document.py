"""Whatever the OpenAPI document allows, or nearly allows, gets an answer that it describes.

The short form; the long one is a command of docs/serving.md.
"""

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from tiny_model import cut_answers_short
from tiny_server import Running, running

# What no schema can say (tokens of a prompt, a picture behind base64) is refused with 400.
UNKNOWABLE = "positive_data_acceptance"
PATHS = ("/v1/images/generations", "/v1/images/edits", "/v1/chat/completions")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_answers_short(monkeypatch)


@pytest.fixture(scope="module")
def here() -> Iterator[Running]:
    with running() as server:
        yield server


@pytest.mark.filterwarnings("ignore:Do not use the `random` module")  # of schemathesis
@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("path", PATHS)
def test_answers_are_those_of_the_document(here: Running, path: str, mode: GenerationMode) -> None:
    document = schemathesis.openapi.from_url(f"{here.server.address}/openapi.json")
    load_all_checks()
    left_out = [CHECKS.get_one(UNKNOWABLE)]

    @given(case=document[path]["POST"].as_strategy(mode))
    @settings(
        max_examples=12,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    def check(case: schemathesis.Case) -> None:
        case.call_and_validate(excluded_checks=left_out, timeout=30)

    check()
