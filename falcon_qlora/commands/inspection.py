"""What a folder is - a run, a checkpoint, an adapter, a merge, a model - and whether it is whole.

Nothing is executed and nothing downloaded: what lies in the folder is read as others' files are.
"""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedConfig

from falcon_qlora.checkpoint import manifest
from falcon_qlora.common.errors import UserError, one_line
from falcon_qlora.common.files import sha256
from falcon_qlora.common.record_files import CERTIFICATE
from falcon_qlora.common.untrusted import file_beside, read_json, read_yaml, refuse_links
from falcon_qlora.merge.folder import parameter_shapes
from falcon_qlora.methods.folder import CONFIG, RECORD, TENSORS, read_record
from falcon_qlora.methods.full import Full
from falcon_qlora.methods.lora import Lora
from falcon_qlora.methods.names import may_open
from falcon_qlora.methods.saved import is_untrained, may_be_zero, read_adapter, zero_tensors
from falcon_qlora.models.checkpoints import RANDOM, parameter_reader, parse_random, read_folder_config
from falcon_qlora.models.locate import is_on_hub, packaged_folder
from falcon_qlora.models.tensor_files import tensor_hash
from falcon_qlora.run_folder.directory import RunDirectory

_STATE = "trainer_state.json"
_LARGEST_BESIDE_BYTES = 2**30  # of what lies beside a merge's weights
# What a checkpoint's torch files may hold beside tensors: random states are NumPy's.
_HARMLESS = ("numpy.", "_codecs.encode")


@dataclass
class Inspection:
    """What was found.

    Attributes:
        kind: ``run``, ``checkpoint``, ``adapter``, ``merge`` or ``model``.
        rows: label and text of what it is.
        faults: what is wrong, each with the file; none where it is whole.
        trained: False for an adapter that changes nothing, as all of it that starts at zero is zero.
    """

    kind: str
    rows: list[tuple[str, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    trained: bool = True

    @property
    def state(self) -> str:
        """``whole``, ``not whole`` or ``not trained yet``."""
        if self.faults:
            return "not whole"
        return "whole" if self.trained else "not trained yet"

    def add(self, label: str, value: Any) -> None:
        if value not in (None, "", [], {}):
            self.rows.append((label, _text(value)))

    def attempt(self, check: Callable[[], Any]) -> Any:
        """The check's result; None where it raises, which is then a fault."""
        try:
            return check()
        except UserError as error:
            self.faults.append(str(error))
            return None


def _text(value: Any) -> str:
    """As a reader wants it: lists without brackets, numbers without digits that say nothing.

    What would be no sign on a terminal but a command to it is written out.
    """
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if isinstance(value, float):
        return f"{value:.5g}"
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in str(value))


def inspect_folder(folder: Path) -> Inspection:
    """Say what `folder` is and what is wrong with it.

    Raises:
        UserError: if it is none of these things.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder.")
    if any((folder / name).is_file() for name in (CERTIFICATE, _STATE, CONFIG, RECORD, "config.yaml")):
        refuse_links(folder)  # a model's files may be links: they are named by who reads them
    if (folder / CERTIFICATE).is_file():
        return _merge(folder)
    if (folder / _STATE).is_file():
        return _checkpoint(folder)
    if any((folder / file).is_file() for file in (CONFIG, RECORD)):
        return _finished(folder)
    if (folder / "config.json").is_file():
        found = _model(folder)
        # Of a run of which only the model is left to be seen; other tools' manifests are not of this form.
        with contextlib.suppress(ValueError):
            manifest.read_manifest(folder)
            wrong = manifest.fault(folder)
            found.faults += [f"{folder}: {wrong}"] if wrong is not None else []
        return found
    if RunDirectory(folder).holds_run():
        return _run(RunDirectory(folder))
    raise UserError(f"{folder}: no run, checkpoint, adapter, merge or model lies there.")


def _run(run: RunDirectory) -> Inspection:
    found = Inspection("run")
    config = found.attempt(lambda: read_yaml(run.config_file)) or {}
    for label, name in _OF_RUNS.items():
        found.add(label, config.get(name))
    if config.get("method") == Lora.name:
        found.add("LoRA rank", config.get("lora_r"))
    if run.data_file.is_file():
        _describe_data(found, run.data_file)
    if run.summary_file.is_file():
        summary = found.attempt(lambda: read_json(run.summary_file)) or {}
        found.add("steps", summary.get("steps"))
        if summary.get("first_loss") is not None:  # none was logged in a run shorter than --logging_steps
            found.add("loss", f"{_text(summary['first_loss'])} → {_text(summary.get('final_loss'))}")
        found.add("best held out", summary.get("best_eval_loss"))
        if not run.adapter.is_dir():
            found.faults.append(f"{run.adapter} is missing, though the run was finished")
    else:
        found.add("state", "not finished")
    parts = [run.adapter] if run.adapter.is_dir() else []
    for part in [*parts, *(run.checkpoint(step) for step in run.checkpoint_steps())]:
        inside = _checkpoint(part) if (part / _STATE).is_file() else _finished(part)
        if not part.is_dir():
            continue  # a run that goes on has made room for the next
        found.faults += inside.faults
        found.add(inside.kind, f"{part.name}: {'NOT WHOLE' if inside.faults else inside.state}")
        if part == run.adapter:
            found.trained = inside.trained
    return found


_OF_RUNS = {
    "base model": "model_name_or_path",
    "stored in": "quantize_mode",
    "method": "method",
    "trained on": "dataset_name",
    "template": "template",
    "learning rate": "learning_rate",
}


def _describe_data(found: Inspection, file: Path) -> None:
    data = found.attempt(lambda: read_json(file)) or {}
    counts = [f"{data[name]:,} {name}" for name in ("documents", "tokens") if isinstance(data.get(name), int)]
    found.add("data", ", ".join(counts))
    found.add("data's hash", data.get("fingerprint"))


def _checkpoint(folder: Path) -> Inspection:
    found = _trained(folder)
    found.kind = "checkpoint"
    state = found.attempt(lambda: read_json(folder / _STATE)) or {}
    found.add("step", state.get("global_step"))
    found.add("epoch", state.get("epoch"))
    for file in sorted([*folder.glob("*.pt"), *folder.glob("*.pth"), *folder.glob("*.bin")]):
        found.faults += _torch_file_faults(file)
    wrong = manifest.fault(folder)
    if wrong is not None:
        found.faults.append(f"{folder}: {wrong}")
    return found


def _finished(folder: Path) -> Inspection:
    """What a run left at its end; other tools' adapters, and those of before, have no manifest."""
    found = _trained(folder)
    wrong = manifest.fault(folder) if (folder / manifest.MANIFEST).is_file() else None
    if wrong is not None:
        found.faults.append(f"{folder}: {wrong}")
    return found


def _trained(folder: Path) -> Inspection:
    """What a method left: an adapter, or a whole model."""
    whole = not (folder / CONFIG).is_file() and (folder / "config.json").is_file()
    return _trained_model(folder) if whole else _adapter(folder)


def _trained_model(folder: Path) -> Inspection:
    found = _model(folder)
    record = found.attempt(lambda: read_record(folder)) or {}
    found.add("made from", record.get("base_model"))
    found.add("method", Full().describe())
    found.add("template", record.get("template"))
    return found


def _adapter(folder: Path) -> Inspection:
    found = Inspection("adapter")
    adapter = found.attempt(lambda: read_adapter(folder))
    if adapter is None:
        return found
    found.add("base model", adapter.base_model)
    found.add("trained in", adapter.record.get("quantize_mode"))
    found.add("template", adapter.record.get("template"))
    if isinstance(adapter.method, Lora):
        found.add("LoRA", _described(adapter.method))
    else:
        found.add("method", adapter.method.describe())
    base = adapter.base_model or ""
    is_open = may_open(base, "base model", adapter.record, folder)
    config = found.attempt(lambda: base_config(base)) if is_open else None
    if config is None:
        found.add("note", "the base model's configuration is not here: the tensors were not compared with it")
        return found
    faults = found.attempt(lambda: list(adapter.faults(config)))
    if faults:
        found.faults += [f"{folder / TENSORS}: {fault}" for fault in faults]
    elif faults is not None:
        zero = zero_tensors(adapter, config)
        found.trained = not is_untrained(adapter, config, zero)
        lost = zero if found.trained else [name for name in zero if not may_be_zero(name)]
        found.faults += [
            f"{folder / TENSORS}: {name} is zero throughout: lost, or never trained" for name in lost
        ]
    return found


def _described(lora: Lora) -> str:
    variant = " DoRA" * lora.use_dora + " rsLoRA" * lora.use_rslora
    return (
        f"r {lora.r}, alpha {lora.alpha:g}{variant}, on {', '.join(lora.slices or lora.target_modules or ())}"
    )


def base_config(name: str) -> PreTrainedConfig | None:
    """The configuration of a model named by an adapter, where it is on this machine.

    Raises:
        UserError: if it is there and wrong.
    """
    if name.startswith(RANDOM):
        return parse_random(name, 0).config
    if not name:
        return None
    folder = packaged_folder(name)
    if folder is None and Path(name).is_dir():
        folder = Path(name)
    if folder is None and is_on_hub(name):
        cached = try_to_load_from_cache(name, "config.json")
        folder = Path(cached).parent if isinstance(cached, str) else None
    return read_folder_config(folder) if folder is not None else None


def _merge(folder: Path) -> Inspection:
    found = _model(folder)
    found.kind = "merge"
    certificate = found.attempt(lambda: read_json(folder / CERTIFICATE)) or {}
    origin = certificate.get("origin")
    if isinstance(origin, dict):
        found.add("base model", origin.get("base_model"))
        found.add("trained on", origin.get("datasets"))
        found.add("data's hash", origin.get("data_fingerprint"))
        found.add("template", origin.get("template"))
        found.add("licence", origin.get("licence"))
    found.add("merged onto", certificate.get("merged_onto"))
    measured = certificate.get("merges")
    kept = measured.get(certificate.get("merged_onto")) if isinstance(measured, dict) else None
    if isinstance(kept, dict):
        found.add(
            "held-out loss", f"{_text(kept.get('loss'))} (adapter {_text(certificate.get('adapter_loss'))})"
        )
        found.add("KL divergence", kept.get("kl_divergence"))
    hashes = certificate.get("tensors")
    if not isinstance(hashes, dict):
        found.faults.append(f"{folder / CERTIFICATE} lists no tensors")
    elif not found.faults:
        found.faults += _hash_faults(folder, hashes)
    if "files" in certificate:  # certificates of before say nothing of them
        found.attempt(lambda: _collect(found, _file_faults(folder / CERTIFICATE, certificate["files"])))
    return found


def _hash_faults(folder: Path, hashes: dict[str, Any]) -> Iterator[str]:
    config = read_folder_config(folder)
    read = parameter_reader(folder, config)
    for name in parameter_shapes(config):
        if tensor_hash(read(name)) != hashes.get(name):
            yield f"{name} is not what the certificate is about: it was altered"


def _file_faults(certificate: Path, files: Any) -> Iterator[str]:
    if not isinstance(files, dict):
        yield f"{certificate} lists no files"
        return
    for name, expected in files.items():
        file = file_beside(certificate, name)
        if not file.is_file():
            yield f"{file} is missing"
        elif file.stat().st_size > _LARGEST_BESIDE_BYTES:
            yield f"{file} has {file.stat().st_size:,} bytes, which no such file needs"
        elif sha256(file) != expected:
            yield f"{file} is not what the certificate is about: it was altered"


def _model(folder: Path) -> Inspection:
    found = Inspection("model")
    config = found.attempt(lambda: read_folder_config(folder))
    if config is None:
        return found
    found.add("layout", f"{config.num_hidden_layers} blocks of {config.hidden_size}")
    found.attempt(lambda: _collect(found, _tensor_faults(folder, config)))
    return found


def _collect(found: Inspection, faults: Iterator[str]) -> None:
    for fault in faults:
        found.faults.append(fault)


def _tensor_faults(folder: Path, config: PreTrainedConfig) -> Iterator[str]:
    read = parameter_reader(folder, config)
    for name, shape in parameter_shapes(config).items():
        try:
            tensor = read(name)
        except UserError as error:
            yield str(error)
            continue
        if tuple(tensor.shape) != shape:
            yield f"{folder}: {name} has the shape {list(tensor.shape)}, config.json asks for {list(shape)}"
        elif not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            yield f"{folder}: {name} holds numbers that are not finite"


def _torch_file_faults(file: Path) -> list[str]:
    """Whether a torch file is whole, and would load as tensors alone; nothing in it is executed."""
    try:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        refused = sorted(name for name in unsafe if not name.startswith(_HARMLESS))
        if refused:
            return [f"{file} would run {refused[0]} when it is loaded: do not load it"]
        with zipfile.ZipFile(file) as archive:
            altered = archive.testzip()
    except Exception as error:  # torch raises many kinds for a damaged file
        return [f"{file} is damaged: {one_line(error)}"]
    return [f"{file} is damaged: {altered} in it was altered"] if altered else []
