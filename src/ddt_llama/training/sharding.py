"""Spread a training over processes: each holds a shard of weights, gradients and their moments.

Outside of models and objectives, by PyTorch's FSDP2 (`fully_shard`, a block at a time), which is
ZeRO-3 (Rajbhandari et al. 2020). Blocks are what lies in lists of modules, as in every transformer
here and in transformers.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ddt_llama import distributed

# It warns of blocks that return views, which no model here changes in place.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
Shard = Literal["none", "full", "hybrid"]
Recompute = Literal["none", "blocks", "selective"]
# What "selective" keeps: products are dear to compute again, all the rest is cheap.
KEPT = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


class Pass(nn.Module):
    """One forward pass of an objective, as a module.

    Whatever an objective asks of its model it asks inside of `forward`, where the weights outside
    of blocks are whole.
    """

    def __init__(self, model: nn.Module, objective: Callable[..., tuple[Tensor, Any]]) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: Any, step_seed: int) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """Return loss and figures."""
        return self.objective(self.model, batch, step_seed)


def is_sharded(shard: Shard) -> bool:
    """Say whether there is something to spread: one process alone holds everything."""
    return shard != "none" and distributed.world_size() > 1


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the outermost members with parameters of all lists of modules."""
    found: list[nn.Module] = []
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            found += [one for one in child if next(one.parameters(), None) is not None]
        else:
            found += blocks_of(child)
    return found


def methods_of(block: nn.Module) -> list[str]:
    """Return the names of what a block can be asked for: `forward` and its other public methods."""
    own = vars(type(block))
    return [n for n, one in own.items() if callable(one) and not n.startswith("_")]


def parts_to_compile(model: nn.Module, objective: Any, shard: Shard) -> list[nn.Module]:
    """Return what is compiled; of a model in shards its blocks, each by itself."""
    if is_sharded(shard):
        return blocks_of(model)
    return getattr(objective, "parts_to_compile", lambda model: [model])(model)


def recompute_blocks(model: nn.Module, kind: Recompute) -> None:
    """Let blocks forget what they computed and compute it again in the backward pass.

    "selective" keeps the products.
    """
    if kind == "none":
        return
    again = partial(checkpoint, use_reentrant=False)
    if kind == "selective":
        again = partial(again, context_fn=partial(create_selective_checkpoint_contexts, _policy))
    for block in blocks_of(model):
        for name in methods_of(block):
            setattr(block, name, partial(again, getattr(block, name)))


def spread(passes: Pass, shard: Shard, *, offload: bool, bf16: bool) -> None:
    """Cut the parameters of a pass into shards, in place; "hybrid" within each machine.

    `offload` keeps a GPU's shards in the memory of the CPU. With `bf16` weights travel and compute
    in bfloat16, gradients are summed in float32. Parameters on the meta device get room for their
    shards, with nothing in it yet.
    """
    device = distributed.device().type
    offload = offload and device != "cpu"
    low = bf16 and distributed.has_bf16(distributed.device())
    options: dict[str, Any] = {
        "mesh": _mesh(device, shard),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if low else None,
            reduce_dtype=torch.float32 if low else None,
            cast_forward_inputs=False,
        ),
        "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
    }
    for block in blocks_of(passes.model):
        names = methods_of(block)
        fully_shard(block, **options)
        for name in names:
            if name != "forward":
                register_fsdp_forward_method(block, name)
    fully_shard(passes, **options)
    make_room(passes, torch.device("cpu") if offload else distributed.device())


def make_room(module: nn.Module, device: torch.device) -> None:
    """Move parameters off the meta device; what they hold is still to be read."""
    for parameter in module.parameters():
        if parameter.is_meta:
            room = torch.empty_like(parameter, device=device)
            # The same object stays: tied layers and FSDP2 know it.
            torch.utils.swap_tensors(parameter, nn.Parameter(room, parameter.requires_grad))


@contextmanager
def whole(passes: Pass) -> Iterator[None]:
    """Hold the weights outside of blocks as a whole, so that parts of the model can be called.

    All processes have to call the same ones.
    """
    if not isinstance(passes, FSDPModule):
        yield
        return
    passes.unshard()
    try:
        yield
    finally:
        passes.reshard()


def gather(model: nn.Module) -> None:
    """Make a sharded model whole on the CPU of the main process, a parameter at a time.

    To be saved, not to be trained or asked. All processes take part; what the others hold is then
    of no use.
    """
    # Not by `model.cpu()`: FSDP2 would look for its shards.
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                values = distributed.gathered(parameter)
                if values is not None:
                    module._parameters[name] = nn.Parameter(values, parameter.requires_grad)
        for name, buffer in list(module._buffers.items()):
            module._buffers[name] = None if buffer is None else buffer.cpu()


def _mesh(device: str, shard: Shard) -> DeviceMesh:
    world, local = distributed.world_size(), distributed.local_world_size()
    if shard == "hybrid" and 1 < local < world:
        return init_device_mesh(
            device, (world // local, local), mesh_dim_names=("replicate", "shard")
        )
    return init_device_mesh(device, (world,))


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
