"""PEFT's settings of a LoRA adapter, read as a file that others may have written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.untrusted import is_count, is_number, read_json
from falcon_qlora.methods.lora import Lora, checked_slices
from falcon_qlora.models.layouts import LINEARS

# Settings of PEFT's that are read here, or that change nothing.
_KNOWN = frozenset(
    "peft_type task_type peft_version inference_mode base_model_name_or_path revision r lora_alpha "
    "lora_dropout target_modules use_rslora use_dora init_lora_weights bias "
    "qalora_group_size megatron_core".split()
)


def read_lora(file: Path, *, slices: list[str] | None) -> Lora:
    """The LoRA that PEFT's settings in `file` are of.

    Args:
        file: PEFT's ``adapter_config.json``.
        slices: of the fused projection, where only they were trained, which PEFT knows nothing of.

    Raises:
        UserError: if it is not what `attach_lora` trains.
    """
    settings = read_json(file)
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type is {settings.get('peft_type')!r}; only LORA can be read.")
    _refuse_what_is_not_trained_here(settings, file)
    parts = len(checked_slices(slices)) if slices else 1
    r = _number(settings, "r", file, whole=True, largest=2**16)
    alpha = _number(settings, "lora_alpha", file, largest=2**20)
    if r % parts:
        raise UserError(f"{file}: r is {r}, which {parts} slices cannot share")
    return Lora(
        r=r // parts,
        alpha=alpha / parts if parts > 1 else alpha,
        dropout=_dropout(settings.get("lora_dropout"), file),
        target_modules=_targets(settings.get("target_modules"), file),
        slices=checked_slices(slices) if slices else None,
        use_rslora=settings.get("use_rslora") is True,
        use_dora=settings.get("use_dora") is True,
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
    value: Any = settings.get(name)
    if not (is_count if whole else is_number)(value) or not 0 < value <= largest:
        raise UserError(f"{source}: {name} is {str(value)[:40]!r}; expected a number up to {largest:,}")
    return value


def _dropout(value: Any, source: Path) -> float:
    if value is None:
        return 0.0
    if not is_number(value) or not 0 <= value < 1:
        raise UserError(f"{source}: lora_dropout is {str(value)[:40]!r}; expected 0 to below 1")
    return float(value)


def _targets(value: Any, source: Path) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(name in LINEARS for name in value):
        raise UserError(
            f"{source}: target_modules is {str(value)[:80]!r}; expected a list of {', '.join(LINEARS)}"
        )
    return tuple(name for name in LINEARS if name in value)
