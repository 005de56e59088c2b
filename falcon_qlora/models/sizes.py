"""How much memory a model takes, from its configuration alone."""

from __future__ import annotations

from transformers import PreTrainedConfig

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.quantities import gib
from falcon_qlora.models.layouts import layout_of
from falcon_qlora.models.quantize import NF4_BLOCK, NF4_NESTED_BLOCK, QuantizeMode


def weight_bytes(
    config: PreTrainedConfig,
    quantize_mode: QuantizeMode,
    *,
    double_quantization: bool = True,
    compute_bytes: int = 2,
) -> int:
    """Bytes of the loaded weights.

    Args:
        config: the model.
        quantize_mode: how its blocks are stored.
        double_quantization: whether NF4's scales are quantized too.
        compute_bytes: bytes a value of the compute dtype takes.
    """
    layout = layout_of(config)
    linears = layout.linear_parameter_count()
    rest = (layout.parameter_count() - linears) * compute_bytes
    if quantize_mode == "16bit":
        return linears * compute_bytes + rest
    if quantize_mode == "8bit":
        rows = config.num_hidden_layers * layout.outputs_per_block()
        return linears + 4 * rows + rest
    scales = linears // NF4_BLOCK
    scale_bytes = scales + 4 * (scales // NF4_NESTED_BLOCK) if double_quantization else 4 * scales
    return linears // 2 + scale_bytes + rest


def check_fits(
    config: PreTrainedConfig,
    quantize_mode: QuantizeMode,
    *,
    trainable: int,
    free_bytes: int,
    double_quantization: bool = True,
) -> None:
    """Refuse a model whose weights and adapter alone exceed the device; activations come on top of them.

    Args:
        config: the model.
        quantize_mode: how its blocks are stored.
        trainable: trainable parameters, in float32.
        free_bytes: free memory of the device.
        double_quantization: whether NF4's scales are quantized too.

    Raises:
        UserError: saying by how much.
    """
    weights = weight_bytes(config, quantize_mode, double_quantization=double_quantization)
    adapter = 4 * trainable
    need = weights + adapter
    if need <= free_bytes:
        return
    lower = {"16bit": "8bit or 4bit", "8bit": "4bit"}.get(quantize_mode)
    advice = f"Use --quantize_mode {lower}, a" if lower else "Use a"
    raise UserError(
        f"The model does not fit: its weights in {quantize_mode} take {gib(weights, 1)}"
        + (f" and the adapter {gib(adapter, 1)}" if trainable else "")
        + f", the GPU has {gib(free_bytes, 1)} free: {gib(need - free_bytes, 1)} short. "
        f"{advice} smaller model, or a GPU with more memory free"
    )
