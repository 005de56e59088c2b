"""The merged model's tensors, one after another: never more of the model in memory than one weight takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from falcon_qlora.methods.folder import TENSORS
from falcon_qlora.methods.lora import Lora
from falcon_qlora.methods.saved import SavedAdapter
from falcon_qlora.models.checkpoints import Checkpoint
from falcon_qlora.models.layouts import layout_of
from falcon_qlora.models.load import empty_model
from falcon_qlora.models.quantize import (
    QuantizeMode,
    dequantized_weight,
    empty_quantized_linear,
    fill_quantized_weight,
)
from falcon_qlora.models.tensor_files import read_tensor

from peft import inject_adapter_in_model  # isort: skip  # after bitsandbytes, see models/quantize.py

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
        adapter: LoRA, checked against the base's configuration.
        onto: the base as it is published, or what its quantized weights stand for.
        quantization: of the latter.
        device: where it is computed.
    """
    lora, dtype = lora_of(adapter), quantization.compute_dtype
    model = empty_model(checkpoint.config, dtype=dtype)
    linears = set(layout_of(checkpoint.config).expected_linears())
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
        changed = module.rpartition(".")[2] in (lora.target_modules or ())
        yield name, _merged(weight, adapter, module) if changed else weight


def lora_of(adapter: SavedAdapter) -> Lora:
    """The settings of an adapter that can be merged, which LoRA's alone can."""
    assert isinstance(adapter.method, Lora)
    return adapter.method


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
    lora = lora_of(adapter)
    config = lora.peft_config(["linear"], lora_dropout=0.0, init_lora_weights=False)
    inject_adapter_in_model(config, holder)
    layer: Any = holder["linear"]
    parts = {"lora_A": ".weight", "lora_B": ".weight"}
    if lora.use_dora:
        parts["lora_magnitude_vector"] = ""
    for name, end in parts.items():
        tensor = read_tensor(adapter.folder / TENSORS, f"base_model.model.{module}.{name}{end}").float()
        part = getattr(layer, name)["default"]
        part.weight = nn.Parameter(tensor.to(weight.device), requires_grad=False)
    layer.merge(safe_merge=True)
    merged: Tensor = layer.get_base_layer().weight.data
    return merged
