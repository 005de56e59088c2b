"""Opening what any method saved, and which folders of this machine its files may have opened.

The files of an adapter or its run may come from anywhere. One that training wrote here tells the content of
the folders that it names; only such a folder, or one inside of theirs, is opened without the user's word.
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
    """Open what any method saved, on its base model, which is loaded as it was trained on.

    Another base than the adapter was trained on is warned of.

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
            double_quantization = record.get("double_quantization") is not False
        base_model = load_model(
            base_model,
            quantize_mode=quantize_mode or record.get("quantize_mode") or "4bit",
            device=device,
            compute_dtype=compute_dtype,
            double_quantization=double_quantization,
            revision=revision,
        )
    model: Any = base_model
    if saved is None:
        return METHODS[record["method"]]().open(model, path, trainable=trainable)
    revision = revision or getattr(model.config, "_commit_hash", None)  # others' models may not say it
    told = base_note(record, path, model.name_or_path, revision=revision)
    if told is not None:
        warnings.warn(told, stacklevel=2)
    return saved.open(model, trainable=trainable)


def base_note(record: dict[str, Any], folder: Path, base: str, *, revision: str | None = None) -> str | None:
    """What is to be said where an adapter meets another base than it was trained on, or perhaps another.

    Args:
        record: what the adapter's folder says of itself.
        folder: the adapter's.
        base: name of the model that it is opened on, which is on this machine.
        revision: of that on the hub.
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
    """Whether the files of a trained folder may have the model `name` opened, if it is a path at all.

    Args:
        name: of a model.
        what: ``base model`` or ``tokenizer``.
        record: what `folder` says of itself.
        folder: with the trained tensors.
    """
    from falcon_qlora.models.fingerprint import named_folder

    path = named_folder(name)
    return path is None or _lies_within(path, folder) or is_as_recorded(name, what, record) is True


def is_as_recorded(
    name: str, what: str, record: dict[str, Any], *, revision: str | None = None
) -> bool | None:
    """Whether the model `name` has the content that a record tells; None where either is not known.

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
    """Refuse the name of a folder that is gone, which on the hub would mean something else.

    Args:
        name, what, record, folder: as for `may_open`.
        say_so: how the user names another.

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
    """Refuse a folder that `may_open` says no to.

    Args:
        name, what, record, folder: as there.
        say_so: how the user names the folder, if that is what is meant.

    Returns:
        The folder outside of theirs that the files name; None for any other name.

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
    """Whether a path lies in a trained folder, or in the run that it is of."""
    run = run_of(folder)
    roots = [folder] if run is None else [folder, run]
    return any(path.resolve().is_relative_to(root.resolve()) for root in roots)
