"""Opening what any method saved, and which local folders its files may cause to be opened.

The files of an adapter or its run may come from anywhere. Those that training wrote here record fingerprints
of the folders that they name. Unless the user names a folder, it is opened only if its fingerprint matches,
or if it lies inside the adapter's folder or its run.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.record_files import run_of
from falcon_qlora.methods.table import METHODS, is_whole

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from falcon_qlora.models.quantize import QuantizeMode


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
    """Open what any method saved, on its base model, loaded as in training.

    Warns if the base is not the one that the adapter was trained on.

    Args:
        path: the adapter's folder; or, after full fine-tuning, the model's, which needs no base.
        base_model: a loaded model, or the name of one; None: the one that the adapter names. If that is a
            folder outside the adapter's own, the adapter must record its fingerprint, as one trained on this
            machine does.
        quantize_mode: how to load the base, see `load_model`, as are the next four. None: as the folder's
            record says, else as the base is stored, or ``4bit``.
        device: where to load it.
        compute_dtype: its compute dtype.
        double_quantization: whether NF4's scales are quantized too; None: as for `quantize_mode`, or True.
        revision: of a base on the hub.
        trainable: whether to continue training; else for inference.

    Raises:
        UserError: if the folder holds no adapter or a damaged one, or names a base that cannot be loaded or
            may not be opened unless the user names it.
    """
    from falcon_qlora.methods.adapter_folder import read_adapter, read_record
    from falcon_qlora.models.load import load_model

    path = Path(path)
    record = read_record(path)
    whole = is_whole(record)
    if whole:
        if base_model is not None:
            raise UserError(f"{path} is a fully fine-tuned model, which needs no base: leave base_model out")
        base_model = str(path)
    elif base_model is None:
        base_model = record.get("base_model")
        if not base_model:
            raise UserError(f"{path}/adapter_config.json names no base model. Name it as base_model")
        check_may_open(base_model, "base model", record, path, say_so="base_model=FOLDER")
    saved = None if whole else read_adapter(path)
    if isinstance(base_model, str):
        if double_quantization is None:
            double_quantization = record.get("double_quantization")
        base_model = load_model(
            base_model,
            quantize_mode=quantize_mode or record.get("quantize_mode"),
            device=device,
            compute_dtype=compute_dtype,
            double_quantization=double_quantization,
            revision=revision,
        )
    model: Any = base_model
    if saved is None:
        return METHODS[record["method"]]().open(model, path, trainable=trainable)
    revision = revision or getattr(model.config, "_commit_hash", None)  # models loaded elsewhere may lack it
    told = base_note(record, path, model.name_or_path, revision=revision)
    if told is not None:
        warnings.warn(told, stacklevel=2)
    return saved.open(model, trainable=trainable)


def base_note(record: dict[str, Any], folder: Path, base: str, *, revision: str | None = None) -> str | None:
    """A warning where an adapter is opened on another base than it was trained on, or perhaps another.

    Args:
        record: the adapter folder's record of itself.
        folder: the adapter's.
        base: name of the model that it is opened on, which is on this machine.
        revision: of that model on the hub.
    """
    from falcon_qlora.models.fingerprint import model_fingerprint, shown

    trained_on, told = record.get("base_model"), record.get("base_fingerprint")
    same = is_as_recorded(base, "base model", record, revision=revision)
    if same is False:
        found = shown(model_fingerprint(base, revision=revision))
        return (
            f"the adapter in {folder} was trained on another base: {trained_on} (fingerprint {shown(told)}), "
            f"not {base} (fingerprint {found})"
        )
    if same is None and trained_on not in (None, base):
        return (
            f"the adapter in {folder} was trained on {trained_on}; whether {base} is the same model cannot "
            "be checked, as only its name is recorded"
        )
    return None


def may_open(name: str, what: str, record: dict[str, Any], folder: Path) -> bool:
    """Whether a trained folder's files may cause the model `name` to be opened; True if it is no path.

    Args:
        name: of a model.
        what: ``base model`` or ``tokenizer``.
        record: of `folder`, see `read_record`.
        folder: with the trained tensors.
    """
    from falcon_qlora.models.fingerprint import named_folder

    path = named_folder(name)
    return path is None or _lies_within(path, folder) or is_as_recorded(name, what, record) is True


def is_as_recorded(
    name: str, what: str, record: dict[str, Any], *, revision: str | None = None
) -> bool | None:
    """Whether the model `name` matches the fingerprint in a record; None where either is unknown.

    Args:
        name: of a model.
        what: ``base model`` or ``tokenizer``.
        record: of what was trained.
        revision: of a base model on the hub.
    """
    from falcon_qlora.models.fingerprint import is_fingerprint_of, tokenizer_fingerprint

    if what == "base model":
        return is_fingerprint_of(record.get("base_fingerprint"), name, revision=revision)
    told, found = record.get("tokenizer_fingerprint"), tokenizer_fingerprint(name)
    return None if told is None or found is None else told == found


def check_is_there(name: str, what: str, record: dict[str, Any], folder: Path, *, say_so: str) -> None:
    """Refuse the name of a missing folder, which would mean something else on the hub.

    Args:
        name, what, record, folder: as for `may_open`.
        say_so: how the user can name another.

    Raises:
        UserError: naming the folder.
    """
    from falcon_qlora.models.fingerprint import named_folder, tells_of_folder
    from falcon_qlora.models.locate import packaged_folder

    path = named_folder(name)
    if path is None and packaged_folder(name) is None:
        told = record.get("base_fingerprint" if what == "base model" else "tokenizer_fingerprint")
        path = Path(name) if tells_of_folder(told) else None
    if path is not None and not path.expanduser().exists():
        relative = "" if path.is_absolute() else " (a path from the folder in which the run was started)"
        raise UserError(f"The {what} folder {name}{relative}, recorded in {folder}, is gone; give {say_so}")


def check_may_open(name: str, what: str, record: dict[str, Any], folder: Path, *, say_so: str) -> Path | None:
    """Refuse a folder that `may_open` does not allow.

    Args:
        name, what, record, folder: as for `may_open`.
        say_so: how the user can name the folder, if it is the right one.

    Returns:
        The named folder if it lies outside `folder` and its run; None for any other name.

    Raises:
        UserError: saying how to have it opened.
    """
    from falcon_qlora.models.fingerprint import named_folder

    check_is_there(name, what, record, folder, say_so=say_so)
    if not may_open(name, what, record, folder):
        raise UserError(
            f"{folder} names the local folder {name!r} as its {what}, but records no fingerprint of what it "
            f"is now. If that is right, give {say_so}"
        )
    path = named_folder(name)
    return None if path is None or _lies_within(path, folder) else path


def _lies_within(path: Path, folder: Path) -> bool:
    """Whether a path lies in a trained folder, or in its run."""
    run = run_of(folder)
    roots = [folder] if run is None else [folder, run]
    return any(path.resolve().is_relative_to(root.resolve()) for root in roots)
