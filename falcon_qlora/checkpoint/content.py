"""What a checkpoint holds, and a folder that is filled with it and checked."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from falcon_qlora.checkpoint import process_state, write
from falcon_qlora.checkpoint.adapter_check import check_reading, check_tensors, form_of
from falcon_qlora.checkpoint.manifest import write_manifest
from falcon_qlora.common.files import flush, write_text
from falcon_qlora.methods.interface import method_of

if TYPE_CHECKING:
    from transformers import TrainerState


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What a checkpoint is made from, as one process has it after an optimizer step.

    Attributes:
        model: with a method attached.
        optimizer: over its trainable parameters.
        scheduler: of the learning rate.
        scaler: of gradients in fp16, or None.
        state: Transformers' record of the run; `best_model_checkpoint` is set if this step is the best.
        process: this process's own state, such as its random generators.
        cursor: where a stream's next step begins; None if there is no stream.
        goes_on: whether training goes on after it.
    """

    model: nn.Module
    optimizer: Any
    scheduler: Any
    scaler: Any
    state: TrainerState
    process: dict[str, Any]
    cursor: Callable[[], dict[str, Any]] | None
    goes_on: bool

    @property
    def step(self) -> int:
        return self.state.global_step


@dataclass(frozen=True, kw_only=True)
class Content:
    """What the main process writes. Training no longer changes it, unless `trained` is None.

    Attributes:
        trained: see `Method.trained_state`; None: read from the model.
        files: names of torch files → what they hold.
        parts: the manifest's entries for files that are already written.
        resumable: whether it has what resuming needs.
    """

    step: int
    partial: Path
    model: nn.Module
    trained: Mapping[str, Tensor] | None
    files: dict[str, Any]
    cursor: dict[str, Any] | None
    trainer_state: str
    best: str | None
    processes: int
    parts: dict[str, Any]
    resumable: bool


def content_of(
    moment: Moment,
    processes: list[dict[str, Any]],
    partial: Path,
    *,
    trained: Mapping[str, Tensor] | None,
    optimizer: dict[str, Any] | None,
    weights_only: bool,
) -> Content:
    """What is written of `moment`, given every process's own state, and copies of what training changes.

    Args:
        partial: the folder.
        trained: see `Content`.
        optimizer: its state; None: it is in the parts.
        weights_only: leave out what resuming needs.
    """
    files: dict[str, Any] = {}
    if not weights_only:
        files = {
            process_state.SCHEDULER: copy.deepcopy(moment.scheduler.state_dict()),
            process_state.STATES: processes,
        }
        if optimizer is not None:
            files[process_state.OPTIMIZER] = optimizer
        if moment.scaler is not None:
            files[process_state.SCALER] = moment.scaler.state_dict()
    return Content(
        step=moment.step,
        partial=partial,
        model=moment.model,
        trained=trained,
        files=files,
        cursor=None if moment.cursor is None or weights_only else moment.cursor(),
        trainer_state=json.dumps(dataclasses.asdict(moment.state), indent=2, sort_keys=True) + "\n",
        best=moment.state.best_model_checkpoint,
        processes=len(processes),
        parts={},
        resumable=not weights_only,
    )


@dataclass
class Filling:
    """Fills the folders of one run's checkpoints.

    Args:
        describe_adapter: completes an adapter's folder after it is written; may run on a thread.
        record: what every manifest says besides the content's own.
    """

    describe_adapter: Callable[[Path], None]
    record: dict[str, Any]
    _opened_form: str | None = field(default=None, init=False)

    def fill(self, content: Content, *, model_is_free: Callable[[], None]) -> None:
        """Write all files of an empty folder, check what was trained, and flush them to the disk.

        Args:
            model_is_free: called once the model is no longer read, with an error too.

        Raises:
            OSError: if the disk fails.
            AdapterFaultError: if what was written is not what was to be.
        """
        partial, model = content.partial, content.model
        method_of(model).save(model, partial, content.trained)
        self.describe_adapter(partial)
        about = {"step": content.step, "processes": content.processes, "resumable": content.resumable}
        with ThreadPoolExecutor(3) as beside:  # the reading back, the disk and the hashes
            checked = beside.submit(self._check, content, model_is_free)
            for name, held in content.files.items():
                write.save(held, partial / name)
            if content.cursor is not None:
                process_state.save_cursor(partial, content.cursor)
            write_text(partial / process_state.TRAINER_STATE, content.trainer_state)
            files = [file for file in partial.iterdir() if file.name not in content.parts]
            flushed = [beside.submit(flush, file) for file in files]
            write_manifest(partial, about | self.record, content.parts)
            for each in (checked, *flushed):
                each.result()

    def _check(self, content: Content, model_is_free: Callable[[], None]) -> None:
        """Compare the folder with what was to be written."""
        try:
            check_tensors(content.partial, content.model, content.trained)
            if method_of(content.model).opened_by == "peft":
                form = form_of(content.partial)
                if form != self._opened_form:  # later ones of the same form open likewise
                    check_reading(content.partial, content.model, content.trained)
                    self._opened_form = form
        finally:
            model_is_free()
