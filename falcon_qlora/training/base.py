"""Checks that the base is the one that a checkpoint or a starting adapter was trained on."""

from __future__ import annotations

from pathlib import Path

from falcon_qlora.common.errors import UserError
from falcon_qlora.config import ModelArguments
from falcon_qlora.methods.adapter_folder import RECORD, read_record
from falcon_qlora.methods.open_adapter import base_note, check_is_there, is_as_recorded
from falcon_qlora.models.fingerprint import model_fingerprint
from falcon_qlora.models.locate import open_checkpoint
from falcon_qlora.processes import agreement
from falcon_qlora.terminal.console import note


def check_recorded_folders(settings: ModelArguments, checkpoint: str | None) -> None:
    """Refuse to resume a run whose base or tokenizer is a folder that is gone.

    Raises:
        UserError: naming the folder, and the flag that names its new place.
    """
    if checkpoint is None or not (Path(checkpoint) / RECORD).is_file():
        return
    folder = Path(checkpoint)
    record = read_record(folder)
    check_is_there(settings.model_name_or_path, "base model", record, folder, say_so="-m FOLDER")
    tokenizer, say_so = settings.tokenizer_name_or_path, "--tokenizer_name_or_path FOLDER"
    if tokenizer is not None:
        check_is_there(tokenizer, "tokenizer", record, folder, say_so=say_so)


def check_base(settings: ModelArguments, *, checkpoint: str | None, adapter: str | None) -> str | None:
    """Refuse another base than that of the checkpoint or the adapter; how it is quantized is not compared.

    Missing files of the base are downloaded.

    Returns:
        The fingerprint of the base's content, for records; None if it has none.

    Raises:
        UserError: if the base's content is another.
    """
    name, revision = settings.model_name_or_path, settings.model_revision

    def look() -> str | None:
        open_checkpoint(name, revision=revision)
        trained = checkpoint or adapter
        if trained is not None and (checkpoint is None or (Path(trained) / RECORD).is_file()):
            _compare(Path(trained), settings, goes_on=checkpoint is not None)
        return model_fingerprint(name, revision=revision)

    return agreement.from_main_process(look)


def _compare(folder: Path, settings: ModelArguments, *, goes_on: bool) -> None:
    record = read_record(folder)
    name, revision = settings.model_name_or_path, settings.model_revision
    told = base_note(record, folder, name, revision=revision)
    if is_as_recorded(name, "base model", record, revision=revision) is False:
        if goes_on:
            raise UserError(f"--resume: {told}. Bring the old base back, or start a new run")
        raise UserError(f"--adapter: {told}. Give its own base with -m, or train a new adapter")
    if told is not None and not goes_on:
        note(told)
