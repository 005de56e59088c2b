"""Whether a model is trained in parts, one on each process, or as a replica on each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from falcon_qlora import distributed
from falcon_qlora.config import Configuration
from falcon_qlora.errors import UserError

if TYPE_CHECKING:
    from transformers import FalconConfig

# What a step needs beyond weights, gradients and the optimizer's state is not counted: this is left for it.
_USABLE_SHARE = 0.8


def shard_if_wanted(configuration: Configuration, model: Any) -> bool:
    """Shard a model of full fine-tuning over the processes as `--sharding` says; returns whether it is.

    Raises:
        UserError: if it cannot be sharded so.
    """
    if not _wanted(configuration, model.config):
        return False
    from falcon_qlora.models import sharded, zero3

    _check(configuration)
    if configuration.run.sharding == "zero3":
        _check_zero3(configuration)
        zero3.mark(model)
    else:
        sharded.shard(model, distributed.local_device())
    return True


def _wanted(configuration: Configuration, config: FalconConfig) -> bool:
    wanted, processes = configuration.run.sharding, distributed.world_size()
    named = wanted in ("fsdp", "zero3")
    if named and processes == 1:
        raise UserError(
            f"--sharding {wanted} shares a model out to several processes, and there is one: give more "
            "--gpus, or --sharding none"
        )
    if wanted != "auto":
        return named
    device = distributed.local_device()
    if processes == 1 or configuration.method.method != "full" or device.type != "cuda":
        return False
    import torch

    here = (
        _replica_bytes(configuration, config)
        > _USABLE_SHARE * torch.cuda.get_device_properties(device).total_memory
    )
    return any(distributed.gather_objects(here))


def _replica_bytes(configuration: Configuration, config: FalconConfig) -> int:
    """Weights, gradients and optimizer state of a replica."""
    from falcon_qlora.memory import allocated_optimizer_bytes, embedded_share
    from falcon_qlora.models.falcon import parameter_count
    from falcon_qlora.models.load import resolve_compute_dtype

    each = resolve_compute_dtype(configuration.model.compute_dtype, distributed.local_device()).itemsize
    states = allocated_optimizer_bytes(configuration.optimizer, each, embedded=embedded_share(config))
    return int(parameter_count(config) * (2 * each + states))


def _check(configuration: Configuration) -> None:
    optim = configuration.optimizer
    if any(word in optim for word in ("bnb", "8bit", "paged")):
        raise UserError(
            f"--optim {optim}: bitsandbytes' optimizers do not work on a sharded model; give --optim "
            "adamw_torch_fused, whose state is sharded too, or --sharding none"
        )
    if configuration.run.generate_samples:
        raise UserError("--generate_samples is not possible while the model is sharded: give --sharding none")


def _check_zero3(configuration: Configuration) -> None:
    """DeepSpeed's engine holds weights of one dtype, and an optimizer's state that no resuming reads."""
    assert configuration.training is not None
    if configuration.model.norms_in_float32:
        raise UserError(
            "--norms_in_float32: --sharding zero3 keeps all weights in one dtype, with float32 ones beside "
            "them that the optimizer steps on; leave the flag out"
        )
    if configuration.run.resume:
        raise UserError(
            "--resume: checkpoints of --sharding zero3 hold the weights and no optimizer state, so the run "
            "cannot go on; train on from its adapter/ folder as -m, or give --sharding fsdp"
        )
    configuration.training.save_only_model = True
