"""The merged model's tensors, one after another: never more of the model in memory than one weight takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from falcon_qlora.methods.adapter_folder import SavedAdapter
from falcon_qlora.models.checkpoints import Checkpoint
from falcon_qlora.models.layouts import layout_of
from falcon_qlora.models.load import empty_model
from falcon_qlora.models.quantize import (
    QuantizeMode,
    dequantized_weight,
    empty_quantized_linear,
    fill_quantized_weight,
)

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
        adapter: of a method that can be merged, checked against the base's configuration.
        onto: the base as it is published, or what its quantized weights stand for.
        quantization: of the latter.
        device: where it is computed.
    """
    dtype = quantization.compute_dtype
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
        yield name, adapter.method.merged_weight(weight.float(), module, adapter.folder, checkpoint.config)


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
