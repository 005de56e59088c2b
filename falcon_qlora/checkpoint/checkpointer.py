"""A run's checkpoints: when one is due, how it is written, which is the best.

A folder with a checkpoint's final name is always complete. The main process writes all of it: one disk, one
failure, and only the outcome to agree on. After a step it queues a copy of what is saved to host memory. A
thread writes and checks the copy while training goes on. Training waits for the save if the host has no
memory for the copy.

With a sharded model each process's thread writes its part of the optimizer state, which is larger than the
rest. The main process's thread writes the rest, and waits for the others before the folder gets its name.
"""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from falcon_qlora.checkpoint import write
from falcon_qlora.checkpoint.adapter_check import AdapterFaultError
from falcon_qlora.checkpoint.content import Content, Filling, Moment, content_of
from falcon_qlora.checkpoint.host_copy import HostCopies, tensors_in
from falcon_qlora.checkpoint.manifest import fault
from falcon_qlora.checkpoint.optimizer_parts import own_part, write_part
from falcon_qlora.common.errors import UserError, reason_of
from falcon_qlora.common.files import flush, put_in_place
from falcon_qlora.common.host_memory import free_host_bytes
from falcon_qlora.common.quantities import sized
from falcon_qlora.methods.interface import method_of
from falcon_qlora.models.sharded import is_sharded, take_part, whole_bytes, whole_tensors
from falcon_qlora.processes import agreement, ranks
from falcon_qlora.processes.endings import sibling_died
from falcon_qlora.processes.watchdog import WRITER
from falcon_qlora.terminal.console import note

# The share of the host's free memory that the copy may take.
_MOST_OF_FREE = 0.5
# For the other processes' parts, once this one has met an error.
_PATIENCE_SECONDS = 5.0


@dataclass(eq=False)
class Checkpointer:
    """Writes a run's checkpoints whole or not at all; every process has one and calls it.

    Args:
        folder: the run's ``checkpoints/``.
        describe_adapter: completes an adapter's folder after it is written; may run on a thread.
        record: what every manifest says besides the step and the number of processes.
        on_saved: called with a checkpoint's folder once it is complete, perhaps on a thread, or once the run
            has resumed from it.
        at: gets the step, the phase and what is being done; see `Watchdog.at`.
        every_minutes: save when this long has passed since the last save; 0: never.
        limit: how many are kept, the best included; 1: the newest and the best; None: all.
        weights_only: leave out what resuming needs.
        address: of the run, for messages; None: it has none.

    Attributes:
        saved_step: of the newest checkpoint that was tried or resumed from.
        failure: why the newest settled checkpoint could not be written, or None.
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
    address: str | None = None
    saved_step: int = field(default=-1, init=False)
    failure: str | None = field(default=None, init=False)
    # Whether a save is not settled yet, the same on all processes.
    _open: bool = field(default=False, init=False)
    _goes_on: bool = field(default=True, init=False)  # after the newest save
    # With replicas, the main process alone uses the rest.
    _copies: HostCopies = field(default_factory=HostCopies, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)
    _deadline: float = field(default=math.inf, init=False)
    _error: BaseException | None = field(default=None, init=False)
    _too_large: str | None = field(default=None, init=False)
    _whole_step: int = field(default=-1, init=False)
    _filling: Filling = field(init=False)
    # Set while no thread reads the model's modules.
    _unread: threading.Event = field(default_factory=threading.Event, init=False)
    # Of the newest save, whose copies stay as they are until the next.
    _trained: Mapping[str, Tensor] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._unread.set()
        self._filling = Filling(self.describe_adapter, self.record)
        self.start_clock()

    def start_clock(self) -> None:
        """Restart the clock that `is_due` reads."""
        self._since = time.monotonic()

    def is_due(self) -> bool:
        """Whether the clock asks for a save, which restarts it; True on the main process only."""
        if not self.every_minutes or not ranks.is_main_process():
            return False
        if time.monotonic() - self._since < 60 * self.every_minutes:
            return False
        self.start_clock()
        return True

    def goes_on_from(self, step: int) -> None:
        """Count the checkpoint that the run resumed from as the last complete one."""
        self.saved_step = self._whole_step = step
        if ranks.is_main_process():
            self.on_saved(self.checkpoint(step))

    def checkpoint(self, step: int) -> Path:
        return self.folder / f"step-{step}"

    def last_complete(self) -> str:
        """See `write.last_complete`."""
        return write.last_complete(self.folder, self.address)

    def reserve(self, model: nn.Module, optimizer: Any) -> None:
        """Allocate memory for the copies on a thread: pinning it takes a second, in which the GPU would wait.

        Sharded models and hosts without room are left to `save`.

        Args:
            optimizer: once it has taken a step.
        """
        if not ranks.is_main_process() or is_sharded(model) or not torch.cuda.is_available():
            return
        trained = method_of(model).trained_state(model)
        state = {} if self.weights_only else optimizer.state_dict()
        sizes = [tensor.nbytes for tensor in tensors_in([trained, state])]
        if self._copies.more_bytes(sizes) <= _MOST_OF_FREE * free_host_bytes():
            threading.Thread(target=self._copies.reserve, args=(sizes,), daemon=True).start()

    def save(self, moment: Moment) -> None:
        """Write ``step-N`` with the adapter, optimizer, schedule, every process's state and the trainer's.

        The folder is filled under another name, checked, described by a manifest, flushed to the disk and
        renamed. Only then are the oldest beyond the limit removed, never the best. `settle` returns the
        outcome; call it before the next save.

        Raises:
            UserError: if the replicas diverged.
        """
        assert not self._open
        step, model = moment.step, moment.model
        self.saved_step, self._open, self._error = step, True, None
        self._goes_on, self._trained = moment.goes_on, None
        self.start_clock()
        self._arrive(step, writes=ranks.is_main_process())
        if not is_sharded(model):
            trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
            write.require_same_replicas(trained, self.last_complete, step=step)
        processes = agreement.gather_objects(moment.process)
        if moment.state.best_global_step == step:
            moment.state.best_model_checkpoint = str(self.checkpoint(step))
        if is_sharded(model):
            self._begin_sharded(moment, processes)
        elif ranks.is_main_process():
            self._try(lambda: self._begin(moment, processes), step)

    def settle(self, step: int) -> int | None:
        """Wait until the checkpoint being written is complete or has failed.

        Every process calls this at the same places. If training goes on, a failure was printed by then.

        Args:
            step: that the run has reached.

        Returns:
            The step of a checkpoint that could not be written (disk full, folder not writable); earlier ones
            are untouched. None if it was written, or if there was none.

        Raises:
            UserError: if what was written is not what was in memory; it is not kept. On the main process,
                see `from_main_process`.
            Exception: on a process whose thread met one.
        """
        if not self._open:
            return None
        self._arrive(step, writes=self._thread is not None)
        self.join()
        self._arrive(step, writes=ranks.is_main_process())
        if not ranks.is_main_process():
            self.require_kept()
        self.failure, self._open = agreement.from_main_process(self.require_kept), False
        return None if self.failure is None else self.saved_step

    def trained_state(self, step: int) -> Mapping[str, Tensor] | None:
        """What was trained, as the save of this step copied it to the host's memory; None if none did."""
        if self.saved_step != step or self._trained is None:
            return None
        self._copies.wait()
        return self._trained

    def has_failed(self) -> bool:
        """Whether a save failed other than by the disk: the run must end. Known on this process alone."""
        return self._error is not None and not isinstance(self._error, OSError)

    def unsaved(self) -> str:
        """Since which step nothing was saved, if the last save failed; else empty. On this process alone."""
        if not isinstance(self._error, OSError):
            return ""
        return "nothing saved" if self._whole_step < 0 else f"nothing saved since step {self._whole_step:,}"

    def _beside(self, work: Callable[[], object]) -> None:
        """Run `work` on a thread while training goes on."""

        def read_and_write() -> None:
            try:
                work()
            finally:
                self._unread.set()

        self._unread.clear()
        self._thread = threading.Thread(target=read_and_write, name=WRITER, daemon=True)
        self._thread.start()

    def wait_until_unread(self) -> None:
        """Wait until the save under way has no more use for the model's modules, which may change then."""
        self._unread.wait()

    def join(self, *, failing: bool = False) -> None:
        """Wait for what this process is writing, however the run ends.

        Args:
            failing: whether the run ends by an error; others may never write their parts then.
        """
        if failing:
            self._deadline = time.monotonic() + _PATIENCE_SECONDS
        if self._thread is not None:
            self._thread.join()

    def require_kept(self) -> str | None:
        """Wait for what this process is writing; like `settle`, for this process alone.

        Returns:
            Why it could not be written, or None.
        """
        self.join()
        if self._error is None or isinstance(self._error, OSError):
            return None if self._error is None else reason_of(self._error, self._partial(self.saved_step))
        raise self._error

    def _try(self, work: Callable[[], None], step: int) -> None:
        """Run a part of a save and keep its error for `settle`."""
        try:
            work()
        except OSError as error:
            self._error = error
            write.remove_unfinished(self.folder)
            if self._goes_on:  # else the run's end tells
                why = reason_of(error, self._partial(step))
                told = f"step {step:,}: the checkpoint could not be saved ({why})"
                kept = "; earlier checkpoints are untouched" if self._whole_step >= 0 else ""
                note(f"{told}. The training goes on until the next save{kept}")
        except AdapterFaultError as error:
            write.remove_unfinished(self.folder)
            self._error = UserError(write.not_kept(error, self.last_complete(), step=step))
        except Exception as error:
            self._error = error

    def _begin(self, moment: Moment, processes: list[dict[str, Any]]) -> None:
        """Copy what is to be saved and start writing it."""
        partial = self._partial(moment.step)
        write.begin(partial)
        model = moment.model
        trained = method_of(model).trained_state(model)
        optimizer = {} if self.weights_only else moment.optimizer.state_dict()
        told_before = self._too_large is not None
        sizes = (tensor.nbytes for tensor in tensors_in([trained, optimizer]))
        if fits := self.too_large(self._copies.more_bytes(sizes)) is None:
            trained, optimizer = self._copies.take((trained, optimizer))
        elif not told_before:
            note(str(self._too_large))
        self._trained = trained if fits else None
        content = self._content(moment, processes, trained if fits else None, optimizer)
        if fits:
            self._beside(lambda: self._try(lambda: self._make(content), moment.step))
        else:
            self._make(content)

    def _begin_sharded(self, moment: Moment, processes: list[dict[str, Any]]) -> None:
        """Copy what is to be saved and start writing it, on every process."""
        step, model, partial = moment.step, moment.model, self._partial(moment.step)
        main = ranks.is_main_process()
        if main:
            self._try(lambda: write.begin(partial), step)
        failed, meeting = agreement.from_main_process(lambda: (self._error is not None, uuid.uuid4().hex))
        if failed:
            return
        part = {} if self.weights_only else own_part(moment.optimizer)
        trained = None
        if fits := self._all_fit(part, model):
            wholes = whole_tensors(model, wanted=False)
            part, trained = self._copies.take((part, wholes if main else {}))
            if not main:
                take_part(model)
        content = self._content(moment, processes, trained, None) if main else None

        def write_parts() -> None:
            self._write_part(part, partial, meeting)
            if content is not None:
                content.parts.update(self._parts_of(meeting))

        def write_all() -> None:
            write_parts()
            if content is not None:
                self._make(content)

        if fits:
            self._beside(lambda: self._try(write_all, step))
            return
        self._arrive(step, writes=True)
        self._try(write_parts, step)
        self._arrive(step, writes=main)
        if agreement.from_main_process(lambda: self._error is not None):
            return
        if content is not None:
            self._try(lambda: self._make(content), step)
        else:
            take_part(model)
        agreement.wait_for_all()

    def too_large(self, needed: int) -> str | None:
        """Why this process's host has no room for a copy of `needed` bytes, or None.

        After the first refusal no copy is made in this run.
        """
        free = free_host_bytes()
        if self._too_large is None and needed > _MOST_OF_FREE * free:
            self._too_large = (
                f"training waits for every save: copying what is saved needs {sized(needed)} of host memory, "
                f"at most half of what is free; {sized(free)} are"
            )
        return self._too_large

    def _content(
        self,
        moment: Moment,
        processes: list[dict[str, Any]],
        trained: Mapping[str, Tensor] | None,
        optimizer: dict[str, Any] | None,
    ) -> Content:
        return content_of(
            moment,
            processes,
            self._partial(moment.step),
            trained=trained,
            optimizer=optimizer,
            weights_only=self.weights_only,
        )

    def find_best(self, step: int) -> Path | None:
        """The best checkpoint, by its step as the folder may have moved; None if it is no longer complete."""
        best = self.checkpoint(step)
        wrong = fault(best)
        if wrong is None:
            return best
        note(f"{best}, the best so far, is not whole ({wrong}): the best of the steps to come is kept")
        return None

    def _arrive(self, step: int, *, writes: bool) -> None:
        """Tell the watchdog that this process writes a checkpoint, or waits for one that does."""
        self.at(step, 6 if writes else 7, "saving a checkpoint" if writes else "awaiting the save")

    def _partial(self, step: int) -> Path:
        return self.folder / f".step-{step}.partial"

    def _all_fit(self, part: dict[str, Any], model: nn.Module) -> bool:
        """Whether every host has room for its processes' copies; the main process tells the first time."""
        told_before = self._too_large is not None
        sizes = [tensor.nbytes for tensor in tensors_in(part)]
        if ranks.is_main_process():
            sizes += whole_bytes(model).values()
        needed = agreement.gather_objects(self._copies.more_bytes(sizes))
        on_this_host = ranks.local_world_size()
        first = ranks.process_index() // on_this_host * on_this_host
        reasons = agreement.gather_objects(self.too_large(sum(needed[first : first + on_this_host])))
        self._too_large = next(filter(None, reasons), None)
        if self._too_large is not None and not told_before and ranks.is_main_process():
            note(self._too_large)
        return self._too_large is None

    def _write_part(self, part: dict[str, Any], partial: Path, meeting: str) -> None:
        """Write this process's part of the optimizer state, and leave word for the main process."""
        process, about, failure = ranks.process_index(), {}, None
        try:
            if part:
                self._copies.wait()
                about = write_part(part, partial, process=process, processes=ranks.world_size())
                for name in about:
                    flush(partial / name)
        except Exception as error:
            failure = f"rank {process}: {reason_of(error, partial)}"
            if not isinstance(error, OSError):
                raise
        finally:
            agreement.leave_word(meeting, (failure, about))

    def _parts_of(self, meeting: str) -> dict[str, Any]:
        """The manifest's entries for all parts, once every process has written its own."""
        everyone = agreement.words_left(meeting, give_up=self._is_hopeless)
        if failure := next((theirs for theirs, _ in everyone if theirs), None):
            raise OSError(0, failure)
        return {name: about for _, theirs in everyone for name, about in theirs.items()}

    def _is_hopeless(self) -> bool:
        return sibling_died() or time.monotonic() > self._deadline

    def _make(self, content: Content) -> None:
        self._write(content)
        self._whole_step = content.step
        self.on_saved(self.checkpoint(content.step))

    def _write(self, content: Content) -> None:
        """Fill the folder, check it and give it its final name."""
        self._copies.wait()
        self._filling.fill(content, model_is_free=self._unread.set)
        put_in_place(content.partial, self.checkpoint(content.step))
        write.rotate(self.folder, content.step, self.limit, content.best)
