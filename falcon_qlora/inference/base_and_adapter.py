"""A base model with a trained adapter, as the commands after training open it."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.untrusted import read_json
from falcon_qlora.config import Configuration, parse
from falcon_qlora.methods.table import is_whole
from falcon_qlora.run_folder.directory import RunDirectory


def adapter_folder(name: str) -> Path:
    """The adapter's own folder: `name`, or ``adapter`` inside it where `name` is a run directory.

    Raises:
        UserError: if neither holds one.
    """
    for folder in (Path(name), Path(name) / "adapter"):
        # The second is all that full fine-tuning leaves: a whole model, and how it was trained.
        if any((folder / file).is_file() for file in ("adapter_config.json", "falcon_qlora.json")):
            return folder
    raise UserError(f"--adapter {name}: holds no adapter (no adapter_config.json there or in adapter/)")


def read_trained(configuration: Configuration, folder: Path, *, named: Collection[str]) -> dict[str, Any]:
    """What `read_record` says of a trained folder; a whole model is its own base.

    Args:
        configuration: with the settings of the run, where there is one.
        folder: from `adapter_folder`.
        named: settings that the user named.

    Raises:
        UserError: if its files cannot be read, the user names a base for a whole model, or the files name
            what `check_names` refuses.
    """
    from falcon_qlora.methods.adapter_folder import read_record

    record = read_record(folder)
    if is_whole(record):
        if "model_name_or_path" in named:
            raise UserError(
                f"--model_name_or_path: {folder} holds a whole model, there is no base to put it on"
            )
        if (folder / "tokenizer.json").is_file():
            record["tokenizer"] = str(folder)
        else:
            record["tokenizer"] = record.get("tokenizer") or record.get("base_model")
    check_names(configuration, record, folder, named=named)
    return record


def record_of_merge(configuration: Configuration) -> dict[str, Any]:
    """That a merge is opened as it was certified, in the place of an adapter's record; {} for no merge."""
    from falcon_qlora.common.record_files import CERTIFICATE
    from falcon_qlora.models.fingerprint import named_folder

    folder = named_folder(configuration.model.model_name_or_path)
    if (
        configuration.explicit.get("quantize_mode") == "flag"
        or folder is None
        or not (folder / CERTIFICATE).is_file()
    ):
        return {}
    configuration.explicit.pop("quantize_mode", None)  # a run's settings file says how its base was stored
    # Not among a command's answers.
    print(
        f"note: {folder} is a merge and opened in 16 bits, as it was made; -q 4bit quantizes it first",
        file=sys.stderr,
    )
    return {"quantize_mode": "16bit"}


def check_names(
    configuration: Configuration, record: dict[str, Any], folder: Path, *, named: Collection[str]
) -> None:
    """Let a folder of this machine be read only where the user names it, or one who has had it open.

    The files of an adapter or its run may come from anywhere. One that training wrote here tells the content
    of the folders that it names; such a folder is opened, and named to the user.

    Args:
        configuration, record, folder, named: as in `read_trained`.

    Raises:
        UserError: if the files name another folder outside of theirs, or no base model.
    """
    base, tokenizer = base_model(configuration, record), tokenizer_name(configuration, record)
    if is_whole(record):
        tokenizer = tokenizer or base
    elif not base:
        raise UserError(f"{folder} names no base model. Name it with --model_name_or_path.")
    elif "model_name_or_path" not in named:
        _check_name(base, "base model", "--model_name_or_path", record, folder)
    if tokenizer and "tokenizer_name_or_path" not in named:
        _check_name(tokenizer, "tokenizer", "--tokenizer_name_or_path", record, folder)


def _check_name(name: str, what: str, flag: str, record: dict[str, Any], folder: Path) -> None:
    from falcon_qlora.methods.open_adapter import check_may_open

    path = check_may_open(name, what, record, folder, say_so=f"{flag} FOLDER")
    if path is not None:
        # Not among a command's answers.
        print(f"note: the {what} is {path}, which {folder} names", file=sys.stderr)


def parse_with_run(
    argv: list[str], run: RunDirectory | None, **how: Any
) -> tuple[Configuration, Collection[str]]:
    """Read a command line over the settings of a run, unless it names a file of settings itself.

    Returns:
        The configuration, and which settings the user gave: by flags, a recipe or a file that flags name.
    """
    configuration = parse(argv, **how)
    named = configuration.explicit.keys()
    if run is None or configuration.run.config is not None:
        return configuration, named
    return parse(["--config", str(run.config_file), *argv], **how), named


def given(configuration: Configuration, record: dict[str, Any], name: str, recorded: str) -> Any:
    """A setting of the model: as a flag or a file gives it, else as the record of what was trained does."""
    value = getattr(configuration.model, name)
    return value if name in configuration.explicit or record.get(recorded) is None else record[recorded]


def base_model(configuration: Configuration, record: dict[str, Any]) -> str:
    """The name of the base model."""
    name: str = given(configuration, record, "model_name_or_path", "base_model")
    return name


def tokenizer_name(configuration: Configuration, record: dict[str, Any]) -> str | None:
    """Where another tokenizer than the base model's comes from."""
    name: str | None = given(configuration, record, "tokenizer_name_or_path", "tokenizer")
    return name


def load_adapted(
    configuration: Configuration, folder: Path | None, record: dict[str, Any]
) -> tuple[Any, Any]:
    """The model in evaluation mode, what was trained on or of it where there is a folder, and the tokenizer.

    Args:
        folder: from `adapter_folder`.
        record: from `read_trained`, {} without a folder.
    """
    from falcon_qlora.methods.open_adapter import load_adapter
    from falcon_qlora.models.load import load_model

    settings = configuration.model
    whole = folder is not None and is_whole(record)
    model = load_model(
        str(folder) if whole else base_model(configuration, record),
        quantize_mode=given(configuration, record, "quantize_mode", "quantize_mode"),
        compute_dtype=settings.compute_dtype,
        double_quantization=given(configuration, record, "double_quantization", "double_quantization"),
        norms_in_float32=settings.norms_in_float32,
        llm_int8_threshold=settings.llm_int8_threshold,
        revision=settings.model_revision,
    )
    tokenizer = tokenizer_of(configuration, record)
    if folder is not None and not whole:
        return load_adapter(folder, base_model=model).eval(), tokenizer
    return model.eval(), tokenizer


def load_measured(
    configuration: Configuration, folder: Path | None, record: dict[str, Any], run: RunDirectory | None
) -> tuple[Any, dict[str, str]]:
    """What `load_adapted` opens, ready for packed documents, on the path on which its run trained.

    So a loss measured here is the one that the run would note. Without a run, or where a flag says otherwise,
    the configuration decides as it does for training.

    Args:
        folder, record: as there.
        run: that made it, where it is known.

    Returns:
        The model, and for each block's name what runs it, {} with ``--kernels off``.

    Raises:
        UserError: if ``--kernels required`` or FP8 meets a block, or a device, that cannot.
    """
    from falcon_qlora.models.fast_path import choose_kernels, runs_fast
    from falcon_qlora.models.forward import enable_packing

    model, _ = load_adapted(configuration, folder, record)
    enable_packing(model)
    recorded = read_json(run.kernels_file) if run is not None and run.kernels_file.is_file() else {}
    told = {configuration.explicit.get(name) for name in ("kernels", "compute_dtype")}
    left_alone = recorded and not any(runs_fast(str(what)) for what in recorded.values())
    if left_alone and "flag" not in told:
        # Not always what would be chosen here: what is frozen now was trained then.
        return model, {}
    settings = configuration.model
    return model, choose_kernels(model, kernels=settings.kernels, compute_dtype=settings.compute_dtype)


def tokenizer_of(configuration: Configuration, record: dict[str, Any]) -> Any:
    """The tokenizer that goes with the model and the adapter."""
    from falcon_qlora.models.tokenizer import load_tokenizer

    return load_tokenizer(
        base_model(configuration, record),
        tokenizer_name_or_path=tokenizer_name(configuration, record),
        revision=configuration.model.model_revision,
    )
