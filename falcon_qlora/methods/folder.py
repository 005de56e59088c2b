"""The folder of a saved adapter: which method, which base, which tensors.

PEFT's names, so that everything that handles adapters finds its way: ``adapter_config.json`` says what it is,
``adapter_model.safetensors`` holds the tensors by their names in the model, in float32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import FalconForCausalLM

from falcon_qlora.errors import UserError
from falcon_qlora.files import replaced, write_json
from falcon_qlora.methods.interface import attached_names

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
RECORD = "falcon_qlora.json"


def write_adapter(folder: Path, model: FalconForCausalLM, method: str, settings: dict[str, Any]) -> None:
    """Write what a method added to `model`.

    Args:
        folder: made where it is not there.
        method: its name.
        settings: what it takes to attach it again.
    """
    config = {"method": method, "base_model_name_or_path": model.name_or_path, "settings": settings}
    parameters = dict(model.named_parameters())
    tensors = {name: parameters[name].detach().cpu().contiguous() for name in attached_names(model)}
    with replaced(folder / TENSORS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_json(folder / CONFIG, config)


def restore_adapter(folder: Path, model: FalconForCausalLM) -> None:
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

    Raises:
        UserError: if it holds nothing that was trained, or its files cannot be read.
    """
    record = _read_json(folder / RECORD)
    config = _read_json(folder / CONFIG)
    if config is None and (record is None or record.get("method") != "full"):
        raise UserError(f"{folder} holds no adapter (no {CONFIG}).")
    # What the adapter itself says goes before the record of a run.
    said = {"method": "lora", **(record or {})}
    if config is not None:
        said["method"] = config.get("method", "lora")
        said["settings"] = config.get("settings", {})
        if base_model := config.get("base_model_name_or_path"):
            said.setdefault("base_model", base_model)
    return said


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, OSError) as error:
        raise UserError(f"{file} is not valid JSON: {error}") from None
    return content
