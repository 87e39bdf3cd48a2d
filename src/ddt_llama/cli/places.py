"""Models and files as a user names them: found, and checked before any work is done."""

from pathlib import Path

from ddt_llama.config import UserError, check_folder


def check_file(path: Path, *suffixes: str) -> None:
    """Raise UserError where a file of this name could not be written, without touching it."""
    if path.suffix.lower() not in suffixes:
        raise UserError(f"{path}: allowed are names that end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give the name of a file")
    check_folder(path.parent)


def numbered(path: Path, count: int) -> list[Path]:
    """Return `count` names: the path itself, or NAME-1.png, NAME-2.png, ... where there are more.

    >>> [str(name) for name in numbered(Path("a.png"), 2)]
    ['a-1.png', 'a-2.png']
    """
    if count == 1:
        return [path]
    return [path.with_stem(f"{path.stem}-{number}") for number in range(1, count + 1)]
