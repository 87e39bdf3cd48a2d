"""The suites by name: what `ddt evaluate --suite NAME` can run."""

from collections.abc import Mapping
from typing import Any, cast

from ddt_llama.config import UserError, override
from ddt_llama.data.sources import ImageSource, Sample
from ddt_llama.evaluation.intervals import Figure
from ddt_llama.evaluation.pictures import Pictures, SourcePictures
from ddt_llama.evaluation.reconstruction import ReconstructionSuite
from ddt_llama.evaluation.shapes_suite import ShapesSuite
from ddt_llama.evaluation.text import TextSuite
from ddt_llama.generation.model import Model

Suite = ReconstructionSuite | ShapesSuite | TextSuite

SUITES: Mapping[str, type[Suite]] = {
    "reconstruction": ReconstructionSuite,
    "shapes": ShapesSuite,
    "text": TextSuite,
}


def suite_named(name: str, changes: Mapping[str, Any] | None = None) -> Suite:
    """Return a suite with some of its fields changed, e.g. `{"scenes": 100}`.

    Raises UserError with the list of what exists for an unknown suite or field.
    """
    if name not in SUITES:
        raise UserError(f"unknown suite {name!r}; the suites are: {', '.join(SUITES)}")
    return cast(Suite, override(SUITES[name](), changes or {}))


def evaluate(
    model: Model, suite: Suite, source: ImageSource[Sample] | None = None
) -> dict[str, Figure]:
    """Run a suite on a model; `source` gives `reconstruction` other pictures than scenes.

    Raises UserError where the suite cannot use a source or the model cannot do what is asked.
    """
    if isinstance(suite, ReconstructionSuite):
        pictures: Pictures | None = None
        if source is not None:
            wanted = max(suite.scenes, suite.codebook_scenes)
            pictures = SourcePictures(source, model.tokenizer.image_size, wanted)
        return suite.run(model.tokenizer, pictures)
    if source is not None:
        raise UserError("pictures of your own are for the suite reconstruction; leave them out")
    return suite.run(model)
