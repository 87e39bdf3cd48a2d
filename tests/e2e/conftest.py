"""One small pipeline, trained once and shared by the tests of this folder."""

import pytest
from tiny_pipeline import Pipeline, train_all


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """Three stages on the shapes world."""
    return train_all(tmp_path_factory.mktemp("pipeline"))
