"""Models and files as a user names them: found, and checked before any work is done."""

from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path

from ddt_llama.config import UserError, check_folder


def check_file(path: Path, *suffixes: str) -> None:
    """Raise UserError where a file of this name could not be written, without touching it."""
    if path.suffix.lower() not in suffixes:
        raise UserError(f"{path}: allowed are names that end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give the name of a file")
    check_folder(path.parent)


def numbered(path: Path, many: int) -> list[Path]:
    """Return `many` names: the path itself, or NAME-1.png, NAME-2.png, ... where there are more.

    >>> [str(name) for name in numbered(Path("a.png"), 2)]
    ['a-1.png', 'a-2.png']
    """
    if many == 1:
        return [path]
    return [path.with_stem(f"{path.stem}-{number}") for number in range(1, many + 1)]


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Return a file name without suffix for each path; equal ones get a number, "sheet" too.

    >>> distinct_names([Path("a/x.png"), Path("b/x.jpg"), Path("x-2.png"), Path("sheet.png")])
    ['x', 'x-2', 'x-2-2', 'sheet-2']
    """
    names: list[str] = []
    for path in paths:
        free = chain([path.stem], (f"{path.stem}-{number}" for number in count(2)))
        names.append(next(name for name in free if name != "sheet" and name not in names))
    return names
