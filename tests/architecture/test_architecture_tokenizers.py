"""The seam of the tokenizers: whoever uses one asks for abilities, never for its kind."""

import ast
from pathlib import Path

import ddt_llama

SOURCE = Path(ddt_llama.__file__).parent
KINDS = {"TimestepTokenizer", "SpatialTokenizer"}
# Each objective trains its own kind; recipes build and price them.
MAKERS = {"training/timestep.py", "training/spatial.py"}


def modules() -> dict[str, ast.Module]:
    paths = (path for path in SOURCE.rglob("*.py"))
    return {str(path.relative_to(SOURCE)): ast.parse(path.read_text()) for path in paths}


def test_nothing_outside_asks_which_kind_a_tokenizer_is() -> None:
    asking, naming = [], set()
    for name, tree in modules().items():
        if name.startswith("tokenizer/"):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id in KINDS:
                naming.add(name)
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            if called and node.func.id in ("isinstance", "issubclass"):
                words = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                if words & KINDS:
                    asking.append(name)
    assert not asking
    assert {name for name in naming if not name.startswith("recipes/")} == MAKERS


def test_abilities_are_asked_for_by_name() -> None:
    users = {
        name
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("refines", "prefixes")
    }
    probes = {f"probes/{name}.py" for name in ("levels", "prefix", "sources", "swap", "variants")}
    assert users == {"evaluation/reconstruction.py", *probes}
