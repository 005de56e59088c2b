"""The settings of a LoRA adapter, from its folder: one that was trained here, by PEFT or by others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.untrusted import is_count, is_number, read_json
from falcon_qlora.methods import new_tokens

# PEFT's settings that are read here, or that have no effect.
_KNOWN = frozenset(
    "peft_type task_type peft_version inference_mode base_model_name_or_path revision r lora_alpha "
    "lora_dropout target_modules use_rslora use_dora init_lora_weights bias "
    "qalora_group_size megatron_core auto_mapping trainable_token_indices".split()
)
# Most repeats of a pattern that others may have written: its possible cost grows with each.
_MOST_REPEATS = 5


def settings_in(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The fields of `Lora` for an adapter.

    Args:
        folder: of the adapter.
        record: what training has written beside PEFT's configuration; {} where others wrote it.

    Raises:
        UserError: for what is not trained here, or is not valid.
    """
    # PEFT does not know of slices, so the record has them.
    file, slices = folder / "adapter_config.json", record.get("lora_slices")
    settings = read_json(file)
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type is {settings.get('peft_type')!r}; only LORA is supported")
    _refuse_what_is_not_trained_here(settings, file)
    given: list[Any] = list(map(settings.get, ("r", "lora_alpha", "lora_dropout", "target_modules")))
    r, alpha, dropout, targets = given
    if isinstance(targets, str | list):
        targets = _target_names(targets, folder)
    fits = {
        "r": is_count(r, least=1, most=2**16),
        "lora_alpha": is_number(alpha) and 0 < alpha <= 2**20,
        "lora_dropout": dropout is None or (is_number(dropout) and 0 <= dropout < 1),
        "target_modules": isinstance(targets, list) and targets,
    }
    for name in fits:
        if not fits[name]:
            told = str(settings.get(name))[:80]
            raise UserError(f"{file}: {name} is {told!r}, which is not supported")
    rows, head_rows, tokens = None, True, None
    if settings.get("trainable_token_indices") is not None:
        rows, head_rows = new_tokens.rows_in(settings["trainable_token_indices"], file)
        tokens = record.get("new_tokens")
        if tokens is not None and len(tokens) != len(rows):
            raise UserError(f"{folder}: {len(tokens)} new_tokens are named, but {len(rows)} rows stored")
    parts = len(set(slices)) if slices else 1
    if r % parts:
        raise UserError(f"{file}: r is {r}, which is not divisible by {parts} slices")
    return {
        "r": r // parts,
        "alpha": alpha / parts,
        "dropout": float(dropout or 0),
        # PEFT writes a set, in any order. Slices already imply their projection.
        "target_modules": None if slices and len(targets) == 1 else tuple(sorted(set(targets))),
        "slices": tuple(slices) if slices else None,
        "use_rslora": settings.get("use_rslora") is True,
        "use_dora": settings.get("use_dora") is True,
        "new_tokens": tuple(tokens) if tokens is not None else None,
        "token_rows": rows,
        "head_rows": head_rows,
    }


def _target_names(spelled: str | list[Any], folder: Path) -> list[str] | None:
    """The linears that an adapter is on, by the last part of their name.

    Beside such names PEFT's `target_modules` may be ``all-linear``, a pattern for whole names, or suffixes of
    several parts. The tensors' own names tell which linears are meant. Each must match `spelled`, as PEFT
    opens no other.

    Args:
        spelled: `target_modules` in its configuration.
        folder: of the adapter.

    Returns:
        None if `spelled` does not match the linears that the adapter has tensors for.
    """
    if isinstance(spelled, list):
        if not all(isinstance(each, str) for each in spelled):
            return None
        if all(re.fullmatch(r"\w+", each) for each in spelled):
            return spelled
    from falcon_qlora.methods.adapter_folder import tensors_file
    from falcon_qlora.models.tensor_files import stored_tensors

    names = {
        name.removeprefix("base_model.model.").rpartition(".lora_")[0]
        for name in stored_tensors(tensors_file(folder))
    }
    if isinstance(spelled, list):
        found = all(name.endswith(tuple(f".{each}" for each in spelled)) or name in spelled for name in names)
    elif spelled.lower() == "all-linear":
        found = True
    else:
        # Nested repeats take forever on a name that does not match.
        repeats = len(re.findall(r"[*+{]", spelled))
        if len(spelled) > 1000 or repeats > _MOST_REPEATS or re.search(r"\)[*+{]|\\\d|\(\?\(", spelled):
            return None
        try:
            found = all(re.fullmatch(spelled, name) for name in names)
        except (re.error, RecursionError, OverflowError):
            return None
    return sorted({name.rpartition(".")[2] for name in names}) if found and all(names) else None


def _refuse_what_is_not_trained_here(settings: dict[str, Any], source: Path) -> None:
    for name, value in settings.items():
        if name not in _KNOWN and value:
            raise UserError(f"{source}: {name} is {str(value)[:80]!r}, which is not supported")
    if settings.get("bias") not in (None, "none"):
        raise UserError(f"{source}: bias is {settings['bias']!r}; trained biases are not supported")
    if settings.get("init_lora_weights") not in (None, True, False, "gaussian"):
        raise UserError(
            f"{source}: init_lora_weights is {str(settings['init_lora_weights'])[:80]!r}, which is not "
            "supported: opening the adapter would change the base model"
        )
