"""What a folder is - a run, a checkpoint, an adapter, a merge, a model - and whether it is whole.

Nothing is executed or downloaded: the folder's files are read as untrusted.
"""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from falcon_qlora.checkpoint import manifest
from falcon_qlora.common.errors import UserError, one_line, printable
from falcon_qlora.common.files import sha256
from falcon_qlora.common.quantities import counted
from falcon_qlora.common.record_files import CERTIFICATE, without_format
from falcon_qlora.common.stores import is_address
from falcon_qlora.common.untrusted import file_beside, is_count, leads_out, read_json, refuse_links
from falcon_qlora.methods.adapter_folder import CONFIG, RECORD, read_adapter, read_record
from falcon_qlora.methods.open_adapter import may_open
from falcon_qlora.methods.table import method_from, method_named
from falcon_qlora.models.checkpoints import RANDOM, parameter_reader, parse_random, read_folder_config
from falcon_qlora.models.fingerprint import changed_files
from falcon_qlora.models.locate import is_on_hub, open_checkpoint, packaged_folder
from falcon_qlora.models.prepared import Prepared, changed_since, read_prepared
from falcon_qlora.models.schemes import scheme_in
from falcon_qlora.models.tokenizer import load_tokenizer
from falcon_qlora.run_folder.directory import RunDirectory

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_NAMED = 8  # of runs or checkpoints in a folder
_STATE = "trainer_state.json"
_LARGEST_BESIDE_BYTES = 2**30  # of a file beside a merge's weights
# What a checkpoint's torch files may hold besides tensors: NumPy's random states.
_HARMLESS = ("numpy.", "_codecs.encode")


@dataclass
class Inspection:
    """What a folder was found to be.

    Attributes:
        kind: ``run``, ``checkpoint``, ``adapter``, ``merge`` or ``model``.
        rows: label and text of what is known of it.
        faults: what is wrong, each with the file; empty if it is whole.
        trained: False for an adapter that changes nothing: all tensors that start at zero are still zero.
        lost: whether all that is wrong with a run is that it has neither an adapter nor a checkpoint.
        checks: of a finished run, what was proved at its end: name, state and figure; empty if a release
            that did not record it made the run. None for anything else.
    """

    kind: str
    rows: list[tuple[str, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    trained: bool = True
    lost: bool = False
    checks: list[tuple[str, str, str]] | None = None

    @property
    def state(self) -> str:
        """``whole``, ``not whole``, ``not trained yet`` or that there is nothing to go on from."""
        if self.lost:
            return "not finished, holds nothing to go on from"
        if self.faults:
            return "not whole"
        return "whole" if self.trained else "not trained yet"

    def add(self, label: str, value: Any) -> None:
        if value not in (None, "", [], {}):
            self.rows.append((label, _text(value)))

    def tell(self, source: dict[str, Any], labels: dict[str, str]) -> None:
        """Add the values of `source` whose keys are in `labels`: key → label."""
        for key, label in labels.items():
            self.add(label, source.get(key))

    def attempt(self, check: Callable[[], Any]) -> Any:
        """The check's result; None if it raises a `UserError`, which becomes a fault."""
        try:
            return check()
        except UserError as error:
            self.faults.append(str(error))
            return None

    def collect(self, faults: Iterable[str], file: Path | None = None) -> bool:
        """Add faults, each after `file` if given, also an error that ends the search; were there any?"""
        before = len(self.faults)
        self.attempt(lambda: self.faults.extend(faults if file is None else (f"{file}: {f}" for f in faults)))
        return len(self.faults) > before


def _text(value: Any) -> str:
    """`value` for a reader: lists without brackets, numbers without needless digits.

    Control characters are written as escapes.
    """
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if isinstance(value, float):
        return f"{value:.5g}"
    return printable(str(value))


def inspect_folder(folder: Path) -> Inspection:
    """Say what `folder` is and what is wrong with it.

    Raises:
        UserError: if it is none of these things.
    """
    if any((folder / name).is_file() for name in (CERTIFICATE, _STATE, CONFIG, RECORD, "config.yaml")):
        refuse_links(folder)  # a model's files may be links: whoever reads them refuses bad ones
    if (folder / CERTIFICATE).is_file():
        return _merge(folder)
    if any((folder / file).is_file() for file in (_STATE, CONFIG, RECORD)):
        return _left_by_training(folder)
    if (folder / "config.json").is_file():
        found = _model(folder)
        # A run may have left only the model here. Other tools' manifests have another form.
        with contextlib.suppress(ValueError):
            manifest.read_manifest(folder)
            found.collect(filter(None, [manifest.fault(folder)]), folder)
        return found
    if RunDirectory(folder).holds_run():
        return _run(RunDirectory(folder))
    steps = [str(each) for _, each in manifest.step_folders(folder)]
    runs = sorted(str(each) for each in folder.glob("*") if RunDirectory(each).holds_run())
    raise UserError(
        f"{folder}: no run, checkpoint, adapter, merge or model lies there"
        + (f". Checkpoints in it: {', '.join(steps[-_NAMED:])}" if steps else "")
        + (f". Runs in it: {', '.join(runs[:_NAMED])}" if runs else "")
    )


def _run(run: RunDirectory) -> Inspection:
    found = Inspection("run")
    config = found.attempt(run.read_config) or {}
    if config:
        method = found.attempt(lambda: method_from(config, run.config_file))
        found.add("method", method and method.describe())
    data = (found.attempt(lambda: read_json(run.data_file)) or {}) if run.data_file.is_file() else {}
    # "auto" in the settings; what it became for each data set is in the record.
    found.tell(config | {"template": _templates(data) or config.get("template")}, _OF_RUNS)
    if data:
        counts = [f"{data[name]:,} {name}" for name in ("documents", "tokens") if is_count(data.get(name))]
        found.add("data", ", ".join(counts))
        found.add("data's hash", data.get("fingerprint"))
    if run.summary_file.is_file():
        recorded = found.attempt(lambda: run.read("summary"))
        summary = recorded or {}
        losses = [_text(summary.get(name)) for name in ("first_loss", "final_loss")]
        if summary.get("first_loss") is not None:  # none was logged in a run shorter than --logging_steps
            summary["loss"] = " → ".join(losses)
        found.tell(summary, {"steps": "steps", "loss": "loss", "best_eval_loss": "best held out"})
        if is_count(tokens := summary.get("micro_batch_tokens"), least=1):
            found.add("micro-batches", f"{tokens:,} tokens ({_text(summary.get('micro_batch_reason'))})")
        found.checks = None if recorded is None else _checks(summary.get("checks"))
        if not run.adapter.is_dir():
            found.faults.append(f"{run.adapter} is missing, though the run was finished")
    else:
        logged = found.attempt(run.read_metrics)
        done = f", {counted(logged[-1]['step'], 'step')} logged" if logged else ""
        found.add("state", f"not finished{done}")
    parts = [run.adapter] if run.adapter.is_dir() else []
    parts += [folder for _, folder in manifest.step_folders(run.checkpoints)]
    for part in parts:
        if leads_out(part, part.parent):
            found.faults.append(f"{part} is a link that leads out of the run")
            continue
        inside = _left_by_training(part)
        if not part.is_dir():
            continue  # removed by a run in progress, to make room for the next
        found.faults += inside.faults
        found.add(inside.kind, f"{part.name}: {'NOT WHOLE' if inside.faults else inside.state}")
        if part == run.adapter:
            found.trained = inside.trained
    if not parts and not run.summary_file.is_file():
        found.lost = not found.faults
        found.faults.append(
            f"{run} has neither a checkpoint nor an adapter: unless it is being trained now, start it again "
            "with --overwrite"
        )
    return found


def _checks(recorded: Any) -> list[tuple[str, str, str]]:
    """Name, state and figure of what a summary says was proved, which others may have written."""
    checks = recorded.items() if isinstance(recorded, dict) else ()
    return [
        (_text(name).replace("_", " "), _text(each.get("state")), _text(each.get("told")))
        for name, each in checks
        if isinstance(each, dict)
    ]


def _templates(data: dict[str, Any]) -> list[str]:
    """The templates of the data sets that `data.json` lists."""
    sources = data.get("sources")
    known = [each for each in sources if isinstance(each, dict)] if isinstance(sources, list) else []
    return list(dict.fromkeys(each["template"] for each in known if isinstance(each.get("template"), str)))


_OF_RUNS = {
    "model_name_or_path": "base model",
    "quantize_mode": "stored in",
    "dataset_name": "trained on",
    "template": "template",
    "learning_rate": "learning rate",
}


def _left_by_training(folder: Path) -> Inspection:
    """Inspect a checkpoint, or what a run left at its end."""
    whole = not (folder / CONFIG).is_file() and (folder / "config.json").is_file()
    found = _trained_model(folder) if whole else _adapter(folder)
    if (folder / _STATE).is_file():
        found.kind = "checkpoint"
        state = found.attempt(lambda: read_json(folder / _STATE)) or {}
        found.tell(state, {"global_step": "step", "epoch": "epoch"})
        for file in sorted([*folder.glob("*.pt"), *folder.glob("*.pth"), *folder.glob("*.bin")]):
            found.faults += _torch_file_faults(file)
    elif not (folder / manifest.MANIFEST).is_file():
        return found  # adapters of other tools and of older releases have none
    found.collect(filter(None, [manifest.fault(folder)]), folder)
    return found


def _trained_model(folder: Path) -> Inspection:
    found = _model(folder)
    record = found.attempt(lambda: read_record(folder)) or {}
    if record:
        found.add("method", method_named(record["method"], folder).title)
    found.tell(record, {"base_model": "made from", "template": "template"})
    return found


def _adapter(folder: Path) -> Inspection:
    found = Inspection("adapter")
    adapter = found.attempt(lambda: read_adapter(folder))
    if adapter is None:
        return found
    labels = {"base_model": "base model", "quantize_mode": "trained in", "template": "template"}
    found.tell(adapter.record, labels)
    found.add("method", adapter.method.describe())
    base = adapter.record.get("base_model") or ""
    is_open = may_open(base, "base model", adapter.record, folder)
    config = found.attempt(lambda: base_config(base)) if is_open else None
    if config is None:
        found.add("note", "the base model's configuration is not here: the tensors were not compared with it")
        return found
    zero = []

    def faults() -> Iterator[str]:
        for each in adapter.read(config):
            if each.fault:
                yield each.fault
            elif each.is_zero:
                zero.append(each.name)

    if not found.collect(faults(), adapter.file):
        found.trained = adapter.is_trained(config, zero)
        lost = adapter.lost_tensors(config, zero)
        found.collect((f"{name} is zero throughout: lost, or never trained" for name in lost), adapter.file)
    return found


def base_config(name: str) -> PreTrainedConfig | None:
    """The configuration of a model that an adapter names; None if it is not on this machine.

    Raises:
        UserError: if it exists and is not valid.
    """
    if name.startswith(RANDOM):
        return parse_random(name, 0).config
    if not name or is_address(name):  # nothing is downloaded
        return None
    folder = packaged_folder(name) or (Path(name) if Path(name).is_dir() else None)
    if folder is None and is_on_hub(name):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(name, "config.json")
        folder = Path(cached).parent if isinstance(cached, str) else None
    return read_folder_config(folder) if folder is not None else None


def _merge(folder: Path) -> Inspection:
    found = _model(folder)
    found.kind, file = "merge", folder / CERTIFICATE
    certificate = found.attempt(lambda: without_format(read_json(file), str(file)))
    if certificate is None:
        return found
    origin = certificate.get("origin")
    found.tell(origin if isinstance(origin, dict) else {}, _OF_MERGES)
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
        from falcon_qlora.models.folder import altered_tensors

        for name in altered_tensors(folder, read_folder_config(folder), hashes):
            found.faults.append(f"{name} does not match the certificate: it was altered")
    if "files" in certificate:  # older certificates do not have them
        found.collect(_file_faults(folder / CERTIFICATE, certificate["files"]))
    return found


_OF_MERGES = {
    "base_model": "base model",
    "datasets": "trained on",
    "data_fingerprint": "data's hash",
    "template": "template",
    "licence": "licence",
}


def _file_faults(certificate: Path, files: Any) -> Iterator[str]:
    if not isinstance(files, dict):
        yield f"{certificate} lists no files"
        return
    for name, expected in files.items():
        file = file_beside(certificate, name)
        if not file.is_file():
            yield f"{file} is missing"
        elif file.stat().st_size > _LARGEST_BESIDE_BYTES:
            yield f"{file} is too large ({file.stat().st_size:,} bytes; limit {_LARGEST_BESIDE_BYTES:,})"
        elif sha256(file) != expected:
            yield f"{file} does not match the certificate: it was altered"


def _model(folder: Path) -> Inspection:
    found = Inspection("model")
    config = found.attempt(lambda: read_folder_config(folder))
    if config is None:
        return found
    found.add("layout", f"{config.num_hidden_layers} blocks of {config.hidden_size}")
    scheme = scheme_in(folder)
    found.add("stored in", scheme and scheme.words)
    prepared = found.attempt(lambda: read_prepared(folder))
    if prepared is not None:
        found.add("prepared from", prepared.origin)
        found.collect(_changed_since_prepared(folder, prepared))
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    if not found.faults and has_tokenizer and not (folder / "tokenizer.json").is_file():
        found.attempt(lambda: load_tokenizer(str(folder)))
    if not found.faults:
        found.collect(_tensor_faults(folder, config) if scheme is None else _quantized_faults(folder))
    return found


def _changed_since_prepared(folder: Path, prepared: Prepared) -> Iterator[str]:
    from falcon_qlora.models.load import check_unchanged

    changed = changed_files(folder, prepared)
    for name in changed:
        if (folder / name).is_file():
            yield str(changed_since(folder, name))
        else:
            yield f"{folder} has no {name}, which prepare wrote: copy it back, or prepare the base again"
    if not changed:
        check_unchanged(open_checkpoint(str(folder)))


def _quantized_faults(folder: Path) -> Iterator[str]:
    """The first fault of a quantized checkpoint, in which every tensor is read."""
    import torch

    from falcon_qlora.models.folder import parameter_shapes
    from falcon_qlora.models.load import empty_model

    try:
        checkpoint = open_checkpoint(str(folder))
        missing = parameter_shapes(checkpoint.config)
        model = empty_model(checkpoint.config, dtype=torch.float32)
        for name, tensor in checkpoint.tensors(model, torch.device("cpu"), torch.float32):
            shape = missing.pop(name)
            if tuple(tensor.shape) != shape:
                yield f"{folder}: {name} has the shape {list(tensor.shape)}, not {list(shape)}"
            elif isinstance(tensor, torch.Tensor) and not torch.isfinite(tensor).all():
                yield f"{folder}: {name} has non-finite values (NaN/inf)"
        yield from (f"{folder} lacks {name}" for name in missing)
    except UserError as error:
        yield str(error)


def _tensor_faults(folder: Path, config: PreTrainedConfig) -> Iterator[str]:
    import torch

    from falcon_qlora.models.folder import parameter_shapes

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
            yield f"{folder}: {name} has non-finite values (NaN/inf)"


def _torch_file_faults(file: Path) -> list[str]:
    """Faults of a torch file: damage, or more to load than tensors. Nothing in it is executed."""
    import torch

    try:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        refused = sorted(name for name in unsafe if not name.startswith(_HARMLESS))
        if refused:
            return [f"{file} would run {refused[0]} when loaded: do not load it"]
        with zipfile.ZipFile(file) as archive:
            altered = archive.testzip()
    except Exception as error:  # torch raises many kinds for a damaged file
        return [f"{file} is damaged: {one_line(error)}"]
    return [f"{file} is damaged: {altered} inside was altered"] if altered else []
