"""A run's checkpoints: when one is due, how it is written, which is the best.

A folder with a checkpoint's final name is always complete. The main process writes all of it: one disk, one
failure, and nothing to agree on but the outcome. Of a sharded model each process first writes its part of the
optimizer's state, which is more than the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from falcon_qlora.checkpoint import process_state, write
from falcon_qlora.checkpoint.adapter_check import AdapterFaultError, check_adapter
from falcon_qlora.checkpoint.manifest import fault, write_manifest
from falcon_qlora.checkpoint.optimizer_parts import write_part
from falcon_qlora.common.errors import UserError, reason_of
from falcon_qlora.common.files import flush, put_in_place
from falcon_qlora.methods.interface import method_of
from falcon_qlora.models.sharded import is_sharded, take_part
from falcon_qlora.processes import agreement, ranks
from falcon_qlora.terminal.console import note

if TYPE_CHECKING:
    from transformers import TrainerState


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a checkpoint is made of, as one process has it after an optimizer step.

    Attributes:
        model: with a method attached.
        optimizer: over its trainable parameters.
        scheduler: of the learning rate.
        scaler: of gradients in fp16, or None.
        state: Transformers' record of the run; `best_model_checkpoint` is set where this is the best.
        process: what this process must remember beside them.
        cursor: where a stream's next step begins; None where there is no stream.
    """

    model: nn.Module
    optimizer: Any
    scheduler: Any
    scaler: Any
    state: TrainerState
    process: dict[str, Any]
    cursor: Callable[[], dict[str, Any]] | None

    @property
    def step(self) -> int:
        return self.state.global_step


@dataclass(eq=False)
class Checkpointer:
    """Writes a run's checkpoints whole or not at all; every process has one and calls it.

    Args:
        folder: the run's ``checkpoints/``.
        describe_adapter: called with an adapter's folder after it is written, to complete it.
        record: what every manifest says besides the step and the number of processes.
        on_saved: called with a checkpoint's folder once it is whole.
        at: told the step, the phase and what is done there; see `Watchdog.at`.
        every_minutes: save whenever so long has passed since the last time; 0: never.
        limit: how many are kept beside the best one; None: all.
        weights_only: leave out what a run needs to go on.

    Attributes:
        saved_step: of the newest checkpoint that was tried, or gone on from.
        failure: why that could not be written, or None.
    """

    folder: Path
    _: KW_ONLY
    describe_adapter: Callable[[Path], None]
    record: dict[str, Any]
    on_saved: Callable[[Path], None]
    at: Callable[[int, int, str], None]
    every_minutes: float = 0.0
    limit: int | None = None
    weights_only: bool = False
    saved_step: int = field(default=-1, init=False)
    failure: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.start_clock()

    def start_clock(self) -> None:
        """Count the time to the next save from here."""
        self._since = time.monotonic()

    def is_due(self) -> bool:
        """Whether the clock asks for a save, on the main process."""
        if not self.every_minutes or not ranks.is_main_process():
            return False
        if time.monotonic() - self._since < 60 * self.every_minutes:
            return False
        self.start_clock()
        return True

    def checkpoint(self, step: int) -> Path:
        return self.folder / f"step-{step}"

    def save(self, snapshot: Snapshot) -> bool:
        """Write ``step-N`` with the adapter, optimizer, schedule, every process's state and the trainer's.

        The folder is filled under another name, described by a manifest, flushed to the disk and renamed.
        Only then the oldest beyond the limit go, never the best one. Where it cannot be written (the disk is
        full, the folder cannot be written) that is said, and what was there before is untouched.

        Returns:
            Whether it was written.

        Raises:
            UserError: if the processes' replicas differ, or if what then lies there is not what is in memory;
                it is not kept.
        """
        self._arrive(snapshot.step, writes=ranks.is_main_process())
        self.failure = self._save(snapshot)
        self.saved_step = snapshot.step
        self.start_clock()
        if self.failure is None:
            self.on_saved(self.checkpoint(snapshot.step))
            return True
        note(
            f"step {snapshot.step}: the checkpoint could not be saved ({self.failure}). The training "
            "goes on and the next save is tried; earlier checkpoints are untouched"
        )
        return False

    def find_best(self, step: int) -> Path | None:
        """The best checkpoint by its step: the folder may have been moved, or something happened to it."""
        best = self.checkpoint(step)
        wrong = fault(best)
        if wrong is None:
            return best
        note(f"{best}, the best so far, cannot be kept ({wrong}): the best from here on is")
        return None

    def _arrive(self, step: int, *, writes: bool) -> None:
        """This process writes to a checkpoint, or waits for another that does."""
        self.at(step, 6 if writes else 7, "saving a checkpoint" if writes else "awaiting the save")

    def _save(self, snapshot: Snapshot) -> str | None:
        model, state = snapshot.model, snapshot.state
        if not is_sharded(model):
            trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
            write.require_same_replicas(trained, self.folder, step=snapshot.step)
        processes = agreement.gather_objects(snapshot.process)
        if state.best_global_step == snapshot.step:
            state.best_model_checkpoint = str(self.checkpoint(snapshot.step))
        partial = self.folder / f".step-{snapshot.step}.partial"
        failure = self._on_main_process(lambda: write.begin(partial), snapshot.step)
        parts: dict[str, Any] = {}
        if failure is None and is_sharded(model) and not self.weights_only:
            failure, parts = self._write_parts(snapshot, partial)
        if failure is None:
            self._arrive(snapshot.step, writes=ranks.is_main_process())
            if is_sharded(model) and not ranks.is_main_process():
                take_part(model)
            failure = self._on_main_process(
                lambda: self._write(snapshot, partial, processes, parts), snapshot.step
            )
        return failure

    def _on_main_process(self, work: Callable[[], None], step: int) -> str | None:
        """Run `work` on the main process; return why the disk did not do it, or None, on all alike."""

        def try_to() -> str | None:
            try:
                work()
            except OSError as error:
                write.remove_unfinished(self.folder)
                return reason_of(error)
            except AdapterFaultError as error:
                write.remove_unfinished(self.folder)
                raise UserError(write.not_kept(error, self.folder, step=step)) from None
            return None

        return agreement.from_main_process(try_to)

    def _write_parts(self, snapshot: Snapshot, partial: Path) -> tuple[str | None, dict[str, Any]]:
        """Write the optimizer's state, each process its own part.

        Returns:
            Why that failed on one of them, or None; what the manifest says of the parts. On all alike.
        """
        process, failure, part = ranks.process_index(), None, {}
        self._arrive(snapshot.step, writes=True)
        try:
            part = write_part(snapshot.optimizer, partial, process=process, processes=ranks.world_size())
            for name in part:
                flush(partial / name)
        except OSError as error:
            failure = f"process {process}: {reason_of(error)}"
        self._arrive(snapshot.step, writes=False)
        # A disk may be much slower than another, and a collective has a time limit.
        agreement.wait_for_all()
        everyone = agreement.gather_objects((failure, part))
        failure = next((theirs for theirs, _ in everyone if theirs), None)
        if failure is not None and ranks.is_main_process():
            write.remove_unfinished(self.folder)
        return failure, {name: about for _, theirs in everyone for name, about in theirs.items()}

    def _write(
        self, snapshot: Snapshot, partial: Path, processes: list[dict[str, Any]], parts: dict[str, Any]
    ) -> None:
        """Fill the folder, check it and give it its name; on the main process."""
        with write.disk_errors():
            method_of(snapshot.model).save(snapshot.model, partial)
            self.describe_adapter(partial)
            if not self.weights_only:
                if not parts:
                    torch.save(snapshot.optimizer.state_dict(), partial / process_state.OPTIMIZER)
                torch.save(snapshot.scheduler.state_dict(), partial / process_state.SCHEDULER)
                if snapshot.scaler is not None:
                    torch.save(snapshot.scaler.state_dict(), partial / process_state.SCALER)
                torch.save(processes, partial / process_state.STATES)
                if snapshot.cursor is not None:
                    process_state.save_cursor(partial, snapshot.cursor())
        check_adapter(partial, snapshot.model)
        snapshot.state.save_to_json(str(partial / process_state.TRAINER_STATE))
        about = {"step": snapshot.step, "processes": len(processes), "resumable": not self.weights_only}
        write_manifest(partial, about | self.record, parts)
        put_in_place(partial, self.checkpoint(snapshot.step))
        write.rotate(self.folder, snapshot.step, self.limit, snapshot.state.best_model_checkpoint)
