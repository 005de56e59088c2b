"""A base model with a trained adapter, as the commands after training open it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from falcon_qlora.common import by_url
from falcon_qlora.common.errors import UserError
from falcon_qlora.common.files import quoted
from falcon_qlora.common.stores import is_address
from falcon_qlora.run_folder.directory import RunDirectory


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is opened, and how it is computed.

    Attributes:
        model: the base model's name; where a whole model was trained, its folder.
        tokenizer: name of the model to take the tokenizer from, where that is not the base model.
        revision: of the base model on the hub.
        quantize_mode, compute_dtype, double_quantization, norms_in_float32, llm_int8_threshold: as for
            `load_model`.
        kernels: as for `choose_kernels`.
        kernels_are_named: whether the user named them, or the compute dtype; else a run's own path takes
            precedence.
        adapter: the folder of what was trained on it, or None.
        offload: whether the blocks' linears are in CPU memory, see `host_base`.
    """

    model: str
    tokenizer: str | None = None
    revision: str | None = None
    quantize_mode: Any = None
    compute_dtype: str = "auto"
    double_quantization: bool | None = None
    norms_in_float32: bool = False
    llm_int8_threshold: float = 0.0
    kernels: str = "auto"
    kernels_are_named: bool = False
    adapter: Path | None = None
    offload: bool = False

    @property
    def ways_to_hold_less(self) -> list[str]:
        """Flags with which less of the base would be on this device."""
        return [] if self.offload else ["--offload_base"]


def adapter_folder(name: str) -> Path:
    """The adapter's own folder: `name`, or ``adapter`` inside it where `name` is a run directory.

    Raises:
        UserError: if neither holds one.
    """
    if is_address(name):
        name = str(by_url.opened(name, "--adapter"))
    for folder in (Path(name), Path(name) / "adapter"):
        # Full fine-tuning saves no adapter_config.json, only the record beside a whole model.
        if any((folder / file).is_file() for file in ("adapter_config.json", "falcon_qlora.json")):
            return folder
    if not Path(name).exists():
        raise UserError(
            f"--adapter {name}: there is no such folder. One on the hub is downloaded first: hf download "
            "REPOSITORY --local-dir FOLDER"
        )
    told = f"--adapter {name}: holds no adapter (no adapter_config.json there or in adapter/)"
    if (Path(name) / "config.json").is_file():
        told += f". It holds a model: give it as -m {quoted(name)}"
    elif saved := sorted(Path(name).glob("checkpoints/step-*"), key=lambda each: each.stat().st_mtime):
        told += f". Its run has not ended: --resume it, or give its checkpoint {quoted(str(saved[-1]))}"
    raise UserError(told)


def load_adapted(source: Source) -> tuple[Any, Any]:
    """The model in evaluation mode, with its adapter where there is one, and the tokenizer."""
    from falcon_qlora.methods.adapter_folder import read_adapter
    from falcon_qlora.models.load import load_model

    saved = None if source.adapter is None else read_adapter(source.adapter)
    tokenizer = tokenizer_of(source)  # before the model, which takes minutes
    model: Any = load_model(
        source.model,
        quantize_mode=source.quantize_mode,
        compute_dtype=source.compute_dtype,
        double_quantization=source.double_quantization,
        norms_in_float32=source.norms_in_float32,
        llm_int8_threshold=source.llm_int8_threshold,
        revision=source.revision,
        offload=source.offload,
        ways=source.ways_to_hold_less,
    )
    if saved is not None:
        model = saved.open(model)
    return model.eval(), tokenizer


def load_measured(source: Source, run: RunDirectory | None) -> tuple[Any, dict[str, str]]:
    """The model of `load_adapted`, ready for packed documents, on the path on which its run trained.

    So a loss measured here is the one that the run would record. Without a run, or where the user names the
    kernels, they are chosen as for training.

    Args:
        source: as for `load_adapted`.
        run: the run that trained it, where it is known.

    Returns:
        The model, and block name → what runs it; {} with ``--kernels off``, or where the run's blocks all ran
        on the reference path.

    Raises:
        UserError: if ``--kernels required`` or FP8 is set and a block or the device cannot run it.
    """
    from falcon_qlora.models.fast_path import choose_kernels, runs_fast
    from falcon_qlora.models.forward import enable_packing

    model, _ = load_adapted(source)
    enable_packing(model)
    recorded = run.read("kernels") if run is not None and run.kernels_file.is_file() else {}
    left_alone = recorded and not any(runs_fast(str(what)) for what in recorded.values())
    if left_alone and not source.kernels_are_named:
        # The choice could differ here: parameters that are frozen now were trained then.
        return model, {}
    return model, choose_kernels(model, kernels=source.kernels, compute_dtype=source.compute_dtype)


def tokenizer_of(source: Source) -> Any:
    """The tokenizer that goes with the model and the adapter."""
    from falcon_qlora.models.tokenizer import load_tokenizer

    return load_tokenizer(source.model, tokenizer_name_or_path=source.tokenizer, revision=source.revision)
