"""A model with every parameter sharded over all processes: PyTorch's fully sharded data parallelism.

A block's parameters are gathered for its forward and again for its backward pass, and its gradients are
reduced and scattered. PyTorch's own `fully_shard` is called directly. Accelerate has no sharding on the CPU,
makes float32 copies of bfloat16 weights, and cannot handle a tied head that is read as a weight. Every
process must take part in every forward, and in reading a whole tensor.

What is said here of a sharded model also holds for one that DeepSpeed has sharded: see `models.zero3`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from falcon_qlora.common.files import disk_errors
from falcon_qlora.models import zero3
from falcon_qlora.models.activations import blocks_of
from falcon_qlora.models.sharded_base import sharded_base_of
from falcon_qlora.models.tensor_files import split_into_files, write_index


def shard(model: nn.Module, device: torch.device) -> None:
    """Shard every parameter of `model`, which all processes hold alike: each keeps only its part.

    Args:
        model: with packing enabled, and no optimizer yet.
        device: of this process.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)  # the embedding, the last norm and the head


def is_sharded(model: nn.Module) -> bool:
    """Whether what is trained of `model` is sharded over the processes, or will be when training starts."""
    return isinstance(model, FSDPModule) or zero3.is_zero3(model)


def needs_all_processes(model: nn.Module) -> bool:
    """Whether every forward pass needs all processes: what is trained is sharded, or the base under it."""
    return is_sharded(model) or sharded_base_of(model) is not None


def whole_shape(parameter: Any) -> torch.Size:
    """A parameter's unsharded shape, which a DTensor's own shape already is."""
    return torch.Size(parameter.ds_shape) if zero3.is_part(parameter) else parameter.shape


def whole_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of each unsharded parameter, by its name."""
    return {
        name: whole_shape(parameter).numel() * parameter.element_size()
        for name, parameter in model.named_parameters()
    }


def whole_tensors(model: nn.Module, *, wanted: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter's name and whole tensor, on the CPU; all processes must iterate.

    Args:
        wanted: whether this process uses them; else they are left on the device.
    """
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            whole = _whole(parameter)
        yield name, whole.cpu() if wanted else whole


def _whole(parameter: nn.Parameter) -> Tensor:
    if zero3.is_part(parameter):
        return zero3.read_whole(parameter)
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()


def take_part(model: nn.Module) -> None:
    """What the other processes run while the main one iterates over `whole_tensors`."""
    for _ in whole_tensors(model, wanted=False):
        pass


def save_whole(
    model: PreTrainedModel,
    folder: Path,
    state: Mapping[str, Tensor] | None = None,
    *,
    file_bytes: int = 5 * 10**9,
) -> None:
    """Write a model as Transformers would, holding one file's tensors at a time.

    Args:
        model: where it is sharded, the other processes call `take_part`.
        folder: an existing one.
        state: an earlier copy of its parameters, on the CPU; None: as they are now.
        file_bytes: the most that a file's tensors take, unless one alone takes more.
    """
    sizes = {name: each.nbytes for name, each in state.items()} if state else whole_bytes(model)
    files = split_into_files(sizes, file_bytes)
    tensors = iter(state.items()) if state else whole_tensors(model, wanted=True)
    try:
        for file, names in files.items():
            with disk_errors(folder / file):
                save_file(dict(next(tensors) for _ in names), folder / file, metadata={"format": "pt"})
    finally:
        # A full disk must not leave the other processes waiting.
        for _ in tensors:
            pass
    with disk_errors(folder):
        model.config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
    write_index(folder, files, sum(sizes.values()))


def fill(parameter: nn.Parameter, whole: Tensor) -> None:
    """Copy this process's part of a whole tensor, which every process has, into a parameter."""
    if zero3.is_part(parameter):
        zero3.fill_whole(parameter, whole)
        return
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            whole = whole.to(parameter.device, parameter.dtype)
            whole = _distributed_like(parameter, whole)
        parameter.copy_(whole)


def own_parts(parameter: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """This process's part of a parameter and the same part of a whole tensor, without communication."""
    if zero3.is_part(parameter):
        return zero3.own_part(parameter, whole)
    if not isinstance(parameter, DTensor):
        return parameter, whole
    return parameter.to_local(), _distributed_like(parameter, whole).to_local()


def local_tensor(value: Any) -> Any:
    """A value's part on this process: a sharded tensor's own part, anything else as it is."""
    return value.to_local() if isinstance(value, DTensor) else value


def own_rows(parameter: Tensor) -> range:
    """The rows (along the first dimension) of a parameter that lie on this process; maybe none."""
    if not isinstance(parameter, DTensor):
        return range(len(parameter))
    # PyTorch is asked rather than imitated: a part may be smaller than the others, or empty.
    rows = _distributed_like(parameter, torch.arange(len(parameter), device=parameter.device)).to_local()
    return range(int(rows[0]), int(rows[-1]) + 1) if len(rows) else range(0)


def from_own_rows(parameter: Tensor, rows: Tensor) -> Tensor:
    """A tensor sharded like `parameter`, of which this process holds `rows`."""
    if not isinstance(parameter, DTensor):
        return rows
    return DTensor.from_local(
        rows.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _distributed_like(parameter: DTensor, whole: Tensor) -> DTensor:
    # Every process has read the tensor: nothing need be sent.
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def local_count(model: nn.Module) -> int:
    """How many trainable parameters this process holds while it trains."""
    trainable = (parameter for parameter in model.parameters() if parameter.requires_grad)
    if zero3.is_zero3(model):
        return -(-sum(whole_shape(p).numel() for p in trainable) // dist.get_world_size())
    return sum(local_tensor(parameter).numel() for parameter in trainable)
