"""Writing a checkpoint so that a folder with its final name is always complete."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from falcon_qlora.methods.interface import method_of
from falcon_qlora.models.sharded import is_sharded, take_part

_NAME = re.compile(r"step-(\d+)$")


def step_folders(checkpoints: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints in a folder, by step, oldest first."""
    found = [(int(m.group(1)), path) for path in checkpoints.glob("step-*") if (m := _NAME.search(path.name))]
    return sorted(found)


def save_checkpoint(trainer: Any, checkpoints: Path) -> Path:
    """Write ``step-N`` with the adapter, optimizer, schedule, random states and trainer state.

    Every process writes its random state; the main process the rest. The folder is filled under another
    name and renamed when all are done, then the oldest beyond `save_total_limit` go, never the best one.

    Args:
        trainer: a Transformers Trainer after an optimizer step.
        checkpoints: the folder to write into.
    """
    state = trainer.state
    final = checkpoints / f"step-{state.global_step}"
    partial = checkpoints / f".step-{state.global_step}.partial"
    main = trainer.accelerator.is_main_process
    if main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    trainer.accelerator.wait_for_everyone()
    if main:
        method_of(trainer.model).save(trainer.model, partial)
        trainer.describe_adapter(partial)
    elif is_sharded(trainer.model):
        take_part(trainer.model)
    if not trainer.args.save_only_model:
        trainer._save_optimizer_and_scheduler(str(partial))
        trainer._save_scaler(str(partial))
        trainer._save_rng_state(str(partial))
    if state.best_global_step == state.global_step:
        state.best_model_checkpoint = str(final)
    if main:
        _save_state(trainer, partial)
    trainer.accelerator.wait_for_everyone()
    if main:
        _flush(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _rotate(checkpoints, trainer.args.save_total_limit, state.best_model_checkpoint)
    return final


def restore_adapter(model: Any, folder: Path) -> None:
    """Put a checkpoint's trained weights into `model`.

    Raises:
        RuntimeError: if the folder's are others than the model's.
    """
    method_of(model).restore(model, folder)


def _save_state(trainer: Any, folder: Path) -> None:
    from transformers.trainer_callback import ExportableState

    for callback in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(callback, ExportableState):
            name, exported = type(callback).__name__, callback.state()
            known = trainer.state.stateful_callbacks.get(name)
            if isinstance(known, list):
                known.append(exported)
            else:
                trainer.state.stateful_callbacks[name] = exported
    trainer.state.save_to_json(str(folder / "trainer_state.json"))


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _rotate(checkpoints: Path, limit: int | None, best: str | None) -> None:
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
