"""bitsandbytes' layers, filled from plain weights on any device."""

from __future__ import annotations

import functools
import logging
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from falcon_qlora.kernels.ops import int8_scales
from falcon_qlora.models.sizes import NF4_BLOCK, NF4_NESTED_BLOCK, QuantizeMode

_CPU_SLICE = 2**16  # weights quantized at a time on the CPU; a multiple of the block


# It warns at every call that LLM.int8() quantizes from float16, which is by design.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def empty_quantized_linear(
    linear: nn.Linear,
    mode: QuantizeMode,
    *,
    compute_dtype: torch.dtype,
    double_quantization: bool,
    llm_int8_threshold: float,
) -> nn.Linear:
    """Return the quantized layer that takes `linear`'s place, on the meta device and without weights."""
    what: dict[str, Any] = {"bias": linear.bias is not None, "device": "meta"}
    if mode != "4bit":
        what |= {"has_fp16_weights": False, "threshold": llm_int8_threshold}
        return bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, **what)
    what |= {"compute_dtype": compute_dtype, "compress_statistics": double_quantization, "quant_type": "nf4"}
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, **what)
    # On CPUs with bfloat16 instructions the first evaluation would repack the weights in place into a form
    # that computes in bfloat16 and has no backward: training after an evaluation would break.
    layer.support_avx512bf16_for_cpu = False
    return layer


def fill_quantized_weight(layer: nn.Linear, weight: Tensor) -> None:
    """Quantize `weight` ``[out, in]``, on its device, into `layer`."""
    if isinstance(layer, bnb.nn.Linear4bit):
        nested = layer.weight.compress_statistics
        put_nf4(layer, *_quantize_nf4(weight.contiguous(), nested))
        return
    rows, scales, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16).contiguous())
    put_rows(layer, rows, scales)


def put_nf4(layer: Any, packed: Tensor, state: Any) -> None:
    """Have a ``Linear4bit`` hold a quantized weight: ``[out * in / 2, 1]`` and its ``QuantState``."""
    layer.weight = bnb.nn.Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=NF4_BLOCK,
        compress_statistics=state.nested,
        quant_type="nf4",
        module=layer,
        bnb_quantized=True,
    )
    layer.quant_state = state


def put_rows(layer: Any, rows: Tensor, scales: Tensor) -> None:
    """Have a ``Linear8bitLt`` hold a quantized weight: int8 ``[out, in]`` and float32 ``[out]``."""
    layer.weight = bnb.nn.Int8Params(rows, requires_grad=False, has_fp16_weights=False, CB=rows, SCB=scales)


def _quantize_nf4(weight: Tensor, nested: bool) -> tuple[Tensor, Any]:
    """As ``quantize_4bit``, but in slices on the CPU, where it takes some 30 bytes a weight."""
    quantize = functools.partial(bnb.functional.quantize_4bit, blocksize=NF4_BLOCK, quant_type="nf4")
    if weight.device.type != "cpu":
        return quantize(weight, compress_statistics=nested)
    flat = weight.view(-1)
    packed = torch.empty((flat.numel() + 1) // 2, 1, dtype=torch.uint8)
    scales = torch.empty(-(-flat.numel() // NF4_BLOCK))
    for start in range(0, flat.numel(), _CPU_SLICE):
        part, state = quantize(flat[start : start + _CPU_SLICE])
        packed[start // 2 : start // 2 + len(part)] = part
        scales[start // NF4_BLOCK : start // NF4_BLOCK + len(state.absmax)] = state.absmax
    state.shape, state.absmax = weight.shape, scales
    if nested:
        state.offset = scales.mean()
        state.absmax, state.state2 = bnb.functional.quantize_blockwise(
            scales - state.offset, blocksize=NF4_NESTED_BLOCK
        )
        state.nested = True
    return packed, state


def quantize_mode_of(linear: nn.Module) -> QuantizeMode:
    """How a frozen linear is stored."""
    if isinstance(linear, bnb.nn.Linear4bit):
        return "4bit"
    return "8bit" if isinstance(linear, bnb.nn.Linear8bitLt) else "16bit"


def is_quantized_linear(module: nn.Module) -> bool:
    return quantize_mode_of(module) != "16bit"


def holds_quantized_weight(module: nn.Module, mode: QuantizeMode) -> bool:
    """Whether `module` is the quantized layer of `mode` and its weight is stored in that form."""
    weight = module.weight
    if mode == "4bit":
        return (
            isinstance(module, bnb.nn.Linear4bit)
            and isinstance(weight, bnb.nn.Params4bit)
            and weight.dtype == torch.uint8
            and weight.quant_state is not None
            and weight.quant_state.quant_type == "nf4"
        )
    return (
        isinstance(module, bnb.nn.Linear8bitLt)
        and isinstance(weight, bnb.nn.Int8Params)
        and weight.dtype == torch.int8
        and (weight.SCB is not None or module.state.SCB is not None)
    )


def stored_form(layer: Any, dtype: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each tensor that will hold the frozen weight of a linear, filled or not; no bias.

    Args:
        layer: a linear of a block.
        dtype: of its weight if it is not quantized.
    """
    out, into = layer.out_features, layer.in_features
    mode = quantize_mode_of(layer)
    if mode == "16bit":
        return {"weight": (dtype, (out, into))}
    if mode == "8bit":
        return {"weight": (torch.int8, (out, into)), "scales": (torch.float32, (out,))}
    blocks = -(-out * into // NF4_BLOCK)
    form: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    form = {"weight": (torch.uint8, ((out * into + 1) // 2, 1)), "scales": (torch.float32, (blocks,))}
    if layer.weight.compress_statistics:
        nested = -(-blocks // NF4_NESTED_BLOCK)
        form |= {"scales": (torch.uint8, (blocks,)), "nested": (torch.float32, (nested,))}
        form["offset"] = (torch.float32, ())
    return form


def stored(layer: Any) -> dict[str, Tensor]:
    """The tensors of `stored_form`, of a linear that is filled."""
    mode, weight = quantize_mode_of(layer), layer.weight.data
    if mode == "16bit":
        return {"weight": weight}
    if mode == "8bit":
        return {"weight": weight, "scales": int8_scales(layer)}
    state = layer.weight.quant_state
    tensors = {"weight": weight, "scales": state.absmax}
    return tensors | ({"nested": state.state2.absmax, "offset": state.offset} if state.nested else {})


def put_stored(layer: Any, tensors: dict[str, Tensor]) -> None:
    """Have a linear that has not run yet read its weight from other tensors, like those of `stored`."""
    mode = quantize_mode_of(layer)
    layer.weight.data = tensors["weight"]
    if mode == "8bit":
        layer.weight.CB, layer.weight.SCB = tensors["weight"], tensors["scales"]
    elif mode == "4bit":
        state = layer.weight.quant_state
        state.absmax = tensors["scales"]
        if state.nested:
            state.state2.absmax, state.offset = tensors["nested"], tensors["offset"]


def dequantized_weight(layer: nn.Linear) -> Tensor:
    """The weight ``[out, in]`` that a block's linear stands for, in floating point."""
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    if isinstance(layer, bnb.nn.Linear8bitLt):
        return layer.weight.data.float() * (int8_scales(layer).float() / 127.0).unsqueeze(1)
    return layer.weight.data
