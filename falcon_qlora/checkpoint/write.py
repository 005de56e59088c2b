"""Writing a checkpoint so that a folder with its final name is always complete.

The main process writes all of it: one disk, one failure, and nothing to agree on but the outcome. Of a
sharded model each process first writes its part of the optimizer's state, which is more than the rest.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from falcon_qlora.checkpoint.adapter_check import AdapterFaultError, check_adapter
from falcon_qlora.checkpoint.manifest import newest_whole, step_folders, write_manifest
from falcon_qlora.checkpoint.optimizer_parts import write_part
from falcon_qlora.checkpoint.process_state import STATES, save_cursor
from falcon_qlora.common.errors import UserError, first_line, reason_of
from falcon_qlora.methods.interface import method_of
from falcon_qlora.models.sharded import is_sharded, take_part
from falcon_qlora.processes import agreement, ranks

_REPLACED = "replaced-step-"


def save_checkpoint(
    trainer: Any, checkpoints: Path, *, state: dict[str, Any], record: dict[str, Any]
) -> str | None:
    """Write ``step-N`` with the adapter, optimizer, schedule, every process's state and the trainer's.

    The folder is filled under another name, described by a manifest, flushed to the disk and renamed. Only
    then the oldest beyond `save_total_limit` go, never the best one.

    Args:
        trainer: a Transformers Trainer after an optimizer step; every process calls this.
        checkpoints: the folder to write into.
        state: this process's own.
        record: what the manifest says besides the step and the number of processes.

    Returns:
        None, or why it could not be written (the disk is full, the folder cannot be written); what was there
        before is untouched then.

    Raises:
        UserError: if the processes' replicas differ, or if what then lies there is not what is in memory;
            it is not kept.
    """
    if not is_sharded(trainer.model):
        trained = (parameter for parameter in trainer.model.parameters() if parameter.requires_grad)
        require_same_replicas(trained, checkpoints, step=trainer.state.global_step)
    states = agreement.gather_objects(state)
    trainer_state = trainer.state
    if trainer_state.best_global_step == trainer_state.global_step:
        trainer_state.best_model_checkpoint = str(checkpoints / f"step-{trainer_state.global_step}")

    def try_to(work: Callable[[], None]) -> str | None:
        try:
            work()
        except OSError as error:
            _remove_unfinished(checkpoints)
            return reason_of(error)
        except AdapterFaultError as error:
            _remove_unfinished(checkpoints)
            raise UserError(not_kept(error, checkpoints, step=trainer_state.global_step)) from None
        return None

    partial = checkpoints / f".step-{trainer_state.global_step}.partial"
    failure = agreement.from_main_process(lambda: try_to(lambda: _begin(partial)))
    parts: dict[str, Any] = {}
    if failure is None and is_sharded(trainer.model) and not trainer.args.save_only_model:
        failure, parts = _write_parts(trainer, partial)
    if failure is None:
        trainer.saving(ranks.is_main_process())
        if is_sharded(trainer.model) and not ranks.is_main_process():
            take_part(trainer.model)
        failure = agreement.from_main_process(
            lambda: try_to(lambda: _write(trainer, partial, states, record, parts))
        )
    return failure


def require_same_replicas(tensors: Iterable[Tensor], checkpoints: Path, *, step: int) -> None:
    """Refuse to save one process's replica for all where another's is not the same.

    A resumed run takes what was saved for the replica of every process, so nobody would ever know.

    Args:
        tensors: of this process; every process calls this.
        checkpoints: the folder of those that were saved before.
        step: of the run.

    Raises:
        UserError: naming the processes and the last good checkpoint.
    """
    try:
        agreement.check_replicas(tensors)
    except agreement.ReplicasDifferError as error:
        last = agreement.from_main_process(lambda: last_complete(checkpoints))
        raise UserError(
            f"step {step:,}: the replicas differ: {error}. Nothing was saved: look at the GPUs of these "
            f"processes and their memory. {last}"
        ) from None


def not_kept(error: AdapterFaultError, checkpoints: Path, *, step: int) -> str:
    """What to say where a saved adapter is not the one in memory."""
    last = last_complete(checkpoints)
    return f"step {step:,}: what was saved failed its check and was not kept: {error}. {last}"


def last_complete(checkpoints: Path) -> str:
    """A sentence that names the last complete checkpoint."""
    whole, _ = newest_whole(checkpoints)
    if whole is None:
        return "There is no complete checkpoint."
    return f"The last complete checkpoint is {whole}: --resume goes on from it."


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Make what libraries raise where a disk is full, or fails, the OSError that it is."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        raise OSError(0, first_line(error)) from error
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(0, first_line(error)) from error  # the tokenizers' have no class of their own


def set_aside_after(checkpoints: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step`, which a run that goes on there makes again; returns them.

    They stay until the run has passed them, so that nothing is lost before it is there again.
    """
    _remove_unfinished(checkpoints)
    later = [path for number, path in step_folders(checkpoints) if number > step]
    for path in later:
        aside = path.with_name(f"{_REPLACED}{path.name.removeprefix('step-')}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    return later


def _begin(partial: Path) -> None:
    _remove_unfinished(partial.parent)
    partial.mkdir(parents=True)


def _write_parts(trainer: Any, partial: Path) -> tuple[str | None, dict[str, Any]]:
    """Write the optimizer's state, each process its own part.

    Returns:
        Why that failed on one of them, or None; what the manifest says of the parts. On all alike.
    """
    process, failure, part = ranks.process_index(), None, {}
    trainer.saving(True)
    try:
        part = write_part(trainer.optimizer, partial, process=process, processes=ranks.world_size())
        for name in part:
            _flush(partial / name)
    except OSError as error:
        failure = f"process {process}: {reason_of(error)}"
    trainer.saving(False)
    agreement.wait_for_all()  # a disk may be much slower than another, and a collective has a time limit
    everyone = agreement.gather_objects((failure, part))
    failure = next((theirs for theirs, _ in everyone if theirs), None)
    if failure is not None and ranks.is_main_process():
        _remove_unfinished(partial.parent)
    return failure, {name: about for _, theirs in everyone for name, about in theirs.items()}


def _write(
    trainer: Any,
    partial: Path,
    states: list[dict[str, Any]],
    record: dict[str, Any],
    parts: dict[str, Any],
) -> None:
    step, checkpoints = trainer.state.global_step, partial.parent
    final = checkpoints / f"step-{step}"
    with disk_errors():
        method_of(trainer.model).save(trainer.model, partial)
        trainer.describe_adapter(partial)
        if not trainer.args.save_only_model:
            trainer._save_optimizer_and_scheduler(str(partial))
            trainer._save_scaler(str(partial))
            torch.save(states, partial / STATES)
            if trainer.share.cursor is not None:
                save_cursor(partial, trainer.share.cursor())
    check_adapter(partial, trainer.model)
    _save_trainer_state(trainer, partial)
    about = {"step": step, "processes": len(states), "resumable": not trainer.args.save_only_model}
    write_manifest(partial, about | record, parts)
    for path in partial.rglob("*"):
        _flush(path)
    if final.exists():
        # A folder cannot replace a full one in one move: the old one steps aside first.
        aside = checkpoints / f".step-{step}.old"
        final.rename(aside)
    partial.rename(final)
    _flush(checkpoints)
    _remove_unfinished(checkpoints)
    _rotate(checkpoints, step, trainer.args.save_total_limit, trainer.state.best_model_checkpoint)


def _save_trainer_state(trainer: Any, folder: Path) -> None:
    from transformers.trainer_callback import ExportableState

    for callback in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(callback, ExportableState):
            trainer.state.stateful_callbacks[type(callback).__name__] = callback.state()
    trainer.state.save_to_json(str(folder / "trainer_state.json"))


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if path.is_file():  # some network file systems refuse for folders; the rename is still ordered
            raise
    finally:
        os.close(handle)


def _remove_unfinished(checkpoints: Path) -> None:
    for path in checkpoints.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def _rotate(checkpoints: Path, step: int, limit: int | None, best: str | None) -> None:
    for path in checkpoints.glob(f"{_REPLACED}*"):
        if int(path.name.removeprefix(_REPLACED)) <= step:
            shutil.rmtree(path, ignore_errors=True)
    if not limit:
        return
    folders = step_folders(checkpoints)
    keep = {path for _, path in folders[-limit:]}
    if best is not None:
        keep.add(Path(best))
        if len(keep) > limit and limit > 1:
            keep.discard(min(keep - {Path(best)}, key=lambda path: int(path.name.split("-")[1])))
    for _, path in folders:
        if path not in keep:
            shutil.rmtree(path, ignore_errors=True)
