"""A run folder: everything that one training leaves behind, and how it is written.

config.json, environment.json, metrics.jsonl (one object a line, no step twice), samples/,
checkpoints/ and tensorboard/. A folder belongs to one recipe: continuing it with another one is
refused with the list of changed fields.
"""

import dataclasses
import fcntl
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from ddt_llama import distributed
from ddt_llama.config import (
    UserError,
    flatten,
    from_dict,
    load_json,
    replace_file,
    save_json,
    to_dict,
)
from ddt_llama.states import Found, Kept, Saver, State, newest_state, states, states_after

# A field may change between two starts of one run where its dataclass says so:
# field(default=..., metadata=MAY_CHANGE), or MAY_GROW for a number that may only grow.
MAY_CHANGE = {"may_change": True}
MAY_GROW = {"may_grow": True}


class Run:
    """The folder of one training; only the main process writes."""

    def __init__(self, folder: Path, config: Any, lock: IO[str] | None) -> None:
        """Take over a prepared folder; use `create_or_resume`."""
        self.folder = folder
        self.config = config
        self._lock = lock  # held until the process ends, also by SIGKILL
        self._metrics: IO[str] | None = None
        self._board: Any = None
        self._saver: Saver | None = None
        self._resumed_at: int | None = None
        self._skipped: frozenset[Path] = frozenset()

    @classmethod
    def create_or_resume(cls, folder: str | os.PathLike[str], config: Any) -> "Run":
        """Open `folder` for the recipe `config`, a frozen dataclass.

        Raises UserError before any work where the folder cannot be written, is in use by another
        process, holds files that are no run, or belongs to another recipe.
        """
        folder = Path(folder)
        run = distributed.on_main(lambda: cls._prepare(folder, config))
        return run or cls(folder, config, None)

    @classmethod
    def _prepare(cls, folder: Path, config: Any) -> "Run":
        described = folder / "config.json"
        if described.exists():
            _check_same_recipe(described, config)
        elif folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise UserError(f"{folder}: not empty and not a run; choose another folder")
        run = cls(folder, config, lock_folder(folder, "is training"))
        try:
            save_json(described, to_dict(config))
            record_environment(folder / "environment.json")
            for path in (run.samples, run.checkpoints):
                path.mkdir(exist_ok=True)
        except BaseException:
            run.close()
            raise
        return run

    @property
    def samples(self) -> Path:
        """The folder for pictures made along the way."""
        return self.folder / "samples"

    @property
    def checkpoints(self) -> Path:
        """The folder of training states."""
        return self.folder / "checkpoints"

    def save(self, state: State, keep: int, keep_every: int = 0) -> None:
        """Write a training state in the background, all or nothing; all processes take part.

        The newest `keep` stay, and every one whose step `keep_every` divides. Raises UserError
        where the disk refused the one before.
        """
        if self._saver is None:
            self._saver = Saver(self.checkpoints)
        self._saver.save(state, Kept(keep, keep_every, self._skipped))

    def wait(self) -> None:
        """Wait until the last state is written. Raises UserError where the disk refuses it."""
        if self._saver is not None:
            self._saver.wait()

    def resume(self) -> Found | None:
        """Return the newest good state and drop every metric written after it."""
        distributed.barrier()  # the main process has prepared the folder
        state = newest_state(self.checkpoints)
        if state is None and states(self.checkpoints):
            raise UserError(
                f"{self.checkpoints}: none of the states can be read, and the training would begin "
                "again; put one back, or choose another folder"
            )
        self._resumed_at = state.step if state else None
        if distributed.is_main():
            self._truncate(state.step if state else 0)
            skipped = states_after(self.checkpoints, state.step if state else 0)
            self._skipped = frozenset(skipped)
        return state

    def log(self, record: Mapping[str, float | int | str]) -> None:
        """Append one line to metrics.jsonl; `record` must hold "step"."""
        if not distributed.is_main():
            return
        path = self.folder / "metrics.jsonl"
        try:
            if self._metrics is None:
                self._metrics = path.open("a", encoding="utf-8")
            self._metrics.write(json.dumps(record) + "\n")
            self._metrics.flush()
        except OSError as error:
            reason = f"cannot be written ({error.strerror})"
            raise UserError(f"{path}: {reason}; free the disk and go on") from None

    def board(self, record: Mapping[str, float | int | str]) -> None:
        """Show the numbers of `record` in TensorBoard."""
        if not distributed.is_main():
            return
        if self._board is None:
            if importlib.util.find_spec("tensorboard") is None:
                choice = "install ddt-llama[train] or set tensorboard=false"
                raise UserError(f"tensorboard is not installed; {choice}")
            from torch.utils.tensorboard.writer import SummaryWriter

            later = (self._resumed_at or 0) + 1
            self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=later)
        for name, value in record.items():
            if name != "step" and isinstance(value, (int, float)):
                self._board.add_scalar(name, value, int(record["step"]))

    def __enter__(self) -> "Run":
        """Return itself; leaving the `with` block closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the run, whatever happened."""
        self.close()

    def close(self) -> None:
        """Close the files and let another process use the folder."""
        for file in (self._saver, self._metrics, self._board, self._lock):
            if file is not None:
                file.close()
        self._saver = self._metrics = self._board = self._lock = None

    def _truncate(self, step: int) -> None:
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_bytes().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue  # the line that a kill cut short
        replace_file(path, b"".join(line + b"\n" for line in kept))


def lock_folder(folder: Path, does: str) -> IO[str]:
    """Create the folder, prove that it can be written, and keep other processes out.

    They are told what the process that holds it `does` there. The lock is held until the file that
    is returned is closed, or the process ends, by SIGKILL too.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        reason = f"cannot be written ({error.strerror})"
        raise UserError(f"{folder}: {reason}; choose another folder") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise UserError(f"{folder}: another process {does} here; stop it or wait") from None
    return lock


def _check_same_recipe(described: Path, config: Any) -> None:
    """Raise UserError with the changed fields where config.json describes another recipe."""
    saved = load_json(described)
    try:
        changed = changed_fields(saved, config)
    except UserError as error:
        remedy = "choose another folder"
        raise UserError(f"{described.parent}: made by another recipe ({error}); {remedy}") from None
    if changed:
        remedy = "choose another folder or give the old values"
        raise UserError(f"{described.parent}: another recipe: {'; '.join(changed)}; {remedy}")


def changed_fields(saved: Mapping[str, Any], config: Any) -> list[str]:
    """Say which fields of `config` differ from the saved ones and may not.

    Raises UserError where those describe another dataclass.
    """
    before, now = flatten(from_dict(type(config), saved)), flatten(config)
    may_change, may_grow = _marked(config, "may_change"), _marked(config, "may_grow")
    changed = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        grown = name in may_grow and old is not None and new is not None and new >= old
        owner_may_change = any(name == free or name.startswith(f"{free}.") for free in may_change)
        if old != new and not owner_may_change and not grown:
            changed.append(f"{name} was {json.dumps(old)}, now {json.dumps(new)}")
    return changed


def _marked(config: Any, mark: str, prefix: str = "") -> set[str]:
    """Return the dotted names of the fields that carry `mark` in their metadata."""
    names = set()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.metadata.get(mark):
            names.add(f"{prefix}{field.name}")
        elif dataclasses.is_dataclass(value):
            names |= _marked(value, mark, f"{prefix}{field.name}.")
    return names


def record_environment(path: Path) -> None:
    """Write where and with what this run started; later starts are added under "resumed"."""
    now = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpus": distributed.usable_cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "processes": distributed.world_size(),
    }
    first = load_json(path) if path.exists() else None
    if first is None:
        save_json(path, {**now, "resumed": []})
    else:
        save_json(path, {**first, "resumed": [*first.get("resumed", []), now]})


def told_environment(path: Path) -> str:
    """Say in a sentence at which commits and on what the starts of a folder ran."""
    first = load_json(path)
    places = [
        f"commit {one['commit'] or 'unknown'} on {one['gpu'] or 'a CPU'}"
        for one in (first, *first["resumed"])
    ]
    return f"Started from {', '.join(dict.fromkeys(places))} (environment.json)."


def _commit() -> str | None:
    """Return the commit of the source tree, "-dirty" added where files differ; None outside git."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
