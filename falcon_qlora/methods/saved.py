"""A saved LoRA adapter, read as a file that others may have written.

PEFT's own reader takes more than is trained here: pickled weights, modules imported by a name in the
configuration, patterns compiled from it, starting values that change the base. What this module lets pass is
safe to hand to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import FalconConfig

from falcon_qlora.errors import UserError
from falcon_qlora.models.falcon import LINEARS, expected_linears, linear_shapes
from falcon_qlora.models.tensor_files import StoredTensor, read_tensor, stored_tensors
from falcon_qlora.untrusted import read_json

SETTINGS = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
RECORD = "falcon_qlora.json"

# Settings of PEFT's that are read here, or that change nothing.
_KNOWN = frozenset(
    "peft_type task_type peft_version inference_mode base_model_name_or_path revision r lora_alpha "
    "lora_dropout target_modules use_rslora use_dora init_lora_weights bias "
    "qalora_group_size megatron_core".split()
)
_PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True)
class SavedAdapter:
    """A LoRA adapter in a folder, its settings checked.

    Attributes:
        folder: where it lies.
        r: rank.
        dropout: probability of dropping an input of the low-rank product, in training.
        alpha: the product is scaled by alpha / r, or by alpha / sqrt(r) where `use_rslora`.
        targets: the linears it changes, by the last part of their names.
        base_model: name of the model it was trained on, as its files say.
        revision: of that model on the hub.
        record: what training noted beside it; {} for an adapter from elsewhere.
    """

    folder: Path
    r: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    use_rslora: bool
    use_dora: bool
    base_model: str | None
    revision: str | None
    record: dict[str, Any]

    def shapes(self, config: FalconConfig) -> dict[str, tuple[int, ...]]:
        """Name in the file → shape, of every tensor that the adapter must have on a model of `config`."""
        expected: dict[str, tuple[int, ...]] = {}
        linears = linear_shapes(config)
        for module in expected_linears(config):
            name = module.rpartition(".")[2]
            if name in self.targets:
                out, into = linears[name]
                expected[f"{_PREFIX}{module}.lora_A.weight"] = (self.r, into)
                expected[f"{_PREFIX}{module}.lora_B.weight"] = (out, self.r)
                if self.use_dora:
                    expected[f"{_PREFIX}{module}.lora_magnitude_vector"] = (out,)
        return expected

    def changes(self, module: str) -> bool:
        """Whether it changes this linear, named in full."""
        return module.rpartition(".")[2] in self.targets

    def tensors_of(self, module: str) -> dict[str, Tensor]:
        """Its tensors for one linear: ``lora_A`` ``[r, in]``, ``lora_B`` ``[out, r]`` and, with DoRA,
        ``lora_magnitude_vector`` ``[out]``, in float32.
        """
        names = {"lora_A": ".lora_A.weight", "lora_B": ".lora_B.weight"}
        if self.use_dora:
            names["lora_magnitude_vector"] = ".lora_magnitude_vector"
        return {
            key: read_tensor(self.folder / WEIGHTS, f"{_PREFIX}{module}{end}").float()
            for key, end in names.items()
        }

    def faults(self, config: FalconConfig) -> Iterator[str]:
        """What keeps its tensors from being those of a trained adapter of a model of `config`."""
        stored = stored_tensors(self.folder / WEIGHTS)
        expected = self.shapes(config)
        for name, shape in expected.items():
            if name not in stored:
                yield f"{name} is missing"
            elif stored[name].shape != shape:
                yield f"{name} has the shape {list(stored[name].shape)}, expected {list(shape)}"
            else:
                yield from _value_faults(name, stored[name])
        yield from (
            f"{name} belongs to no linear of the model" for name in sorted(stored.keys() - expected.keys())
        )

    def check(self, config: FalconConfig) -> None:
        """Raise a `UserError` for the first of `faults`."""
        for fault in self.faults(config):
            raise UserError(f"{self.folder / WEIGHTS}: {fault}. The adapter is damaged or of another model.")


def _value_faults(name: str, stored: StoredTensor) -> Iterator[str]:
    if not stored.dtype.startswith(("F16", "BF16", "F32", "F64")):
        yield f"{name} holds {stored.dtype}, not floating-point numbers"
        return
    tensor = read_tensor(stored.file, name)
    if not torch.isfinite(tensor).all():
        yield f"{name} holds numbers that are not finite"


def zero_tensors(adapter: SavedAdapter, config: FalconConfig) -> list[str]:
    """Names of its tensors that are zero throughout: those that training never moved, or that were lost."""
    names = adapter.shapes(config)
    return [name for name in names if not read_tensor(adapter.folder / WEIGHTS, name).any()]


def adapter_settings(folder: Path) -> dict[str, Any]:
    """PEFT's settings of an adapter, not checked yet.

    Raises:
        UserError: if there are none.
    """
    if not (folder / SETTINGS).is_file():
        raise UserError(f"{folder} holds no adapter (no {SETTINGS}).")
    return read_json(folder / SETTINGS)


def read_adapter(folder: Path) -> SavedAdapter:
    """Open an adapter's folder; of its weights only that they are safetensors is checked.

    Raises:
        UserError: if it holds none, or one that is not what `attach_lora` trains.
    """
    settings = adapter_settings(folder)
    source = folder / SETTINGS
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{source}: peft_type is {settings.get('peft_type')!r}; only LORA can be read.")
    _refuse_what_is_not_trained_here(settings, source)
    if not (folder / WEIGHTS).is_file():
        other = next((path.name for path in sorted(folder.glob("adapter_model*"))), None)
        found = f"{other} is there, and only safetensors are opened" if other else "the weights are gone"
        raise UserError(f"{folder} has no {WEIGHTS}: {found}.")
    file = folder / RECORD
    record = read_json(file) if file.is_file() else {}
    for name, value in record.items():
        if not isinstance(value, str | bool | int | float | None):
            raise UserError(f"{file}: {name} is a {type(value).__name__}, not text or a number.")
    return SavedAdapter(
        folder=folder,
        r=_number(settings, "r", source, whole=True, largest=2**16),
        alpha=_number(settings, "lora_alpha", source, largest=2**20),
        dropout=_dropout(settings.get("lora_dropout"), source),
        targets=_targets(settings.get("target_modules"), source),
        use_rslora=settings.get("use_rslora") is True,
        use_dora=settings.get("use_dora") is True,
        base_model=_text(settings, "base_model_name_or_path", source),
        revision=_text(settings, "revision", source),
        record=record,
    )


def _refuse_what_is_not_trained_here(settings: dict[str, Any], source: Path) -> None:
    for name, value in settings.items():
        if name not in _KNOWN and value:
            raise UserError(f"{source}: {name} is set to {str(value)[:80]!r}, which is not read here.")
    if settings.get("bias") not in (None, "none"):
        raise UserError(f"{source}: bias is {settings['bias']!r}; adapters that train biases are not read.")
    if settings.get("init_lora_weights") not in (None, True, False, "gaussian"):
        raise UserError(
            f"{source}: init_lora_weights is {str(settings['init_lora_weights'])[:80]!r}, by which opening "
            "the adapter would change the base model."
        )


def _number(settings: dict[str, Any], name: str, source: Path, *, largest: int, whole: bool = False) -> Any:
    value = settings.get(name)
    kind = int if whole else int | float
    if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value <= largest:
        raise UserError(f"{source}: {name} is {str(value)[:40]!r}; expected a number up to {largest:,}")
    return value


def _dropout(value: Any, source: Path) -> float:
    if value is None:
        return 0.0
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        raise UserError(f"{source}: lora_dropout is {str(value)[:40]!r}; expected 0 to below 1")
    return float(value)


def _text(settings: dict[str, Any], name: str, source: Path) -> str | None:
    value = settings.get(name)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{source}: {name} is {str(value)[:40]!r}; expected a name")
    return value or None


def _targets(value: Any, source: Path) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(name in LINEARS for name in value):
        raise UserError(
            f"{source}: target_modules is {str(value)[:80]!r}; expected a list of {', '.join(LINEARS)}"
        )
    return tuple(name for name in LINEARS if name in value)
