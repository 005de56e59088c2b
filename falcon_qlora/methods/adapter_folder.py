"""An adapter's files on disk, and reading a folder of them that others may have written.

The names are PEFT's, so that any tool for adapters finds them. ``adapter_config.json`` says what the adapter
is; ``adapter_model.safetensors`` holds the tensors, in float32, by their names in the model.
``adapter_model.bin``, as files of 2023 are called, is read too. ``falcon_qlora.json`` says how it was
trained.

PEFT's own reader accepts more than is trained here: pickled weights, modules imported by a name in the
configuration, patterns compiled from it, initial values that change the base. What `read_adapter` and
`SavedAdapter.check` accept is safe to pass to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.files import disk_errors, replaced, write_json
from falcon_qlora.common.record_files import check_format, run_of
from falcon_qlora.common.recorded_paths import absolute_name, started_in
from falcon_qlora.common.untrusted import read_json, refuse_links
from falcon_qlora.methods.interface import Method
from falcon_qlora.methods.table import is_whole, method_named, method_settings
from falcon_qlora.models.tensor_files import opened_tensors, read_tensor, stored_tensors
from falcon_qlora.processes.cores import on_one_core

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

CONFIG, TENSORS, TORCH_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
RECORD = "falcon_qlora.json"
FORMAT = 1  # of the record
_TEXTS = ("base_model", "quantize_mode", "tokenizer", "template", "dataset_format", "method")


def write_adapter(
    folder: Path, model: Any, method: Method, state: Mapping[str, Tensor] | None = None
) -> None:
    """Write what a method trains of `model` into the existing `folder`; see `Method.save`."""
    from safetensors.torch import save_file

    tensors = {name: each.cpu().contiguous() for name, each in method.saved_tensors(model, state).items()}
    with replaced(folder / TENSORS) as temporary, disk_errors(temporary):
        save_file(tensors, temporary, metadata={"format": "pt"})
    about = {"method": method.name, "base_model_name_or_path": model.name_or_path}
    write_json(folder / CONFIG, {**about, "settings": method.settings()})


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Record in `folder` how its content was trained, for `read_record`."""
    write_json(folder / RECORD, {"format": FORMAT, **record})


def fitting_tensors(folder: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a folder.

    Raises:
        RuntimeError: if their names and shapes are not those of `expected`.
    """
    file = tensors_file(folder)
    tensors = {name: read_tensor(file, name) for name in stored_tensors(file)}
    for name in sorted(tensors.keys() ^ expected.keys()):
        raise RuntimeError(f"{folder} does not fit this model: {name} is in one of them only")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise RuntimeError(
                f"{folder} does not fit this model: {name} is {list(tensor.shape)} there and "
                f"{list(expected[name].shape)} here"
            )
    return tensors


def tensors_file(folder: Path) -> Path:
    """The file with an adapter's tensors; safetensors where there are both, as in PEFT."""
    old = folder / TORCH_FILE
    return old if old.is_file() and not (folder / TENSORS).is_file() else folder / TENSORS


def read_record(folder: Path) -> dict[str, Any]:
    """The folder's record of itself: always ``method``, and ``base_model`` unless that is unknown.

    A whole model also has ``quantize_mode``, 16bit where it was not recorded: it cannot be trained in any
    other.

    Raises:
        UserError: if it holds nothing that was trained, or its files cannot be read, are links that lead out
            of it, or have another form.
    """
    refuse_links(folder)
    record, run = _read_record_of_run(folder / RECORD), run_of(folder)
    root = None if run is None else started_in(run)
    for name in ("base_model", "tokenizer"):
        # Older records have paths relative to where the run was started.
        if root is not None and record.get(name) not in (None, "tiny"):
            record[name] = absolute_name(record[name], root)
    file = folder / CONFIG
    if not file.is_file():
        if not is_whole(record):
            raise UserError(f"{folder} holds no adapter (no {CONFIG})")
        return {**record, "quantize_mode": record.get("quantize_mode") or "16bit"}
    config = read_json(file)
    base_model = config.get("base_model_name_or_path")
    if not isinstance(base_model, str | None):
        raise UserError(f"{file}: base_model_name_or_path is {str(base_model)[:40]!r}; expected a name")
    # The adapter's own configuration takes precedence over the record of a run.
    said = {**record, "method": config.get("method", "lora"), "settings": config.get("settings", {})}
    if base_model:
        said.setdefault("base_model", base_model)
    # The base's tokenizer lacks the tokens whose rows were trained.
    own = config.get("trainable_token_indices") is not None and (folder / "tokenizer.json").is_file()
    said["own_tokenizer"] = str(folder) if own else None
    return said


def _read_record_of_run(file: Path) -> dict[str, Any]:
    record, settings = read_json(file) if file.is_file() else {}, method_settings()
    check_format(record, str(file), FORMAT)
    for name, value in record.items():
        if name in settings:
            record[name] = settings[name].read(value, f"{file}: {name}")
            continue
        fits = isinstance(value, str if name in _TEXTS else str | bool | int | float)
        if not fits and value is not None:
            raise UserError(f"{file}: {name} is a {type(value).__name__}, which is not what training writes")
    return record


@dataclass(frozen=True)
class ReadTensor:
    """A tensor of an adapter's file, and what is wrong with it, or None.

    Attributes:
        values: until the next is read; None if something is wrong.
        is_zero: whether all of them are zero.
    """

    name: str
    fault: str | None = None
    values: Tensor | None = None
    is_zero: bool = False


@dataclass(frozen=True, kw_only=True)
class SavedAdapter:
    """An adapter in a folder, its settings checked.

    Attributes:
        folder: where it lies.
        method: that trained it, with its settings.
        record: the folder's record of itself, see `read_record`.
    """

    folder: Path
    method: Method
    record: dict[str, Any]

    @property
    def file(self) -> Path:
        """The file with its tensors."""
        return tensors_file(self.folder)

    def read(self, config: PreTrainedConfig) -> Iterator[ReadTensor]:
        """Read each tensor once, for an adapter of a model of `config`.

        Raises:
            UserError: if the file cannot be read, or the settings do not suit the model.
        """
        stored = stored_tensors(self.file)
        expected = self.method.saved_shapes(config)
        with opened_tensors([self.file]) as read:
            for name, shape in expected.items():
                if name not in stored:
                    yield ReadTensor(name, fault=f"{name} is missing")
                elif stored[name].shape != shape:
                    found = f"the shape {list(stored[name].shape)}, expected {list(shape)}"
                    yield ReadTensor(name, fault=f"{name} has {found}")
                elif not stored[name].dtype.startswith(("F16", "BF16", "F32", "F64")):
                    told = f"{name} holds {stored[name].dtype}, not floating-point numbers"
                    yield ReadTensor(name, fault=told)
                else:
                    yield _examined(name, read(self.file, name))
        for name in sorted(stored.keys() - expected.keys()):
            yield ReadTensor(name, fault=f"{name} belongs to no part of the model")

    def check(self, config: PreTrainedConfig, also: Callable[[str, Tensor], None] | None = None) -> list[str]:
        """Check its tensors for a model of `config`.

        Args:
            config: of the model.
            also: called with the name and values of each tensor, which are there until it returns.

        Returns:
            Names of those that are all zeros: training never moved them, or they were lost.

        Raises:
            UserError: for the first that is wrong, and as `read`.
        """
        zero = []
        with on_one_core():
            for each in self.read(config):
                if each.fault or each.values is None:
                    raise UserError(f"{self.file}: {each.fault}. The adapter is damaged or of another model")
                if also is not None:
                    also(each.name, each.values)
                if each.is_zero:
                    zero.append(each.name)
        return zero

    def open(self, base: Any, *, trainable: bool = False) -> Any:
        """Put it on its base, from `load_model`; `trainable`: to continue training, else for inference.

        Raises:
            UserError: if it is damaged or of another model.
        """
        self.check(base.config)
        return self.method.open(base, self.folder, trainable=trainable)

    def is_trained(self, config: PreTrainedConfig, zero: list[str]) -> bool:
        """False if it computes what the base does: all that its method starts at zero is in `zero`."""
        names = self.method.saved_shapes(config)
        started = {name for name in names if name.endswith(self.method.starts_at_zero)}
        return not started or not started <= set(zero)

    def lost_tensors(self, config: PreTrainedConfig, zero: list[str]) -> list[str]:
        """Those of `zero` that count as lost.

        Of an untrained adapter, tensors that start at zero do not count, nor do biases.
        """
        if self.is_trained(config, zero):
            return zero
        return [name for name in zero if not name.endswith((*self.method.starts_at_zero, ".bias"))]


def _examined(name: str, values: Tensor) -> ReadTensor:
    least, most = values.aminmax()  # one pass, no copies; NaN is both
    if not (least.isfinite() and most.isfinite()):
        return ReadTensor(name, fault=f"{name} has non-finite values (NaN/inf)")
    return ReadTensor(name, values=values, is_zero=not (least.any() or most.any()))


def read_adapter(folder: Path) -> SavedAdapter:
    """Read an adapter's folder; its weights are only checked to exist.

    Raises:
        UserError: if it holds none, or one that no method here trains.
    """
    record = read_record(folder)
    method = method_named(record["method"], folder).read_folder(folder, record)
    if not tensors_file(folder).is_file():
        other = next((path.name for path in sorted(folder.glob("adapter_model*"))), None)
        found = f"{other} is there, and is not read" if other else "the weights are gone"
        raise UserError(f"{folder} has no {TENSORS}: {found}")
    return SavedAdapter(folder=folder, method=method, record=record)
