"""What the verbs after training open, as the command line, a run's settings and the trained folder say it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from falcon_qlora.config import Configuration, parse
from falcon_qlora.inference.base_and_adapter import Source, check_names, is_merge, read_trained
from falcon_qlora.methods.table import is_whole
from falcon_qlora.run_folder.directory import RunDirectory


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


def source_of(
    configuration: Configuration, folder: Path | None, *, named: Collection[str]
) -> tuple[Source, dict[str, Any]]:
    """What is opened, a flag or a file going before what the folder says; and the folder's record.

    Args:
        configuration: with the settings of the run, where there is one.
        folder: from `adapter_folder`; None for the model alone.
        named: settings that the user named.

    Raises:
        UserError: as `read_trained` and `check_names`.
    """
    settings, explicit = configuration.model, configuration.explicit
    record = {} if folder is None else read_trained(folder, named=named)

    def given(name: str, recorded: str) -> Any:
        value = getattr(settings, name)
        return value if name in explicit or record.get(recorded) is None else record[recorded]

    base = given("model_name_or_path", "base_model")
    tokenizer = given("tokenizer_name_or_path", "tokenizer")
    mode = given("quantize_mode", "quantize_mode")
    whole = False
    if folder is not None:
        check_names(record, folder, base=base, tokenizer=tokenizer, named=named)
        whole = is_whole(record)
    elif explicit.get("quantize_mode") != "flag" and is_merge(base):
        mode = "16bit"  # whatever a run's settings file says of how its base was stored
    return Source(
        model=str(folder) if whole else base,
        tokenizer=tokenizer or base if whole else tokenizer,
        revision=settings.model_revision,
        quantize_mode=mode,
        compute_dtype=settings.compute_dtype,
        double_quantization=given("double_quantization", "double_quantization"),
        norms_in_float32=settings.norms_in_float32,
        llm_int8_threshold=settings.llm_int8_threshold,
        kernels=settings.kernels,
        kernels_are_named="flag" in {explicit.get("kernels"), explicit.get("compute_dtype")},
        adapter=None if whole else folder,
    ), record
