"""The seam of the tokenizers: whoever uses one asks for abilities, never for its kind."""

import ast
from pathlib import Path

import pytest

import ddt_llama

SOURCE = Path(ddt_llama.__file__).parent
KINDS = {"TimestepTokenizer", "SpatialTokenizer"}
# What has a kind beside them.
OF_A_KIND = KINDS | {f"{kind}Config" for kind in KINDS} | {"TokenizerRecipe", "SpatialRecipe"}
# Each objective trains its own kind; recipes build and price them.
MAKERS = {"training/timestep.py", "training/spatial.py", "training/renderer.py"}


def modules() -> dict[str, ast.Module]:
    paths = (path for path in SOURCE.rglob("*.py"))
    return {str(path.relative_to(SOURCE)): ast.parse(path.read_text()) for path in paths}


def named(tree: ast.AST) -> set[str]:
    """Return all names in a piece of code, also of attributes, imports and forward references."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name):
                found.add(name)
            case ast.Constant(value=str(text)):
                found.add(text)
    return found


def asks(tree: ast.AST) -> bool:
    """Say whether code asks of what kind something is: of classes, of their names, by `match`."""
    others = {
        node.asname: node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.alias) and node.asname
    }
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="isinstance" | "issubclass"), args=[_, kind]):
                asked = named(kind)
            case ast.Compare():
                asked = named(node)
            case ast.MatchClass(cls=kind):
                asked = named(kind)
            case _:
                continue
        if {others.get(name, name) for name in asked} & OF_A_KIND:
            return True
    return False


@pytest.mark.parametrize(
    "code",
    [
        "isinstance(x, SpatialTokenizer)",
        "isinstance(x, (int, tokenizer.SpatialTokenizer))",
        "from ddt_llama.tokenizer import SpatialTokenizer as Other\nisinstance(x, Other)",
        "issubclass(x, TimestepTokenizerConfig)",
        "type(x) is SpatialTokenizer",
        "type(x).__name__ == 'SpatialTokenizer'",
        "isinstance(recipe, SpatialRecipe)",
        "match x:\n    case TimestepTokenizer(): pass",
    ],
)
def test_all_ways_to_ask_are_seen(code: str) -> None:
    assert asks(ast.parse(code))
    assert not asks(ast.parse("SpatialTokenizer(config); isinstance(x, nn.Module)"))


def test_nothing_outside_asks_which_kind_a_tokenizer_is() -> None:
    outside = {name: t for name, t in modules().items() if not name.startswith("tokenizer/")}
    assert [name for name, tree in outside.items() if asks(tree)] == []
    naming = {name for name, tree in outside.items() if named(tree) & KINDS}
    assert {name for name in naming if not name.startswith("recipes/")} == MAKERS


def test_abilities_are_asked_for_by_name() -> None:
    users = {
        name
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("refines", "prefixes")
    }
    probes = {f"probes/{name}.py" for name in ("levels", "prefix", "sources", "swap", "variants")}
    assert users == {"evaluation/bench.py", "evaluation/reconstruction.py", *probes}
