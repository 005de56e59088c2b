"""All methods, and opening what any of them saved."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from falcon_qlora.common.errors import UserError
from falcon_qlora.methods.adapter import Adapter
from falcon_qlora.methods.adapter_v2 import AdapterV2
from falcon_qlora.methods.folder import read_record
from falcon_qlora.methods.full import Full
from falcon_qlora.methods.interface import remember
from falcon_qlora.methods.lora import Lora, open_lora
from falcon_qlora.methods.names import check_may_open
from falcon_qlora.methods.saved import SavedAdapter, read_adapter
from falcon_qlora.models.load import load_model
from falcon_qlora.models.quantize import QuantizeMode

METHODS: dict[str, type[Lora] | type[Adapter] | type[AdapterV2] | type[Full]] = {
    method.name: method for method in (Lora, Adapter, AdapterV2, Full)
}


def load_adapter(
    path: str | Path,
    *,
    base_model: PreTrainedModel | str | None = None,
    quantize_mode: QuantizeMode | None = None,
    device: torch.device | str | None = None,
    compute_dtype: torch.dtype | str = "auto",
    double_quantization: bool | None = None,
    revision: str | None = None,
    trainable: bool = False,
) -> nn.Module:
    """Open what any method saved, on its base model, which is loaded as it was trained on.

    Args:
        path: the adapter's folder; or, of full fine-tuning, the model's, which needs no base.
        base_model: a loaded model, or the name of one; the one that the adapter names where None. A folder
            outside of the adapter's own is opened without its name here only where the adapter tells what
            lies in it, as one does that was trained on this machine.
        quantize_mode: how to load the base, see `load_model`; so too the next four. Where None, as the
            folder's record says; where that says nothing, ``4bit``.
        device: where to load it.
        compute_dtype: its compute dtype.
        double_quantization: whether NF4's scales are quantized too; where None, as the record says, or True.
        revision: of a base on the hub.
        trainable: to train on; else for inference.

    Raises:
        UserError: if the folder holds no adapter or a damaged one, or names a base that cannot be loaded
            or is not to be opened on its word.
    """
    path = Path(path)
    record = read_record(path)
    if record["method"] == Full.name:
        if base_model is not None:
            raise UserError(f"{path} holds a whole model: there is no base to put it on")
        base_model = str(path)
    elif base_model is None:
        base_model = record.get("base_model")
        if not base_model:
            raise UserError(f"{path}/adapter_config.json names no base model. Name it as base_model.")
        check_may_open(base_model, "base model", record, path, say_so="base_model=FOLDER")
    saved = read_adapter(path) if record["method"] != Full.name else None
    if isinstance(base_model, str):
        if double_quantization is None:
            double_quantization = record.get("double_quantization") is not False
        base_model = load_model(
            base_model,
            quantize_mode=quantize_mode or record.get("quantize_mode") or "4bit",
            device=device,
            compute_dtype=compute_dtype,
            double_quantization=double_quantization,
            revision=revision,
        )
    return _whole(base_model, trainable) if saved is None else _opened(base_model, saved, trainable)


def _whole(model: PreTrainedModel, trainable: bool) -> nn.Module:
    if trainable:
        return Full().attach(model)
    remember(model, Full())
    return model


def _opened(base: PreTrainedModel, saved: SavedAdapter, trainable: bool) -> nn.Module:
    saved.check(base.config)
    method = saved.method
    if isinstance(method, Lora):
        return open_lora(base, saved.folder, method, trainable=trainable)
    model = method.attach(base, seed=0)
    method.restore(model, saved.folder)
    return model if trainable else model.requires_grad_(False).eval()
