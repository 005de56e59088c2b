"""All methods, and opening what any of them saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import FalconForCausalLM

from falcon_qlora.errors import UserError, nearest
from falcon_qlora.methods.adapter import Adapter
from falcon_qlora.methods.adapter_v2 import AdapterV2
from falcon_qlora.methods.folder import read_record
from falcon_qlora.methods.full import Full
from falcon_qlora.methods.interface import Method, remember
from falcon_qlora.methods.lora import Lora, open_lora
from falcon_qlora.models.load import load_model
from falcon_qlora.models.quantize import QuantizeMode

METHODS: dict[str, type[Lora] | type[Adapter] | type[AdapterV2] | type[Full]] = {
    method.name: method for method in (Lora, Adapter, AdapterV2, Full)
}


def load_adapter(
    path: str | Path,
    *,
    base_model: FalconForCausalLM | str | None = None,
    quantize_mode: QuantizeMode = "4bit",
    device: torch.device | str | None = None,
    compute_dtype: torch.dtype | str = "auto",
    double_quantization: bool = True,
    revision: str | None = None,
    trainable: bool = False,
) -> nn.Module:
    """Open what any method saved, on its base model, which is loaded quantized.

    Args:
        path: the adapter's folder; or, of full fine-tuning, the model's, which needs no base.
        base_model: a loaded model, or the name of one; the one that the adapter names where None.
        quantize_mode: how to load the base, see `load_model`; so too the next four.
        device: where to load it.
        compute_dtype: its compute dtype.
        double_quantization: whether NF4's scales are quantized too.
        revision: of a base on the hub.
        trainable: to train on; else for inference.

    Raises:
        UserError: if the folder holds no adapter, or names a base that cannot be loaded.
    """
    path = Path(path)
    record = read_record(path)
    name: str = record["method"]
    if name not in METHODS:
        raise UserError(f"{path}: the method {name!r} is not known{nearest(name, METHODS)}")
    if name == Full.name:
        if base_model is not None:
            raise UserError(f"{path} holds a whole model: there is no base to put it on")
        base_model = str(path)
    elif base_model is None:
        base_model = record.get("base_model")
        if not base_model:
            raise UserError(
                f"{path}/adapter_config.json names no base model. Name it with --model_name_or_path."
            )
    if isinstance(base_model, str):
        base_model = load_model(
            base_model,
            quantize_mode=quantize_mode,
            device=device,
            compute_dtype=compute_dtype,
            double_quantization=double_quantization,
            revision=revision,
        )
    return _opened(base_model, path, record, trainable)


def _opened(base: FalconForCausalLM, path: Path, record: dict[str, Any], trainable: bool) -> nn.Module:
    name = record["method"]
    if name == Lora.name:
        return open_lora(base, path, slices=record.get("lora_slices"), trainable=trainable)
    if name == Full.name:
        if trainable:
            return Full().attach(base)
        remember(base, Full())
        return base
    method: Method = METHODS[name](**record["settings"])
    model = method.attach(base, seed=0)
    method.restore(model, path)
    return model if trainable else model.requires_grad_(False).eval()
