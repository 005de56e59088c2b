"""The folder of a saved adapter: which method, which base, which tensors.

PEFT's names, so that everything that handles adapters finds its way: ``adapter_config.json`` says what it is,
``adapter_model.safetensors`` holds the tensors by their names in the model, in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.files import replaced, write_json
from falcon_qlora.common.untrusted import read_json, refuse_links
from falcon_qlora.methods.interface import attached_names

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
RECORD = "falcon_qlora.json"
_TEXTS = ("base_model", "quantize_mode", "tokenizer", "template", "dataset_format", "method")


def write_adapter(folder: Path, model: PreTrainedModel, method: str, settings: dict[str, Any]) -> None:
    """Write what a method added to `model`.

    Args:
        folder: made where it is not there.
        method: its name.
        settings: what it takes to attach it again.
    """
    config = {"method": method, "base_model_name_or_path": model.name_or_path, "settings": settings}
    tensors = {name: each.cpu().contiguous() for name, each in attached_tensors(model).items()}
    with replaced(folder / TENSORS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_json(folder / CONFIG, config)


def attached_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a model's method trains, by the names in the model."""
    parameters = dict(model.named_parameters())
    return {name: parameters[name].detach() for name in attached_names(model)}


def restore_adapter(folder: Path, model: PreTrainedModel) -> None:
    """Put the tensors of a folder into a model to which its method is attached.

    Raises:
        RuntimeError: if they are not exactly those that the model has for it.
    """
    tensors, names = load_file(folder / TENSORS), attached_names(model)
    parameters = dict(model.named_parameters())
    for name in sorted(tensors.keys() ^ set(names)):
        raise RuntimeError(f"{folder} does not fit this model: {name} is in one of them only")
    with torch.no_grad():
        for name, tensor in tensors.items():
            if tensor.shape != parameters[name].shape:
                raise RuntimeError(
                    f"{folder} does not fit this model: {name} is {list(tensor.shape)} there and "
                    f"{list(parameters[name].shape)} here"
                )
            parameters[name].copy_(tensor)


def read_record(folder: Path) -> dict[str, Any]:
    """What the folder says about itself: ``method`` always, ``base_model`` unless it was never told.

    A whole model also has ``quantize_mode``, which is 16bit where it was not told: nothing else trains.

    Raises:
        UserError: if it holds nothing that was trained, or its files cannot be read, are links to others' or
            not of this form.
    """
    refuse_links(folder)
    record = _read_record_of_run(folder / RECORD)
    file = folder / CONFIG
    if not file.is_file():
        if record.get("method") != "full":
            raise UserError(f"{folder} holds no adapter (no {CONFIG}).")
        return {**record, "quantize_mode": record.get("quantize_mode") or "16bit"}
    config = read_json(file)
    base_model = config.get("base_model_name_or_path")
    if not isinstance(base_model, str | None):
        raise UserError(f"{file}: base_model_name_or_path is {str(base_model)[:40]!r}; expected a name")
    # What the adapter itself says goes before the record of a run.
    said = {**record, "method": config.get("method", "lora"), "settings": config.get("settings", {})}
    if base_model:
        said.setdefault("base_model", base_model)
    return said


def _read_record_of_run(file: Path) -> dict[str, Any]:
    record = read_json(file) if file.is_file() else {}
    for name, value in record.items():
        texts = isinstance(value, list) and all(isinstance(item, str) for item in value)
        fits = texts if name == "lora_slices" else isinstance(value, str | bool | int | float)
        if name in _TEXTS:
            fits = isinstance(value, str)
        if not fits and value is not None:
            raise UserError(f"{file}: {name} is a {type(value).__name__}, which is not what training writes")
    return record
