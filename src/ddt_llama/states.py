"""Training states: what a training needs to go on after a kill at any moment, on any processes.

A state is a folder `step-00001200/`. Every process writes what it holds, in safetensors (DCP of
torch, nothing pickled), beside the training; then the main process writes facts and a COMPLETE
marker with sizes and checksums, and gives the folder its name by one rename. Tensors are read back
in place, whatever shards of them are wanted.
"""

import contextlib
import os
import shutil
import warnings
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)

from ddt_llama import distributed
from ddt_llama.config import UserError, load_json, save_json

ALONE = "torch.distributed is disabled"  # what DCP warns of, where one process trains
warnings.filterwarnings("ignore", message=ALONE)
COMPLETE = "COMPLETE"
FACTS = "facts.json"


@dataclass(frozen=True)
class State:
    """What training needs to go on: tensors by name, and plain facts."""

    step: int
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Kept:
    """Which states stay: the newest ones, and every one whose step `every` divides (0: none)."""

    newest: int = 2
    every: int = 0
    damaged: frozenset[Path] = frozenset()  # deleted, and not counted


@dataclass(frozen=True)
class Found:
    """A complete state on disk; `read` fills tensors with it."""

    folder: Path
    step: int
    facts: Mapping[str, Any]
    shapes: Mapping[str, torch.Size] = field(repr=False)

    def read(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill `tensors`, or the shards of them that this process holds, in place.

        Their names and shapes are to be those of `shapes`.
        """
        read_tensors(self.folder, tensors)


class Saver:
    """Write states in the background, one at a time.

    Every process of a training has one, and all save at the same steps.
    """

    def __init__(self, folder: Path) -> None:
        """Keep states under `folder`."""
        self.folder = folder
        # Not the group of the training: its messages must not mix with those of the next step.
        self._group: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._thread = ThreadPoolExecutor(1, "save")
        self._running: Future[None] | None = None

    def save(self, state: State, kept: Kept) -> None:
        """Copy the state and write it in the background; first wait for the last one.

        The state is complete or absent: a kill at any moment leaves the previous ones untouched.
        Raises UserError where the disk refused the last one.
        """
        self.wait()
        copies = {name: _copy(tensor) for name, tensor in state.tensors.items()}
        state = State(state.step, copies, state.facts)
        self._running = self._thread.submit(self._write, state, kept)

    def wait(self) -> None:
        """Wait until the last state is written. Raises UserError where the disk refused it."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """Wait, and end the thread; what went wrong is not told: something else has, before."""
        with contextlib.suppress(Exception, SystemExit):
            self.wait()
        self._thread.shutdown()

    def _write(self, state: State, kept: Kept) -> None:
        final = self.folder / named(state.step)
        partial = self.folder / f".{final.name}.partial"
        error = None
        try:
            if distributed.is_main():
                self._prepare(partial)
            self._agree(None)
            writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
            state_dict_saver.save(
                dict(state.tensors),
                storage_writer=writer,
                process_group=self._group,
                no_dist=self._group is None,
            )
            sums = self._gathered(partial)
            if distributed.is_main():
                self._finish(partial, final, {"step": state.step, **state.facts}, sums)
                _forget(self.folder, final, kept)
        except (OSError, CheckpointException) as failure:
            error = f"{final}: cannot be written ({_reason(failure)}); free the disk and go on"
            if distributed.is_main():
                shutil.rmtree(partial, ignore_errors=True)
        self._agree(error)

    def _prepare(self, partial: Path) -> None:
        for left in self.folder.glob(".step-*.partial"):  # by a kill in the midst of a save
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)

    def _agree(self, error: str | None) -> None:
        """Raise UserError in the main process where any has an error; the others end with 2."""
        errors = [error]
        if self._group is not None:
            errors = [None] * distributed.world_size()
            dist.all_gather_object(errors, error, group=self._group)
        first = next((one for one in errors if one), None)
        if first is not None:
            raise UserError(first) if distributed.is_main() else SystemExit(2)

    def _gathered(self, partial: Path) -> dict[str, tuple[int, int]]:
        """Return size and checksum of every file, each found by the process that wrote it."""
        own = partial.glob(f"shard-{distributed.rank() + 1:05d}-*")
        sums = {path.name: size_and_sum(path) for path in own}
        if self._group is None:
            return sums
        parts: list[Any] = [None] * distributed.world_size()
        dist.all_gather_object(parts, sums, group=self._group)
        return {name: one for part in parts for name, one in part.items()}

    def _finish(
        self,
        partial: Path,
        final: Path,
        facts: Mapping[str, Any],
        sums: Mapping[str, tuple[int, int]],
    ) -> None:
        save_json(partial / FACTS, facts)
        save_json(partial / COMPLETE, {**sums, FACTS: size_and_sum(partial / FACTS)})
        if final.exists():  # a damaged state of the same step: resume has gone past it
            shutil.rmtree(final)
        os.replace(partial, final)
        _flush(self.folder)


def save_state(folder: Path, state: State, kept: Kept = Kept()) -> Path:
    """Write a state and wait for it; return its folder."""
    saver = Saver(folder)
    try:
        saver.save(state, kept)
        saver.wait()
    finally:
        saver.close()
    return folder / named(state.step)


def read_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill `tensors`, or the shards of them that this process holds, from a folder of safetensors.

    All processes take part; each reads what it holds.
    """
    target = {name: tensor.detach() for name, tensor in tensors.items()}
    reader = HuggingFaceStorageReader(str(folder))
    state_dict_loader.load(target, storage_reader=reader, no_dist=not dist.is_initialized())


def load_state(folder: Path) -> Found:
    """Return a state; UserError where it is incomplete or damaged, the same on all processes.

    Each process checks its share of the files.
    """
    if not (folder / COMPLETE).is_file():
        raise UserError(f"{folder}: incomplete (no {COMPLETE} marker); delete it")
    expected = sorted(load_json(folder / COMPLETE).items())
    mine = expected[distributed.rank() :: distributed.world_size()]
    damaged = [name for name, one in mine if not _is_whole(folder / name, one)]
    if dist.is_initialized():
        parts: list[Any] = [None] * distributed.world_size()
        dist.all_gather_object(parts, damaged)
        damaged = [name for part in parts for name in part]
    if damaged:
        raise UserError(
            f"{folder / damaged[0]}: damaged (size or checksum differs); delete {folder.name}"
        )
    facts = dict(load_json(folder / FACTS))
    try:
        metadata: Any = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except SafetensorError as error:  # of a file that is no part of it
        raise UserError(f"{folder}: damaged ({error}); delete it") from None
    shapes = {name: one.size for name, one in metadata.items()}
    return Found(folder, facts.pop("step"), facts, shapes)


def newest_state(folder: Path) -> Found | None:
    """Return the newest good state under `folder`, or None; warns of each one it skips."""
    for candidate in states(folder):
        try:
            return load_state(candidate)
        except UserError as error:
            warnings.warn(f"checkpoint skipped: {error}", stacklevel=2)
    return None


def states_after(folder: Path, step: int) -> list[Path]:
    """Return the states of later steps: what resume skipped, where it found the state of `step`."""
    return [one for one in states(folder) if one.name > named(step)]


def states(folder: Path) -> list[Path]:
    """Return the folders of states, damaged ones too, newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


def named(step: int) -> str:
    """Return the name of the folder of a step."""
    return f"step-{step:08d}"


def size_and_sum(path: Path) -> tuple[int, int]:
    """Return bytes and checksum (CRC-32) of a file."""
    size = total = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            size += len(chunk)
            total = zlib.crc32(chunk, total)
    return size, total


def _is_whole(path: Path, expected: Sequence[int]) -> bool:
    return path.is_file() and list(size_and_sum(path)) == list(expected)


def _forget(folder: Path, final: Path, kept: Kept) -> None:
    """Delete all states but those that stay."""
    damaged = [one for one in states(folder) if one in kept.damaged and one != final]
    good = [one for one in states(folder) if one not in damaged]
    old = [one for one in good[kept.newest :] if not _is_milestone(one, kept.every)]
    for one in [*damaged, *old]:
        with contextlib.suppress(OSError):
            shutil.rmtree(one)


def _is_milestone(folder: Path, every: int) -> bool:
    return every > 0 and int(folder.name.removeprefix("step-")) % every == 0


def _copy(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU that no later step changes; of shards the shards."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _reason(failure: BaseException) -> str:
    """Return what the first process that failed says, in one line."""
    if isinstance(failure, CheckpointException):
        failure = next(iter(failure.failures.values()))[0]
    return str(failure).splitlines()[0] if str(failure) else type(failure).__name__


def _flush(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
