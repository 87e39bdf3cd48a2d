"""ddt-llama: images as a language that a LLaMA can speak.

`load("nano")` opens a model; `Model` is what it returns. Both are imported when first used, so that
`import ddt_llama` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddt_llama.generation.model import Model
    from ddt_llama.generation.release import load

__version__ = "0.1.0"
__all__ = ["Model", "__version__", "load"]

_HOMES = {"Model": "ddt_llama.generation.model", "load": "ddt_llama.generation.release"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
