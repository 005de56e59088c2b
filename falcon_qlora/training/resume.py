"""Resuming a run: from which checkpoint, or why it is refused."""

from __future__ import annotations

import socket
from pathlib import Path

from falcon_qlora.checkpoint import manifest
from falcon_qlora.checkpoint.bring import bring_checkpoint, is_here
from falcon_qlora.checkpoint.mirror import Mirror
from falcon_qlora.checkpoint.process_state import load_states
from falcon_qlora.checkpoint.resume import check_trainer_state
from falcon_qlora.checkpoint.write import set_aside_after
from falcon_qlora.common.by_url import local_folder
from falcon_qlora.common.errors import UserError
from falcon_qlora.common.files import quoted
from falcon_qlora.common.record_files import AUTO, LATEST
from falcon_qlora.common.untrusted import is_count, refuse_links
from falcon_qlora.methods.adapter_folder import RECORD, read_record
from falcon_qlora.methods.table import is_whole
from falcon_qlora.processes import agreement, launcher, ranks
from falcon_qlora.run_folder.directory import RunDirectory
from falcon_qlora.terminal.console import note
from falcon_qlora.training.same_run import not_what_training_wrote

# For the other nodes, which wait.
_UPLOAD_SECONDS = 60.0


def checkpoint_to_resume(directory: RunDirectory, *, resume: str | None, overwrite: bool) -> str | None:
    """The checkpoint to resume from, verified, or None for a run from the start.

    One that is incomplete or altered is named and skipped for the one before.

    Raises:
        UserError: if there is none to resume from, or the one that was named cannot be resumed; with
            `AUTO`, if the run is finished and kept none.
    """
    restarted = ranks.restart_count() > 0
    if not resume and not restarted:
        return None
    named = None
    if resume and resume not in (LATEST, AUTO) and Path(resume).parent.name == "checkpoints":
        named = Path(resume)
    if restarted and _is_of_this_launch(directory):
        named = None  # this launch has come further
    elif restarted and overwrite:
        return None  # it failed before it replaced the old run
    found = agreement.from_main_process(lambda: _find(directory, named))
    if found is not None and directory.address is not None:
        found = _on_this_node(directory, directory.address, step_of(found))
    elif found is not None:
        _require_on_all_nodes(found)
    if found is None and resume and not restarted:
        agreement.from_main_process(lambda: _check_may_begin(directory, resume))
    return found


def is_done(directory: RunDirectory, checkpoint: str | None, total_steps: int) -> bool:
    """Whether the run to resume is trained, and its adapter whole; the same on all processes."""

    def look() -> bool:
        if not directory.summary_file.is_file() or manifest.fault(directory.adapter) is not None:
            return False
        return directory.read("summary").get("steps") == total_steps

    at_the_end = checkpoint is not None and Path(checkpoint).name == f"step-{total_steps}"
    return at_the_end and agreement.from_main_process(look)


def _on_this_node(directory: RunDirectory, address: str, step: int) -> str:
    """The checkpoint as this node has it; by way of the address where it is on the first one alone."""
    folder = local_folder(address)
    here = folder / "checkpoints" / f"step-{step}"
    content = agreement.from_main_process(lambda: (here / manifest.MANIFEST).read_bytes())
    if not all(agreement.met_by_all(is_here(here, content))):
        agreement.from_main_process(lambda: _upload_first(directory))
        agreement.main_process_first(lambda: bring_checkpoint(address, folder, step, content))
    return str(here)


def _upload_first(directory: RunDirectory) -> None:
    mirror = Mirror(directory, limit=None, goes_on=True)
    missing = mirror.flush(_UPLOAD_SECONDS)
    mirror.stop()
    if missing is not None:
        raise UserError(f"--resume: other nodes need the checkpoint from there, and {missing}")


def _require_on_all_nodes(checkpoint: str) -> None:
    if ranks.world_size() == ranks.local_world_size():
        return
    there = (Path(checkpoint) / manifest.MANIFEST).is_file()
    everyone = agreement.met_by_main((socket.gethostname(), there))
    without = list(dict.fromkeys(host for host, there in everyone if not there))

    def refuse() -> None:
        if without:
            raise UserError(
                f"--resume: {Path(checkpoint).absolute()} is not on {', '.join(without)}, and each node "
                "reads it. Put --output_dir on a file system that all nodes share, or copy the folder there"
            )

    agreement.from_main_process(refuse)


def _check_may_begin(directory: RunDirectory, resume: str) -> None:
    if resume != AUTO:
        raise UserError(f"--resume: {directory.name} holds no checkpoint yet; {_another_way(directory)}")
    if directory.adapter.exists():
        raise UserError(
            f"--resume auto: {directory.name} holds a finished run without checkpoints; "
            f"{_another_way(directory)}"
        )


def _another_way(directory: RunDirectory) -> str:
    if directory.holds_what_is_no_runs():
        return "name another folder"
    return "start it again with --overwrite, or name another folder"


def _is_of_this_launch(directory: RunDirectory) -> bool:
    def compare() -> bool:
        newest = manifest.newest_whole(directory.checkpoints)[0]
        return newest is not None and manifest.read_manifest(newest).get("launch") == ranks.launch_id()

    return agreement.from_main_process(compare)


def _find(directory: RunDirectory, named: Path | None) -> str | None:
    if named is not None:
        _refuse_if_not_whole(named)
        return str(named)
    whole, faulty = manifest.newest_whole(directory.checkpoints)
    for path, wrong in faulty:
        note(f"{path} is skipped: {wrong}")
    if whole is None and faulty:
        raise UserError(
            f"--resume: no checkpoint in {directory.checkpoints} is whole; {_another_way(directory)}"
        )
    if whole is None:
        return None
    _refuse_if_not_whole(whole)
    return str(whole)


def _refuse_if_not_whole(checkpoint: Path) -> None:
    if checkpoint.is_dir():
        refuse_links(checkpoint)
    wrong = manifest.fault(checkpoint)
    if wrong is not None:
        other, _ = manifest.newest_whole(checkpoint.parent)
        hint = f"; {other} is whole" if other else ""
        raise UserError(f"--resume {checkpoint}: {wrong}{hint}")
    record = manifest.read_manifest(checkpoint)
    if not record.get("resumable"):
        raise UserError(
            f"--resume {checkpoint}: it was saved with --save_only_model, without the optimizer's state; "
            f"begin a new run from it with {' '.join(map(quoted, _beginning_from(checkpoint)))}"
        )
    check_trainer_state(checkpoint)
    # The same facts from other places.
    known = {"step": int(checkpoint.name.removeprefix("step-")), "processes": len(load_states(checkpoint))}
    for name in ("step", "processes", "global_batch"):
        value = record.get(name)
        if not is_count(value, least=1) or value != known.get(name, value):
            raise not_what_training_wrote(checkpoint, name, value)


def _beginning_from(checkpoint: Path) -> list[str]:
    """The flags by which a run begins from what a checkpoint has trained."""
    record = read_record(checkpoint) if (checkpoint / RECORD).is_file() else {}
    if not is_whole(record):
        return ["--adapter", str(checkpoint)]
    tokenizer = record.get("tokenizer") or record.get("base_model")
    return ["-m", str(checkpoint), *(["--tokenizer_name_or_path", tokenizer] if tokenizer else [])]


def forget_after(directory: RunDirectory, step: int) -> None:
    """Cut the run's records back to `step`: later steps are done again. On the main process."""
    directory.drop_metrics_after(step)
    for path in set_aside_after(directory.checkpoints, step):
        note(f"{path} is later than step {step:,}: it is set aside until the run reaches it again")


def step_of(checkpoint: str) -> int:
    return int(checkpoint.rstrip("/").rsplit("-", 1)[1])


def how_to_go_on(directory: RunDirectory) -> str:
    """After "go on": with which command, launched as this run was."""
    of_run = ["--config", str(directory.config_file), "--resume", str(directory)]
    if directory.address is not None:
        of_run = ["--resume", directory.address]
    several = ", on every node" if ranks.world_size() > ranks.local_world_size() else ""
    return f"with{several}:  {' '.join(map(quoted, launcher.launched(*of_run)))}"
