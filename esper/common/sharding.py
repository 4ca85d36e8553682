"""Models that ``torch.distributed.fsdp.fully_shard`` has spread over processes.

A sharded parameter is a DTensor: every process holds a part of it. What is done here with a model
without one is what plain torch would do. Importing torch's modules for it takes half as long as
importing torch, so they are imported only where a user has done so already.
"""

import copy
import shutil
import sys
from collections.abc import Iterable
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from torch import nn
from torch.distributed import ProcessGroup

_FSDP = "torch.distributed.fsdp"
_DTENSOR = "torch.distributed.tensor"


def is_sharded(model: nn.Module) -> bool:
    """Returns whether a model, or a part of it, is spread over processes."""
    if _FSDP not in sys.modules:
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def is_part(tensor: Tensor) -> bool:
    """Returns whether a tensor is spread over processes."""
    if _DTENSOR not in sys.modules:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def reshard(model: nn.Module) -> None:
    """Gives up what a forward without backward has gathered, so that parameters are the parts."""
    if _FSDP not in sys.modules:
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def put(target: Tensor, whole: Tensor) -> None:
    """Copies a tensor into one of the same shape, of which this process may hold a part."""
    with torch.no_grad():
        target.copy_(like(whole, target))


def like(whole: Tensor, target: Tensor) -> Tensor:
    """Returns the part of a tensor that this process holds where another of its shape is spread.

    Args:
        whole: The tensor, equal on all processes.
        target: Tells how; a tensor of the same shape that is not spread leaves ``whole`` as it is.
    """
    if not is_part(target) or is_part(whole) or whole.shape != target.shape:
        return whole
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor import distribute_tensor

    assert isinstance(target, DTensor)
    there = whole.to(target.device)
    return distribute_tensor(there, target.device_mesh, target.placements, src_data_rank=None)


def plain_copy(model: nn.Module, kept: Iterable[object] = ()) -> nn.Module:
    """Returns a copy to try things out on, which belongs to this process alone.

    Its parameters are its own, without gradients, but lie in the memory of the model's: change no
    values. Sharded ones are whole in it and hold zeros: nothing is sent. All else is copied.

    Args:
        model: The model.
        kept: Parts of it that are not copied but shared.
    """
    memo: dict[int, object] = {id(part): part for part in kept}
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter:  # others, such as lazy ones, know how to be copied
            memo[id(parameter)] = nn.Parameter(parameter.detach(), parameter.requires_grad)
    if not is_sharded(model):
        return copy.deepcopy(model, memo)
    from torch.distributed.fsdp import FSDPModule

    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for parameter in model.parameters():
        if is_part(parameter):
            zeros = torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            memo[id(parameter)] = nn.Parameter(zeros, parameter.requires_grad)
    kinds = [type(module) for module in sharded]
    for module in sharded:
        state = module._get_fsdp_state()
        memo[id(state)] = state  # its hooks come along, and are taken off below
    try:
        for module, kind in zip(sharded, kinds, strict=True):
            _become(module, kind.__mro__[2])  # fully_shard puts two classes before the user's
        twin = copy.deepcopy(model, memo)
    finally:
        for module, kind in zip(sharded, kinds, strict=True):
            _become(module, kind)
    for plain in twin.modules():
        for hooks in (plain._forward_pre_hooks, plain._forward_hooks):
            for number, hook in list(hooks.items()):
                if getattr(hook, "__module__", "").startswith(_FSDP):
                    del hooks[number]
    return twin


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    module.__class__ = kind


def write_tensors(
    tensors: Mapping[str, Tensor], file: Path, group: ProcessGroup | None = None
) -> None:
    """Writes tensors into one safetensors file, whole.

    Where some are sharded all processes call it, each for a file of the same name: each writes its
    own parts through ``torch.distributed.checkpoint`` in its safetensors form (its default form
    holds a pickle), and the first process puts them together, mapped and not held in memory.

    Args:
        tensors: By name; no two share memory.
        file: The file to write.
        group: Over which processes write together; on the CPU.
    """
    sharded = {name: tensor for name, tensor in tensors.items() if is_part(tensor)}
    whole = {name: tensor for name, tensor in tensors.items() if not is_part(tensor)}
    if not sharded:
        safetensors.torch.save_file(whole, file)
        return
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    parts = file.with_suffix(".parts")
    writer = HuggingFaceStorageWriter(str(parts), save_distributed=True, enable_consolidation=True)
    save(sharded, storage_writer=writer, process_group=group)
    if torch.distributed.get_rank(group) == 0:
        joined = safetensors.torch.load_file(parts / "model-00001-of-00001.safetensors")
        safetensors.torch.save_file({**joined, **whole}, file)
        shutil.rmtree(parts)
