"""Making, naming and removing checkpoint folders, so that one with its final name is always complete."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from falcon_qlora.checkpoint.adapter_check import AdapterFaultError
from falcon_qlora.checkpoint.manifest import newest_whole, read_manifest, step_folders
from falcon_qlora.common.errors import UserError, first_line
from falcon_qlora.common.files import quoted
from falcon_qlora.processes import agreement

_REPLACED = "replaced-step-"


def require_same_replicas(tensors: Iterable[Tensor], last: Callable[[], str], *, step: int) -> str:
    """Refuse to save if the replicas have diverged.

    A resumed run loads the saved replica on every process, so nobody would ever notice.

    Args:
        tensors: of this process; every process calls this.
        last: a sentence on the last complete checkpoint; called on the main process.
        step: of the run.

    Returns:
        The checksum that all ranks have.

    Raises:
        UserError: naming the ranks and the last good checkpoint.
    """
    try:
        return agreement.check_replicas(tensors)
    except agreement.ReplicasDifferError as error:
        raise UserError(
            f"step {step:,}: the replicas diverged: {error}. Nothing was saved: check the GPUs of these "
            f"ranks and their memory. {agreement.from_main_process(last)}"
        ) from None


def not_kept(error: AdapterFaultError, last: str, *, step: int) -> str:
    """The message for a saved adapter that is not the one in memory; `last` as from `last_complete`."""
    return f"step {step:,}: what was saved failed its check and was not kept: {error}. {last}"


def not_written(path: Path, failure: str) -> UserError:
    """The error where a trial shows that `path` cannot be written."""
    return UserError(
        f"{path} could not be written ({failure}): make room there, lift what limits it (a quota, "
        "ulimit -f), or name another folder with --output_dir"
    )


def last_complete(checkpoints: Path, address: str | None, *, how: str | None = None) -> str:
    """A sentence that names the last complete checkpoint, and how to go on from it.

    Args:
        checkpoints: the folder of a run's checkpoints.
        address: of the run, if it has one: by it the run goes on there too.
        how: to go on, where the caller knows the whole command: the sentence ends with it.
    """
    whole, _ = newest_whole(checkpoints)
    if whole is None:
        return "There is no complete checkpoint."
    if not read_manifest(whole).get("resumable"):
        return f"The last complete checkpoint is {whole}, weights only: the run cannot be resumed."
    if how is not None:
        return f"The last complete checkpoint is {whole}: {how}"
    how = "resume it with --resume" if address is None else f"go on from it with --resume {quoted(address)}"
    return f"The last complete checkpoint is {whole}: {how}."


def after_bad_rows(checkpoints: Path, address: str | None, *, weights: str) -> list[str]:
    """A sentence on how to go on where a row could not be read; none if this machine has no checkpoint.

    Args:
        checkpoints, address: see `last_complete`.
        weights: the flag that opens a checkpoint's weights in a new run.
    """
    whole, _ = newest_whole(checkpoints)
    if whole is None:
        return []
    last = last_complete(checkpoints, address)
    anew = f"begin a new run with its weights ({weights} {quoted(str(whole))})"
    return [f"{last} Once rows are changed it cannot be resumed: {anew}."]


def save(held: Any, file: Path) -> None:
    """Write tensors as `torch.save` does.

    Raises:
        OSError: if they cannot be written, with the file's name and the system's reason. torch's own writer
            tells neither; of one that writes into a file of Python's, the reason is what its error follows.
    """
    try:
        with file.open("wb") as opened:
            torch.save(held, opened)
    except (RuntimeError, OSError) as error:
        cause: BaseException | None = error
        while cause is not None and not (isinstance(cause, OSError) and cause.errno):
            cause = cause.__context__
        number, why = (0, first_line(error)) if cause is None else (cause.errno, cause.strerror)
        raise OSError(number, why, str(file)) from error


def set_aside_after(checkpoints: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step`, which a run resumed there makes again; return their old paths.

    They stay until the run has passed them, so that nothing is lost before it is replaced.
    """
    remove_unfinished(checkpoints)
    later = [path for number, path in step_folders(checkpoints) if number > step]
    for path in later:
        aside = path.with_name(f"{_REPLACED}{path.name.removeprefix('step-')}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    return later


def begin(partial: Path) -> None:
    """Make the empty folder that becomes a checkpoint."""
    remove_unfinished(partial.parent)
    partial.mkdir(parents=True)


def remove_unfinished(checkpoints: Path) -> None:
    """Remove what unfinished saves have left."""
    for path in checkpoints.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def rotate(checkpoints: Path, step: int, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints beyond `limit` except the best, and those set aside up to `step`."""
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
