"""Turn frozen dataclasses into JSON and back, change single fields, and print them.

Every recipe, release and run folder is described by one dataclass; this file is the only reader and
writer of that form. Types are checked by pydantic, field by field. `UserError` is the error of the
whole project for mistakes made at its border.
"""

import contextlib
import dataclasses
import difflib
import json
import math
import os
import tempfile
import types
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pydantic

TAG = "type"
Config = TypeVar("Config")


class UserError(ValueError):
    """Say in one line what was given, what is allowed and what to do."""


def check_range(config: Any, low: float, high: float, *names: str) -> None:
    """Raise UserError for the first of the fields `names` that is not in [low, high]; nan is not.

    `high` may be infinite, which the fields then may not be. None is left alone.
    """
    allowed = f"{low:g} or more" if math.isinf(high) else f"{low:g} to {high:g}"
    for name in names:
        value = getattr(config, name)
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            raise UserError(f"{name}: given {value}, allowed is {allowed}")


def to_dict(config: Any) -> dict[str, Any]:
    """Return `config` as JSON-able values.

    Where a field allows several dataclasses (`Straight | Cosine`), the value carries its class
    name under "type", so that `from_dict` never has to guess.
    """
    return {
        name: _plain(getattr(config, name), hint) for name, hint in _hints(type(config)).items()
    }


def from_dict(cls: type[Config], data: Mapping[str, Any], where: str = "") -> Config:
    """Build the dataclass `cls` from `data`; absent fields keep their defaults.

    Raises UserError for an unknown or missing field and for a value of the wrong type or out of
    range, naming the field by its dotted path (`where` is the prefix, such as "optim.").
    """
    hints = _hints(cls)
    place = where.rstrip(".") or cls.__name__
    if not isinstance(data, Mapping):
        raise UserError(f"{place}: given {data!r}, allowed are the fields of {cls.__name__}")
    for name in data:
        if name not in hints:
            raise UserError(_unknown(f"{where}{name}", name, list(hints), place))
    values = {name: _value(hints[name], value, f"{where}{name}") for name, value in data.items()}
    missing = [name for name in hints if name not in values and name in _required(cls)]
    if missing:
        raise UserError(f"{place}: missing {', '.join(missing)}; give a value for each")
    try:
        return cls(**values)
    except UserError as error:  # of the dataclass itself, which does not know where it stands
        raise UserError(f"{where}{error}") from None


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """Return `config` with dotted fields changed, e.g. `{"optim.lr": "3e-4"}`.

    Strings are read as the field's type; "none" is None; "0.9,0.99" is a tuple. A field that
    allows several dataclasses is switched by its class name: `{"path": "Cosine"}`; changes of the
    new class's own fields come after it. In a field that is a dict, what follows its name is one
    key, dots included.
    """
    data = to_dict(config)
    for dotted, value in changes.items():
        names = dotted.split(".")
        table = _depth_of_table(config, names)
        if table is not None:
            names[table:] = [".".join(names[table:])]
        *parents, last = names
        level: Any = data
        for depth, name in enumerate(parents):
            inner = level.get(name) if isinstance(level, dict) else None
            if not isinstance(inner, dict):
                place = ".".join(parents[:depth]) or type(config).__name__
                names = list(level) if isinstance(level, dict) else []
                raise UserError(_unknown(dotted, name, names, place))
            level = inner
        if last == TAG and TAG in level:  # another class: the fields of the old one go with it
            level.clear()
        elif last not in level and table is None and TAG not in level:
            place = ".".join(parents) or type(config).__name__
            raise UserError(_unknown(dotted, last, list(level), place))
        chosen = isinstance(value, str) and isinstance(level.get(last), dict)
        named = chosen and TAG in level[last] and value.isidentifier() and value.lower() != "none"
        level[last] = {TAG: value} if named else value
    return from_dict(type(config), data)


def _depth_of_table(config: Any, names: Sequence[str]) -> int | None:
    """Return where the key of a dict field begins in a dotted name, None where there is none."""
    value = config
    for depth, name in enumerate(names):
        if isinstance(value, Mapping):
            return depth
        value = getattr(value, name, None)
    return None


def flatten(config: Any) -> dict[str, Any]:
    """Return the dotted name of every field of `config` (a dataclass or plain dict) and its value.

    >>> flatten({"optim": {"lr": 0.1}})
    {'optim.lr': 0.1}
    """
    data = config if isinstance(config, Mapping) else to_dict(config)
    flat: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, Mapping) and value:
            flat.update({f"{name}.{inner}": deep for inner, deep in flatten(value).items()})
        else:
            flat[str(name)] = value
    return flat


def show(config: Any) -> str:
    """Return one aligned line a field, for printing and for golden tests."""
    flat = flatten(config)
    width = max((len(name) for name in flat), default=0)
    return "\n".join(f"{name:<{width}}  {json.dumps(value)}" for name, value in flat.items())


def load_json(path: str | os.PathLike[str]) -> Any:
    """Return the content of a JSON file; UserError where it is absent, unreadable or no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except ValueError as error:
        raise UserError(f"{path}: not a JSON file ({error}); restore or delete it") from None


def save_json(path: str | os.PathLike[str], data: Any) -> None:
    """Write `data` as JSON, all or nothing. Numbers that JSON lacks (nan, inf) become null."""
    text = json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False)
    replace_file(path, (text + "\n").encode())


def check_folder(folder: Path) -> None:
    """Raise UserError where `folder` could not be created or written, without touching it."""
    place = folder.absolute()
    try:
        while not place.exists() and place != place.parent:
            place = place.parent
    except OSError as error:  # a name that is too long
        raise UserError(f"{folder}: {error.strerror}; choose another place") from None
    if not place.is_dir():
        raise UserError(f"{folder}: {place} is a file; choose another place")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: {place} cannot be written; choose another place")


def replace_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Write `content` to `path`, all or nothing; UserError where the folder cannot be written."""
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        let_others_read(temporary)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        reason = f"cannot be written ({error.strerror})"
        raise UserError(f"{path}: {reason}; choose another place") from None


def let_others_read(path: str | os.PathLike[str]) -> None:
    """Give a file that was made for its owner alone the rights of any new file."""
    os.chmod(path, 0o666 & ~_umask())


@cache
def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current


@cache
def _hints(cls: type) -> dict[str, Any]:
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"{cls.__name__} is not a dataclass")
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


@cache
def _required(cls: Any) -> frozenset[str]:
    absent = dataclasses.MISSING
    return frozenset(
        field.name
        for field in dataclasses.fields(cls)
        if field.default is absent and field.default_factory is absent
    )


def _dataclasses_in(hint: Any) -> list[type]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [kind for part in typing.get_args(hint) for kind in _dataclasses_in(part)]
    return [hint] if isinstance(hint, type) and dataclasses.is_dataclass(hint) else []


def _element(hint: Any, index: int) -> Any:
    """Return the type of element `index` of a list, tuple or dict-value type (Any if unknown)."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is tuple and arguments and arguments[-1] is not Ellipsis:
        return arguments[index] if index < len(arguments) else Any
    return arguments[0] if typing.get_origin(hint) in (list, tuple) and arguments else Any


def _plain(value: Any, hint: Any = Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        tag = {TAG: type(value).__name__} if len(_dataclasses_in(hint)) > 1 else {}
        return {**tag, **to_dict(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(item, _element(hint, index)) for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Path):
        return str(value)
    return value


def _value(hint: Any, value: Any, where: str) -> Any:
    """Read `value` as `hint`, going into dataclasses and sequences of dataclasses."""
    classes = _dataclasses_in(hint)
    if isinstance(value, str) and value.lower() == "none" and _allows_none(hint):
        return None
    if classes and (isinstance(value, (Mapping, str)) or len(classes) == len(_members(hint))):
        return _instance(classes, value, where)
    inside = _dataclasses_in(_element(hint, 0))
    if inside and isinstance(value, (list, tuple)):
        items = [_value(_element(hint, i), item, f"{where}.{i}") for i, item in enumerate(value)]
        return tuple(items) if typing.get_origin(hint) is tuple else items
    kinds = {typing.get_origin(member) for member in _members(hint)}
    if isinstance(value, str) and kinds & {list, tuple, dict}:
        value = _sequence(value)
    try:
        return _adapter(hint).validate_python(value)
    except pydantic.ValidationError as error:
        wanted = error.errors()[0]["msg"].removeprefix("Input should be ")
        raise UserError(f"{where}: given {value!r}, allowed is {wanted}") from None


def _instance(classes: list[type], value: Any, where: str) -> Any:
    """Build one of `classes`, chosen by the "type" tag where there is a choice."""
    if dataclasses.is_dataclass(value) and type(value) in classes:
        return value
    if isinstance(value, str):
        value = {TAG: value}
    if not isinstance(value, Mapping):
        names = ", ".join(cls.__name__ for cls in classes)
        raise UserError(f"{where}: given {value!r}, allowed are the fields of {names}")
    by_name = {cls.__name__: cls for cls in classes}
    if TAG not in value and len(classes) == 1:
        return from_dict(classes[0], value, f"{where}.")
    chosen = by_name.get(value.get(TAG, ""))
    if chosen is None:
        raise UserError(f"{where}: given {value.get(TAG)!r}, allowed are {', '.join(by_name)}")
    fields = {name: item for name, item in value.items() if name != TAG}
    return from_dict(chosen, fields, f"{where}.")


def _members(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _allows_none(hint: Any) -> bool:
    return type(None) in _members(hint)


@cache
def _adapter(hint: Any) -> Any:  # TypeAdapter[Any] is a hint that beartype refuses
    return pydantic.TypeAdapter(hint)


def _sequence(text: str) -> Any:
    """Read "[1, 2]", '{"a": 1}' or "1,2"."""
    with contextlib.suppress(ValueError):
        parsed = json.loads(text)
        if isinstance(parsed, (list, dict)):
            return parsed
    return [part.strip() for part in text.split(",") if part.strip()]


def _unknown(dotted: str, name: str, allowed: list[str], place: str) -> str:
    near = difflib.get_close_matches(name, allowed, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    fields = ", ".join(field for field in allowed if field != TAG) or "none"
    return f"unknown field {dotted!r}; the fields of {place} are: {fields}{hint}"


def _finite(data: Any) -> Any:
    if isinstance(data, float) and not math.isfinite(data):
        return None
    if isinstance(data, Mapping):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return data
