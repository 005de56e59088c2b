"""Bringing a run from its address to this machine, to go on with it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from falcon_qlora.checkpoint import manifest
from falcon_qlora.checkpoint.manifest import MANIFEST
from falcon_qlora.checkpoint.process_state import TRAINER_STATE
from falcon_qlora.common.by_url import MARK, mark_of, steps_at, steps_here
from falcon_qlora.common.errors import UserError
from falcon_qlora.common.files import put_in_place, replaced_folder
from falcon_qlora.common.stores import File, Store, StoreError
from falcon_qlora.common.untrusted import read_json
from falcon_qlora.run_folder.directory import RunDirectory
from falcon_qlora.run_folder.lock import LOCK
from falcon_qlora.terminal.console import note


def bring_run(directory: RunDirectory) -> None:
    """Have the folder here be as far as the run at its address: its newest whole checkpoint, and its records.

    What is here stays if it is as far, or further. If it is of another run, it is set aside.

    Raises:
        UserError: if the store does not answer and there is nothing here to go on from.
    """
    assert directory.address is not None
    store, folder = Store(directory.address), directory.path
    try:
        found = store.files()
        _set_aside_another(store, found, folder)
        here = steps_here(folder)
        for step in reversed(steps_at(found)):
            if here and here[-1] >= step:
                return
            if _bring(store, found, folder, step):
                _bring_best(store, found, folder, step)
                _bring_records(store, found, directory)
                return
    except StoreError as error:
        if not steps_here(folder):
            raise UserError(f"--output_dir {store.address}: cannot be reached ({error})") from None
        note(f"{store.address} cannot be reached ({error}): going on from what is in {folder}")


def is_here(checkpoint: Path, content: bytes) -> bool:
    """Whether a checkpoint is whole, and has this manifest."""
    file = checkpoint / MANIFEST
    return file.is_file() and file.read_bytes() == content and manifest.fault(checkpoint) is None


def bring_checkpoint(address: str, folder: Path, step: int, content: bytes) -> Path:
    """The folder here of a checkpoint that another node goes on from.

    Args:
        folder: of the run, here.
        content: of the checkpoint's manifest, as that node has it.

    Raises:
        UserError: if it is not at the address.
    """
    checkpoint, store = folder / "checkpoints" / f"step-{step}", Store(address)
    try:
        if not is_here(checkpoint, content):
            _bring(store, store.files(), folder, step)
    except StoreError as error:
        raise UserError(f"--resume: {address}: {checkpoint.name} cannot be had ({error})") from None
    if is_here(checkpoint, content):
        return checkpoint
    raise UserError(f"--resume: {address} has no whole {checkpoint.name} as the first node has it")


def _set_aside_another(store: Store, found: dict[str, File], folder: Path) -> None:
    mine = mark_of((folder / MARK).read_bytes).get("run")
    theirs = mark_of(lambda: store.read(MARK)).get("run") if MARK in found else None
    if mine and theirs and mine != theirs:
        aside = folder.with_name(f"{folder.name}-{str(mine)[:8]}")
        aside.mkdir(exist_ok=True)
        for path in folder.iterdir():
            if path.name != LOCK:
                shutil.move(path, aside / path.name)
        note(f"{folder} held another run than {store.address}: it is set aside in {aside}")


def _bring(store: Store, found: dict[str, File], folder: Path, step: int) -> bool:
    """Download a checkpoint; False, with a note, where it is not whole."""
    target = folder / "checkpoints" / f"step-{step}"
    partial = target.with_name(f".step-{step}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    note(f"downloading {store.address}/checkpoints/step-{step}")
    _download(store, found, f"checkpoints/step-{step}/", partial)
    wrong = manifest.fault(partial)
    if wrong is not None:
        shutil.rmtree(partial, ignore_errors=True)
        note(f"{store.address}/checkpoints/step-{step} is skipped: {wrong}")
        return False
    put_in_place(partial, target)
    return True


def _bring_best(store: Store, found: dict[str, File], folder: Path, step: int) -> None:
    """The best checkpoint so far too, which the run may return to."""
    best: Any = read_json(folder / f"checkpoints/step-{step}" / TRAINER_STATE, not_finite=True)
    best = best.get("best_global_step")
    if best != step and best in steps_at(found) and best not in steps_here(folder):
        _bring(store, found, folder, best)


def _bring_records(store: Store, found: dict[str, File], directory: RunDirectory) -> None:
    for name in found:
        if name in directory.names() or name == MARK:
            store.get(name, directory.path / name)
    if f"adapter/{MANIFEST}" in found:
        with replaced_folder(directory.adapter) as partial:
            _download(store, found, "adapter/", partial)


def _download(store: Store, found: dict[str, File], top: str, target: Path) -> None:
    for name in found:
        if name.startswith(top):
            store.get(name, target / name.removeprefix(top))
