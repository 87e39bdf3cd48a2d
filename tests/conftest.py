"""Check the shapes and types that signatures state, in every test.

`ddt_llama.config` is left out: beartype refuses some of pydantic's own hints.
"""

import pkgutil
from pathlib import Path

from jaxtyping import install_import_hook

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "ddt_llama"

install_import_hook(
    [
        f"ddt_llama.{module.name}"
        for module in pkgutil.iter_modules([str(PACKAGE)])
        if module.name != "config"
    ],
    "shape_check.check",
)
