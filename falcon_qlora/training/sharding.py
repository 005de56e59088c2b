"""Whether a model, or the base under an adapter, is sharded over the processes, or a replica on each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.stores import is_address
from falcon_qlora.config import Configuration
from falcon_qlora.processes import agreement, devices, ranks

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# The optimizer of a sharded model: its state is sharded too.
OPTIMIZER = "adamw_torch_fused"
# Share of a GPU's memory for weights, gradients and optimizer state: what else a step needs is not counted.
_USABLE_SHARE = 0.8


def shard_if_wanted(configuration: Configuration, model: Any) -> list[str]:
    """Shard a model of full fine-tuning over the processes as `--sharding` says.

    The base under an adapter was shared out as it was loaded, if it is.

    Returns:
        Notes for the user; none if the model stays a replica.

    Raises:
        UserError: if it cannot be sharded that way.
    """
    if configuration.run.offload_base:
        return ["the blocks' frozen weights are in CPU memory; the embedding and the head stay on the device"]
    if shares_out_base(configuration):
        return [f"the base's frozen weights are shared out over the {ranks.world_size()} processes"]
    if not _wanted(configuration, model.config):
        return []
    from falcon_qlora.models import sharded, zero3

    sharding = f"the model is sharded over the {ranks.world_size()} processes"
    notes = []
    if has_unsuitable_optimizer_of_recipe(configuration):
        notes.append(
            f"recipe {configuration.run.recipe}'s {configuration.optimizer} does not work on a sharded "
            f"model: {OPTIMIZER} takes its place"
        )
        take_optimizer(configuration)
    _check(configuration)
    if configuration.run.sharding == "zero3":
        _check_zero3(configuration)
        zero3.mark(model)
        sharding += "; its checkpoints are weights only and cannot be resumed"
    else:
        sharded.shard(model, devices.local_device())
    return [sharding, *notes]


def check(configuration: Configuration, config: PreTrainedConfig) -> None:
    """Refuse what `shard_if_wanted` would, before there is a model.

    Raises:
        UserError: if a model of `config` cannot be sharded that way.
    """
    offloaded, reason = configuration.run.offload_base, configuration.method.why_base_stays_whole
    elsewhere = offloaded or shares_out_base(configuration)
    if elsewhere and reason is not None:  # of an adapter to begin from; else the flags were refused
        raise UserError(f"{'--offload_base' if offloaded else '--sharding fsdp'}: {reason}; drop it")
    if not _wanted(configuration, config) or elsewhere:
        return
    if is_address(configuration.run.output_dir) and ranks.world_size() > ranks.local_world_size():
        raise UserError(
            f"--output_dir {configuration.run.output_dir}: each node writes its part of a sharded model's "
            "checkpoints, and only the first node's are copied there. Name a folder that all nodes share"
        )
    if not has_unsuitable_optimizer_of_recipe(configuration):
        _check(configuration)
    if configuration.run.sharding == "zero3":
        _check_zero3(configuration)


def shares_out_base(configuration: Configuration) -> bool:
    """Whether the frozen weights under an adapter are shared out over the processes, see `sharded_base`."""
    return configuration.run.sharding == "fsdp" and not configuration.method.is_whole


def ways_to_hold_less(configuration: Configuration) -> list[str]:
    """Flags with which less of the base would be on this device."""
    run, method = configuration.run, configuration.method
    if run.offload_base or method.is_whole or method.why_base_stays_whole is not None:
        return []
    if run.sharding == "fsdp":
        return ["--offload_base instead of --sharding fsdp"]
    return ["--sharding fsdp"] * (ranks.world_size() > 1) + ["--offload_base"]


def ways_to_take_less(configuration: Configuration, tokens: int | None = None) -> list[str]:
    """What takes less of a GPU's memory in a step.

    Args:
        tokens: of the micro-batch that did not fit, if it is known.
    """
    run, data = configuration.run, configuration.data
    ways, smallest = ["a smaller -b"], str(data.max_length)
    if data.packing:
        smaller = run.batch_tokens != smallest if tokens is None else tokens > data.max_length
        ways = [f"--batch_tokens {smallest}"] * smaller
    ways += ["a smaller --max_length"]
    ways += ["--checkpointing full"] * (run.checkpointing in ("none", "selective"))
    ways += ["--checkpointing offload"] * (run.checkpointing != "offload")
    ways += ["--recipe smallest"] * (run.recipe != "smallest")
    return [*ways, *ways_to_hold_less(configuration)]


def has_unsuitable_optimizer_of_recipe(configuration: Configuration) -> bool:
    """Whether a recipe, and not the user, names an optimizer that does not work on a sharded model."""
    of_recipe = configuration.explicit.get("optim") == f"recipe {configuration.run.recipe}"
    return of_recipe and _is_unsuitable(configuration.trainer["optim"])


def take_optimizer(configuration: Configuration) -> None:
    """Have the run use the optimizer of sharded models, and record that."""
    from transformers.training_args import OptimizerNames

    configuration.trainer["optim"] = OPTIMIZER
    configuration.training.optim = OptimizerNames(OPTIMIZER)


def _is_unsuitable(optim: str) -> bool:
    # bitsandbytes' own.
    return any(word in optim for word in ("bnb", "8bit", "paged"))


def _wanted(configuration: Configuration, config: PreTrainedConfig) -> bool:
    wanted, processes = configuration.run.sharding, ranks.world_size()
    named = wanted in ("fsdp", "zero3")
    if named and processes == 1:
        raise UserError(
            f"--sharding {wanted} splits the model over several processes, and there is only one: give more "
            "--gpus, or --sharding none"
        )
    if wanted != "auto":
        return named
    device = devices.local_device()
    if processes == 1 or not configuration.method.is_whole or device.type != "cuda":
        return False
    import torch

    each = devices.compute_dtype(configuration.model.compute_dtype).itemsize
    total = torch.cuda.get_device_properties(device).total_memory
    here = replica_is_too_large(config, configuration.optimizer, each, total)
    return any(agreement.gather_objects(here))


def replica_is_too_large(
    config: PreTrainedConfig, optimizer: str, value_bytes: int, device_bytes: float
) -> bool:
    """Whether a replica's weights, gradients and optimizer state are too much for a GPU, in full fine-tuning.

    Args:
        optimizer: by the trainer's name.
        value_bytes: of a weight.
        device_bytes: of the GPU.
    """
    from falcon_qlora.models.layouts import layout_of
    from falcon_qlora.models.step_memory import allocated_optimizer_bytes, embedded_share

    states = allocated_optimizer_bytes(optimizer, value_bytes, embedded=embedded_share(config))
    return layout_of(config).parameter_count() * (2 * value_bytes + states) > _USABLE_SHARE * device_bytes


def _check(configuration: Configuration) -> None:
    optim = configuration.optimizer
    if _is_unsuitable(optim):
        raise UserError(
            f"--optim {optim}: bitsandbytes' optimizers do not work on a sharded model; give --optim "
            f"{OPTIMIZER}, whose state is sharded too, or --sharding none"
        )
    if configuration.run.generate_samples:
        raise UserError("--generate_samples is not possible while the model is sharded: give --sharding none")


def _check_zero3(configuration: Configuration) -> None:
    """Refuse what DeepSpeed's engine cannot do (weights of several dtypes, resuming); save weights only."""
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
