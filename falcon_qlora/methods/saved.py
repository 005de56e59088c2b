"""A saved adapter, read as a file that others may have written.

What opens adapters takes more than is trained here: PEFT's own reader pickled weights, modules imported by a
name in the configuration, patterns compiled from it, starting values that change the base. What this module
lets pass is safe to hand on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from falcon_qlora.common.errors import UserError, nearest
from falcon_qlora.common.untrusted import is_count
from falcon_qlora.methods.adapter import Adapter
from falcon_qlora.methods.adapter_v2 import AdapterV2
from falcon_qlora.methods.folder import CONFIG, TENSORS, read_record
from falcon_qlora.methods.full import Full
from falcon_qlora.methods.lora import Lora
from falcon_qlora.methods.peft_settings import read_lora
from falcon_qlora.models.prefix import PREFIX
from falcon_qlora.models.scaled import SCALE_AND_BIAS
from falcon_qlora.models.tensor_files import StoredTensor, read_tensor, stored_tensors

_LARGEST = 2**16
_STARTED_AT_ZERO = (".lora_B.weight", f".{PREFIX}.gate", f".{SCALE_AND_BIAS}.bias")


@dataclass(frozen=True, kw_only=True)
class SavedAdapter:
    """An adapter in a folder, its settings checked.

    Attributes:
        folder: where it lies.
        method: that trained it, with its settings.
        base_model: name of the model it was trained on, as its files say.
        record: what the folder says about itself, see `read_record`.
    """

    folder: Path
    method: Lora | Adapter | AdapterV2
    base_model: str | None
    record: dict[str, Any]

    def faults(self, config: PreTrainedConfig) -> Iterator[str]:
        """What keeps its tensors from being those of a trained adapter of a model of `config`.

        Raises:
            UserError: if the file cannot be read, or the settings do not suit such a model.
        """
        stored = stored_tensors(self.folder / TENSORS)
        expected = self.method.saved_shapes(config)
        for name, shape in expected.items():
            if name not in stored:
                yield f"{name} is missing"
            elif stored[name].shape != shape:
                yield f"{name} has the shape {list(stored[name].shape)}, expected {list(shape)}"
            else:
                yield from _value_faults(name, stored[name])
        what = "linear" if isinstance(self.method, Lora) else "part"
        yield from (
            f"{name} belongs to no {what} of the model" for name in sorted(stored.keys() - expected.keys())
        )

    def check(self, config: PreTrainedConfig) -> None:
        """Raise a `UserError` for the first of `faults`."""
        for fault in self.faults(config):
            raise UserError(f"{self.folder / TENSORS}: {fault}. The adapter is damaged or of another model.")


def _value_faults(name: str, stored: StoredTensor) -> Iterator[str]:
    if not stored.dtype.startswith(("F16", "BF16", "F32", "F64")):
        yield f"{name} holds {stored.dtype}, not floating-point numbers"
        return
    tensor = read_tensor(stored.file, name)
    if not torch.isfinite(tensor).all():
        yield f"{name} holds numbers that are not finite"


def zero_tensors(adapter: SavedAdapter, config: PreTrainedConfig) -> list[str]:
    """Names of its tensors that are zero throughout: those that training never moved, or that were lost."""
    names = adapter.method.saved_shapes(config)
    return [name for name in names if not read_tensor(adapter.folder / TENSORS, name).any()]


def is_untrained(adapter: SavedAdapter, config: PreTrainedConfig, zero: Collection[str]) -> bool:
    """Whether it computes what the base does, as all that its method starts at zero is among `zero`."""
    started = [name for name in adapter.method.saved_shapes(config) if name.endswith(_STARTED_AT_ZERO)]
    return all(name in zero for name in started)


def may_be_zero(name: str) -> bool:
    """Whether this tensor of an adapter that is not trained can be zero: so it, or a base's bias, started."""
    return name.endswith((*_STARTED_AT_ZERO, ".bias"))


def read_adapter(folder: Path) -> SavedAdapter:
    """Open an adapter's folder; of its weights only that they are there is checked.

    Raises:
        UserError: if it holds none, or one that is not what a method here trains.
    """
    record = read_record(folder)
    method = _method(folder, record)
    if not (folder / TENSORS).is_file():
        other = next((path.name for path in sorted(folder.glob("adapter_model*"))), None)
        found = f"{other} is there, and only safetensors are opened" if other else "the weights are gone"
        raise UserError(f"{folder} has no {TENSORS}: {found}.")
    return SavedAdapter(folder=folder, method=method, base_model=record.get("base_model"), record=record)


def _method(folder: Path, record: dict[str, Any]) -> Lora | Adapter | AdapterV2:
    name = record["method"]
    if name == Lora.name:
        return read_lora(folder / CONFIG, slices=record.get("lora_slices"))
    prefixed: dict[str, type[Adapter] | type[AdapterV2]] = {each.name: each for each in (Adapter, AdapterV2)}
    if name == Full.name:
        raise UserError(f"{folder} holds a whole model, not an adapter.")
    if not isinstance(name, str) or name not in prefixed:
        told = str(name)[:40]
        raise UserError(f"{folder}: the method {told!r} is not known{nearest(told, [Lora.name, *prefixed])}")
    method = prefixed[name]
    settings = record["settings"]
    expected = {field.name for field in fields(method)}
    if not isinstance(settings, dict) or settings.keys() != expected:
        raise UserError(f"{folder / CONFIG}: settings must be {', '.join(sorted(expected))}")
    for key, smallest in {"prefix_length": 1, "first_block": 0}.items():
        value = settings[key]
        if not is_count(value, least=smallest, most=_LARGEST):
            raise UserError(
                f"{folder / CONFIG}: {key} is {str(value)[:40]!r}; expected {smallest} to {_LARGEST:,}"
            )
    return method(**settings)
