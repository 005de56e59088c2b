"""The merged model's tensors, one after another: never more of the model in memory than one weight takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from falcon_qlora.methods.saved import SavedAdapter
from falcon_qlora.models.checkpoints import Checkpoint
from falcon_qlora.models.falcon import expected_linears
from falcon_qlora.models.load import empty_model
from falcon_qlora.models.quantize import (
    QuantizeMode,
    dequantized_weight,
    empty_quantized_linear,
    fill_quantized_weight,
)

from peft import LoraConfig, inject_adapter_in_model  # isort: skip  # after bitsandbytes, see models/quantize.py

Onto = Literal["16bit", "dequantized"]


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How the base was stored while the adapter was trained.

    Attributes:
        mode: ``4bit``, ``8bit`` or ``16bit``.
        double: whether NF4's scales were quantized too.
        compute_dtype: what the weights were before they were quantized.
    """

    mode: QuantizeMode
    double: bool
    compute_dtype: torch.dtype


def merged_tensors(
    checkpoint: Checkpoint,
    adapter: SavedAdapter,
    *,
    onto: Onto,
    quantization: Quantization,
    device: torch.device,
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of the merged model once, in the order in which the base's come.

    The sums are float32's, whatever the base is stored in.

    Args:
        checkpoint: the base model.
        adapter: checked against the base's configuration.
        onto: the base as it is published, or what its quantized weights stand for.
        quantization: of the latter.
        device: where it is computed.
    """
    dtype = quantization.compute_dtype
    model = empty_model(checkpoint.config, dtype=dtype)
    linears = set(expected_linears(checkpoint.config))
    for name, tensor in checkpoint.tensors(model, device, dtype):
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or module not in linears:
            yield name, tensor
            continue
        weight = tensor.to(device)
        del tensor
        if onto == "dequantized" and quantization.mode != "16bit":
            weight = _stored_and_read(weight.to(dtype), quantization)
        weight = weight.float()
        yield name, _merged(weight, adapter, module) if adapter.changes(module) else weight


def _stored_and_read(weight: Tensor, quantization: Quantization) -> Tensor:
    """`weight` ``[out, in]`` as it is after quantization."""
    assert quantization.mode != "16bit"
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer = empty_quantized_linear(
            linear,
            quantization.mode,
            compute_dtype=quantization.compute_dtype,
            double_quantization=quantization.double,
            llm_int8_threshold=0.0,
        )
    fill_quantized_weight(layer, weight)
    return dequantized_weight(layer)


@torch.no_grad()
def _merged(weight: Tensor, adapter: SavedAdapter, module: str) -> Tensor:
    """PEFT's own merge, of this one linear: float32 ``[out, in]``."""
    out, into = weight.shape
    with torch.device("meta"):
        holder = nn.ModuleDict({"linear": nn.Linear(into, out, bias=False)})
    holder["linear"].weight = nn.Parameter(weight, requires_grad=False)
    config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]
        target_modules=["linear"],
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        init_lora_weights=False,
    )
    inject_adapter_in_model(config, holder)
    layer: Any = holder["linear"]
    for name, tensor in adapter.tensors_of(module).items():
        part = getattr(layer, name)["default"]
        part.weight = nn.Parameter(tensor.to(weight.device), requires_grad=False)
    layer.merge(safe_merge=True)
    merged: Tensor = layer.get_base_layer().weight.data
    return merged
