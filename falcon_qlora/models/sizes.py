"""How much memory a model takes, from its configuration alone. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.host_memory import free_host_bytes
from falcon_qlora.common.quantities import sized
from falcon_qlora.models.layouts import layout_of
from falcon_qlora.models.schemes import NF4_BLOCK, NF4_NESTED_BLOCK, QuantizeMode

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def weight_bytes(
    config: PreTrainedConfig,
    quantize_mode: QuantizeMode,
    *,
    double_quantization: bool = True,
    compute_bytes: int = 2,
    processes: int = 1,
    offloaded: bool = False,
) -> int:
    """Bytes of the loaded weights on one process.

    Args:
        config: the model.
        quantize_mode: how its blocks are stored.
        double_quantization: whether NF4's scales are quantized too.
        compute_bytes: bytes a value of the compute dtype takes.
        processes: over which the blocks' linears are shared out, see `sharded_base`; two blocks are whole.
        offloaded: whether these are in CPU memory instead, see `host_base`; two blocks are here.
    """
    layout, blocks = layout_of(config), config.num_hidden_layers
    rest = (layout.parameter_count() - layout.linear_parameter_count()) * compute_bytes
    stored = stored_bytes(
        config, quantize_mode, double_quantization=double_quantization, compute_bytes=compute_bytes
    )
    if processes == 1 and not offloaded:
        return rest + stored
    return rest + (0 if offloaded else stored // processes) + min(2, blocks) * stored // blocks


def stored_bytes(
    config: PreTrainedConfig,
    quantize_mode: QuantizeMode,
    *,
    double_quantization: bool = True,
    compute_bytes: int = 2,
) -> int:
    """Bytes of the blocks' linears; arguments as for `weight_bytes`."""
    layout = layout_of(config)
    linears = layout.linear_parameter_count()
    if quantize_mode == "16bit":
        return linears * compute_bytes
    if quantize_mode == "8bit":
        return linears + 4 * config.num_hidden_layers * layout.outputs_per_block()
    scales = linears // NF4_BLOCK
    scale_bytes = scales + 4 * (scales // NF4_NESTED_BLOCK) if double_quantization else 4 * scales
    return linears // 2 + scale_bytes


def check_fits(
    config: PreTrainedConfig,
    quantize_mode: QuantizeMode,
    *,
    trainable: int,
    free_bytes: int,
    double_quantization: bool = True,
    processes: int = 1,
    offloaded: bool = False,
    ways: Sequence[str] = (),
    fixed: bool = False,
) -> None:
    """Refuse a model whose weights and adapter alone exceed the device; activations come on top of them.

    Args:
        config: the model.
        quantize_mode: how its blocks are stored.
        trainable: trainable parameters, in float32.
        free_bytes: free memory of the device.
        double_quantization: whether NF4's scales are quantized too.
        processes, offloaded: see `weight_bytes`.
        ways: flags with which less of it is on the device.
        fixed: whether it can be stored in no other way.

    Raises:
        UserError: saying by how much.
    """
    weights = weight_bytes(
        config,
        quantize_mode,
        double_quantization=double_quantization,
        processes=processes,
        offloaded=offloaded,
    )
    adapter = 4 * trainable
    need = weights + adapter
    if need <= free_bytes:
        return
    lower = {"16bit": "8bit or 4bit", "8bit": "4bit"}.get(quantize_mode)
    others = [f"--quantize_mode {lower}"] if lower and not fixed else []
    raise UserError(
        f"The model does not fit: its weights in {quantize_mode} take {sized(weights, 1)}"
        + (f" and the adapter {sized(adapter, 1)}" if trainable else "")
        + f", the GPU has {sized(free_bytes, 1)} free: {sized(need - free_bytes, 1)} short. "
        f"Use {', '.join([*others, *ways, 'a smaller model'])}, or a GPU with more memory free"
    )


def check_host(
    config: PreTrainedConfig,
    quantize_mode: QuantizeMode,
    *,
    double_quantization: bool = True,
    compute_bytes: int = 2,
    processes: int = 1,
    fixed: bool = False,
) -> None:
    """Refuse a base that CPU memory does not hold as often as there are processes on this node.

    Args:
        config, quantize_mode, double_quantization, compute_bytes: as for `weight_bytes`.
        processes: here that keep the blocks' linears in CPU memory, each for itself.
        fixed: whether it can be stored in no other way.

    Raises:
        UserError: saying by how much.
    """
    each = stored_bytes(
        config, quantize_mode, double_quantization=double_quantization, compute_bytes=compute_bytes
    )
    free = free_host_bytes()
    if processes * each <= free:
        return
    of_all = f", {sized(processes * each, 1)} for the {processes} processes here" if processes > 1 else ""
    raise UserError(
        f"--offload_base: the blocks' weights in {quantize_mode} take {sized(each, 1)} of CPU memory{of_all}"
        f", and {sized(free, 1)} are free: {sized(processes * each - free, 1)} short. Use "
        + ("fewer --gpus, " if processes > 1 else "")
        + ("" if fixed or quantize_mode == "4bit" else "--quantize_mode 4bit, ")
        + "a smaller model, or a machine with more memory"
    )
