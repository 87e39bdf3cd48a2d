"""Say how many processes train together and let them agree; one process needs none of it.

The only reader of RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE (set by torchrun). Every
reduction is the identity in a single process, so callers never ask which case they are in.
"""

import atexit
import ctypes
import os
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NoReturn, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddt_llama.config import UserError
from ddt_llama.hardware import peak_of

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

T = TypeVar("T")
LOST = 75  # exit code where another process is gone: the same command goes on (sysexits.h)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def rank() -> int:
    """Return the number of this process, 0 to world_size() - 1."""
    return _number("RANK", 0)


def local_rank() -> int:
    """Return the number of this process on its machine."""
    return _number("LOCAL_RANK", 0)


def world_size() -> int:
    """Return the number of processes that train together."""
    return _number("WORLD_SIZE", 1, least=1)


def local_world_size() -> int:
    """Return the number of these processes on this machine."""
    return _number("LOCAL_WORLD_SIZE", 1, least=1)


def is_main() -> bool:
    """Return whether this process writes files and prints."""
    return rank() == 0


def device() -> torch.device:
    """Return the device of this process: its own GPU, or the CPU."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def usable_cores() -> int:
    """Return how many CPU cores this process may use; not every system says, then all there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def setup() -> torch.device:
    """Join the process group, if there is one, and return the device of this process."""
    chosen = device()
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    else:
        keep_freed_memory()
    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        # After a mistake nobody calls `teardown`, and threads that still run abort the process.
        atexit.register(_leave)
    return chosen


def keep_freed_memory() -> None:
    """Let the C library keep what is freed, where it is glibc; elsewhere do nothing.

    It gives large blocks back to the system at once, which has to clear them anew for the next use.
    A step of a small language model with 16,384 codes takes 1.6 times as long so (two cores).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    # An older glibc takes no more than 32 MB, and setting one of the two fixes the other as it is.
    if mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25):
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def has_bf16(device: torch.device) -> bool:
    """Return whether `device` gains by bf16; a CPU without it emulates it, slower by far.

    Intel's AVX-512 multiplies bf16 1.2 to 1.9 times slower than float32 (experiments/0038).
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities()
    names = {"amx_bf16", "bf16"}
    if not found.get("cpu_name", "").startswith("Intel"):
        names.add("avx512_bf16")
    return any(found.get(name, False) for name in names)


def peak_flops(device: torch.device) -> float | None:
    """Return the products in bf16 that `device` can do in a second, None where that is unknown."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has held, of a GPU's memory or else of the machine's.

    0 where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def autocast(device: torch.device, bf16: bool, *, cache: bool = True) -> torch.autocast:
    """Return the context that computes in bf16 where asked for and a gain, else in float32.

    `cache`: weights are rounded once a pass, not once a use; "selective" recomputing, which counts
    a block's operations, loses count where it is used twice.
    """
    enabled = bf16 and has_bf16(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=cache)


def teardown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.barrier()  # gloo aborts a process whose peer leaves while it still talks
        _leave()


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Add `tensor` over all processes, in place; any shape. Returns `tensor`."""
    if world_size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.SUM)
    return tensor


def all_gather(tensor: Tensor) -> Tensor:
    """Return the tensors of all processes, joined along the first axis in rank order.

    Every process must give the same shape.
    """
    if world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def broadcast(tensor: Tensor, source: int = 0) -> Tensor:
    """Give every process the values of process `source`, in place. Returns `tensor`."""
    if world_size() > 1:
        dist.broadcast(tensor, source)
    return tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return all of a tensor of which every process may hold a shard; all take part."""
    tensor = tensor.detach()
    return tensor.full_tensor() if _is_sharded(tensor) else tensor


def rows_of(table: Tensor, places: Tensor) -> Tensor:
    """Return rows of a table of which every process may hold a shard; all take part."""
    table = table.detach()
    if not _is_sharded(table):
        return table[places]
    from torch.distributed.tensor import DTensor, Replicate

    mesh = table.device_mesh
    wanted = DTensor.from_local(places.to(table.device), mesh, [Replicate()] * mesh.ndim)
    return whole_tensor(nn.functional.embedding(wanted, table))  # sums what each has of them


def gathered(tensor: Tensor) -> Tensor | None:
    """Return `whole_tensor` on the CPU of the main process, None in the others."""
    whole = whole_tensor(tensor)
    return whole.cpu() if is_main() else None


def own_shard(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor: the main one its first rows, at the least."""
    tensor = tensor.detach()
    return tensor.to_local() if _is_sharded(tensor) else tensor


def like_shards(values: Tensor, like: Tensor) -> Tensor:
    """Return of `values`, which all processes hold, the shards that `like` has."""
    if not _is_sharded(like):
        return values
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = like.device_mesh, like.placements
    sharded = DTensor.from_local(values, mesh, [Replicate()] * mesh.ndim)
    return sharded.redistribute(mesh, placements)


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier()


def on_main(action: Callable[[], T]) -> T | None:
    """Return what `action` returns in the main process, None in the others.

    Where it fails, the main process raises its error and the others end without a word, instead of
    with a traceback about a lost connection: with exit code 2 at a mistake, else with `LOST`.
    """
    if not dist.is_initialized():
        return action() if is_main() else None
    failed = torch.zeros((), device=device())
    try:
        result = action() if is_main() else None
    except BaseException as error:
        broadcast(failed.fill_(2 if isinstance(error, UserError) else LOST))
        raise
    if code := int(broadcast(failed)):
        raise SystemExit(code)
    return result


def refuse(mistake: str) -> NoReturn:
    """Raise UserError in the main process and end the others, which see the same mistake."""
    raise UserError(mistake) if is_main() else SystemExit(2)


def loss_in(error: BaseException | None) -> str | None:
    """Return, in a few words, how `error` says that another process is gone; None if it does not.

    Gone, or out of reach: NCCL and the store of addresses have errors of their own; gloo's are
    RuntimeErrors like any other, but for the place in its source with which they begin. What gloo
    calls enforced is a mistake of this program.
    """
    told = str(error).partition("\n")[0]
    if isinstance(error, dist.DistError):
        return told[:200]
    place, _, reason = told.partition("] ")
    known = place.startswith("[") and not place.startswith("[enforce")
    gloo = isinstance(error, RuntimeError) and known and "gloo" in place
    return reason.partition(". ")[0] if gloo else None


def broadcast_module(module: nn.Module) -> None:
    """Give every process the parameters and buffers of the main process."""
    if world_size() > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            broadcast(tensor.detach())


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over all processes.

    A gradient absent here counts as zero; one absent everywhere stays absent, so that weight decay
    spares unused parameters as it does in one process. One flat message a dtype in place of one a
    parameter; works whichever method of the model the objective called, which a
    DistributedDataParallel wrapper does not.
    """
    if world_size() == 1:
        return
    buckets: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        buckets.setdefault(parameter.dtype, []).append(parameter)
    for members in buckets.values():
        present = [float(member.grad is not None) for member in members]
        gradients = [
            torch.zeros_like(member) if member.grad is None else member.grad for member in members
        ]
        flags = gradients[0].new_tensor(present)
        flat = torch.cat([flags, *(gradient.reshape(-1) for gradient in gradients)])
        all_reduce_sum(flat)
        flags, flat = flat[: len(members)].tolist(), flat[len(members) :].div_(world_size())
        pieces = flat.split([gradient.numel() for gradient in gradients])
        for member, piece, flag in zip(members, pieces, flags, strict=True):
            member.grad = piece.view_as(member) if flag else None


def _is_sharded(tensor: Tensor) -> TypeGuard["DTensor"]:
    from torch.distributed.tensor import DTensor  # takes a second, which drawing is not to wait for

    return isinstance(tensor, DTensor)


def _number(name: str, default: int, least: int = 0) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    if not text.isdigit() or int(text) < least:
        allowed = f"a number from {least} on"
        raise UserError(f"{name}: given {text!r}, allowed is {allowed}; start with torchrun")
    return int(text)
