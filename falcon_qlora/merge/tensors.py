"""The merged model's tensors, computed one at a time, so that memory never holds more than one weight."""

from __future__ import annotations

from collections.abc import Iterator
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


def merged_tensors(
    checkpoint: Checkpoint,
    adapter: SavedAdapter,
    *,
    onto: Onto,
    quantize_mode: QuantizeMode,
    double_quantization: bool,
    compute_dtype: torch.dtype,
    device: torch.device,
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of the merged model once, in the base's order.

    Adapters are added in float32, whatever dtype the base is stored in.

    Args:
        checkpoint: the base model; a quantized checkpoint can only be dequantized.
        adapter: of a method that can be merged, already checked against the base's configuration.
        onto: the published base, or its quantized weights dequantized.
        quantize_mode, double_quantization: how the base was stored while the adapter was trained.
        compute_dtype: dtype of the weights before they were quantized.
        device: where the merge is computed.
    """
    model = empty_model(checkpoint.config, dtype=compute_dtype)
    linears = set(layout_of(checkpoint.config).expected_linears())
    for name, tensor in checkpoint.tensors(model, device, compute_dtype):
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or module not in linears:
            assert isinstance(tensor, Tensor)
            yield name, adapter.method.merged_tensor(name, tensor, adapter.folder, checkpoint.config)
            continue
        weight = tensor.to(device) if isinstance(tensor, Tensor) else tensor
        del tensor
        if onto == "dequantized" and quantize_mode != "16bit":
            with torch.device("meta"):
                layer = empty_quantized_linear(
                    nn.Linear(weight.shape[1], weight.shape[0], bias=False),
                    quantize_mode,
                    compute_dtype=compute_dtype,
                    double_quantization=double_quantization,
                    llm_int8_threshold=0.0,
                )
            if isinstance(weight, Tensor):
                fill_quantized_weight(layer, weight.to(compute_dtype))
            else:
                weight.fill(layer, compute_dtype)
            weight = dequantized_weight(layer)
        assert isinstance(weight, Tensor)
        yield name, adapter.method.merged_weight(weight.float(), module, adapter.folder, checkpoint.config)
