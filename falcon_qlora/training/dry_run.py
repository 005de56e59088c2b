"""``train --dry_run``: the run itself in a temporary folder, as one step on its longest batch.

`run._train` is what runs. A `DryRun` changes what it trains on and where it writes, and tries by itself what
a step does not show: each kernel against its plain reference, an all-reduce, and reading back what was saved.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from falcon_qlora.checkpoint import manifest
from falcon_qlora.checkpoint.write import not_written
from falcon_qlora.common.errors import UserError, first_line, message_of
from falcon_qlora.common.files import free_bytes, nearest_existing, temporary_folder
from falcon_qlora.common.quantities import GIB, counted, sized
from falcon_qlora.config import Configuration
from falcon_qlora.data.batches import Share, StreamingSteps, TrainingSteps
from falcon_qlora.models.sharded import is_sharded
from falcon_qlora.processes import agreement, endings, launcher, ranks
from falcon_qlora.run_folder import tracking
from falcon_qlora.run_folder.directory import RunDirectory
from falcon_qlora.run_folder.environment import versions
from falcon_qlora.terminal import console, phases
from falcon_qlora.terminal.console import joined
from falcon_qlora.terminal.phases import phase
from falcon_qlora.training import checks
from falcon_qlora.training.activations import largest_micro_batch, largest_step
from falcon_qlora.training.disk import Needed
from falcon_qlora.training.kernel_check import compare_kernels
from falcon_qlora.training.preflight import Start
from falcon_qlora.training.rows import TrainingData
from falcon_qlora.training.trainer import FalconTrainer

# The run's folder in the temporary one.
_RUN = "run"
# Of a step, however many it has: the second finds the gradients of the first in memory.
_MICRO_BATCHES = 2
# Checks of the summary that a dry run tells, and how it calls them; the others are of whole runs.
_TOLD = {
    "quantized": "quantized",
    "adapter_coverage": "adapter",
    "end_token": "end token",
    "packing": "packing",
    "reopened": "reopened",
}


class DryRun:
    """What a dry run does beside the run; a context in which every failure becomes one of `UserError`.

    Args:
        configuration: of the run.

    Attributes:
        directory: where the run would write; it stays as it is.
    """

    directory: RunDirectory

    def __init__(self, configuration: Configuration):
        self._configuration = configuration
        self._folder: Path | None = None
        self._held = contextlib.ExitStack()
        self._rows: list[tuple[str, str]] = []

    def __enter__(self) -> DryRun:
        phases.now = "start"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        console.console().quiet = not ranks.is_main_process()
        if error is not None and self._folder is not None:
            # The main process may be waiting where no signal reaches it.
            shutil.rmtree(self._folder, ignore_errors=True)
        self._held.close()
        if not isinstance(error, Exception) or isinstance(error, agreement.PeerError):
            return
        told = message_of(error)
        if told is not None and self._folder is not None:  # by where the run would write
            told = told.replace(str(self._folder / _RUN), str(self.directory))
        if told is None:
            if endings.sibling_died():
                return  # it only follows from another process's death
            traceback.print_exception(error, file=sys.stderr)
            told = f"{type(error).__name__}: {first_line(error)}"
        place = ranks.named()
        lines = [f"  {label}: {text}" for label, text in self._rows]
        cause, *more = told.removeprefix("error: ").splitlines()
        raise UserError(f"dry run: {place}, {phases.now}: {cause}", *more, *lines) from error

    def beside(self, start: Start) -> Start:
        """A start whose folder is a temporary one on the same disk, and which nothing tracks."""
        self._configuration.run.generate_samples = self._configuration.run.early_stopping = 0
        training = self._configuration.training
        training.eval_strategy, training.eval_on_start, training.push_to_hub = "no", False, False
        self.directory = start.directory
        with phase("versions"):
            self._compare_versions()

        def make() -> str:
            parent = nearest_existing(start.directory.path).absolute()
            folder = str(self._held.enter_context(temporary_folder(parent)))
            launcher.leave(launcher.DRY_RUN, folder)
            return folder

        self._folder = Path(agreement.from_main_process(make))
        run = str(self._folder / _RUN)
        console.console().quiet = True
        return dataclasses.replace(
            start, directory=RunDirectory(run), trackers=tracking.choose(["none"]), _choose=lambda make: run
        )

    def _compare_versions(self) -> None:
        mine = {ranks.named(): versions()}
        everyone = {name: each for theirs in agreement.met_by_all(mine) for name, each in theirs.items()}
        first, *others = everyone.items()
        for name, each in others:
            for what in first[1].keys() | each.keys():
                if each.get(what) != first[1].get(what):
                    raise UserError(
                        f"{name} has {what} {each.get(what)}, {first[0]} has {first[1].get(what)}: install "
                        "the same on all"
                    )
        told = ", ".join(f"{what} {version}" for what, version in first[1].items())
        self._rows.append(("versions", told + (f": the same on {len(everyone)} ranks" if others else "")))

    def one_step(self, data: TrainingData, *, needed: Needed) -> TrainingData:
        """The data of a run of one step: that with the longest batch; a stream's first."""
        free = free_bytes(self.directory.path)
        self._rows += [
            ("data", _told_data(data)),
            ("disk", f"the run needs {needed}; {sized(free)} are free"),
        ]
        phases.now = "first step"
        if isinstance(data.steps, StreamingSteps):
            steps: Any = dataclasses.replace(data.steps, steps=1)
        else:
            steps = _Longest.of(data.steps)
        return dataclasses.replace(data, steps=steps, total_steps=1, held_out=None)

    def try_parts(self, trainer: FalconTrainer) -> None:
        """Try each kernel and an all-reduce by themselves; a step may not split what is out of memory.

        Raises:
            UserError: naming what differs.
        """
        trainer.step.reduction.can_retry = False
        device = trainer.args.device
        with phase("all-reduce", "trying an all-reduce and the kernels"):
            self._rows.append(("all-reduce", _try_all_reduce(device)))
        with phase("kernels"):
            batch = largest_micro_batch(trainer)
            if batch is None:
                batch = next(share for share in iter(trainer.steps) if share is not None).micro_batches[0]
            chosen = self._configuration.model.kernels
            self._rows.append(("kernels", compare_kernels(trainer.model, batch, device, chosen)))
        agreement.wait_for_all()
        phases.now = "first step"

    def require_saved(self, trainer: FalconTrainer) -> None:
        """Wait for the step's checkpoint; what follows is of saving, too.

        Raises:
            UserError: on every process, if it could not be written.
        """
        phases.now = "save"
        trainer.settle()
        if trainer.checkpointer.failure is not None:
            raise not_written(self.directory.checkpoints, trainer.checkpointer.failure)

    def finish(self, trainer: FalconTrainer, directory: RunDirectory) -> None:
        """Read back what was saved, and print the table.

        Raises:
            UserError: if it is not whole, or a check of the run's end has failed.
        """
        with phase("reading back", "reading back what was saved"):
            # The main process, which removes the folder, waits for the others.
            loaded = agreement.done_by_all(lambda: self._read_back(trainer, directory))
        if not ranks.is_main_process():
            return
        summary, cut = directory.read("summary"), trainer.cutter.cut
        tokens = max(sum(batch.lengths) for batch in trainer.share.micro_batches)
        peak = f"{sized(summary['peak_memory_gib'] * GIB)} at most on one rank"
        if summary["predicted_peak_memory_gib"] is not None:
            peak += f", {sized(summary['predicted_peak_memory_gib'] * GIB)} predicted"
        done = "forward, backward, optimizer"
        if summary["overflowed_steps"]:
            done = "forward, backward; no optimizer, as a gradient overflowed in float16"
        self._rows += [
            ("step", f"{tokens:,} tokens, the most of these rows: {done}; {peak}"),
            *([("cut", cut.told())] if self._configuration.data.packing else []),
            ("save", loaded),
        ]
        for name, label in _TOLD.items():
            check = summary["checks"][name]
            if check["state"] == "failed":
                raise UserError(f"{label}: {check['told']}")
            self._rows.append((label, checks.line(check)))
        console.console().quiet = False
        devices_told = counted(ranks.world_size(), "rank")
        console.print_table(f"dry run: passed on {devices_told}; nothing was left behind", self._rows)

    def _read_back(self, trainer: FalconTrainer, directory: RunDirectory) -> str:
        """Load what a resumed run would load, on every process that sees the folder."""
        if (wrong := manifest.fault(directory.adapter)) is not None:
            raise UserError(f"the adapter is not whole after it was written: {wrong}")
        steps = manifest.step_folders(directory.checkpoints)
        if not steps:
            return "adapter written and read back (--save_strategy no: no checkpoint)"
        _, checkpoint = steps[-1]
        if (wrong := manifest.fault(checkpoint)) is not None:
            raise UserError(f"the checkpoint is not whole after it was written: {wrong}")
        size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
        told = f"checkpoint ({sized(size)}) and adapter written"
        if trainer.args.save_only_model or is_sharded(trainer.model):
            return f"{told}; their checksums are right"
        trainer._load_from_checkpoint(str(checkpoint))
        trainer._load_optimizer_and_scheduler(str(checkpoint))
        return f"{told}, read back and loaded, the optimizer too"


@dataclasses.dataclass(eq=False)
class _Longest(TrainingSteps):
    """A run of one step, which is another run's step with the most tokens, of few micro-batches."""

    share: Share

    @classmethod
    def of(cls, steps: TrainingSteps) -> _Longest:
        share = steps[largest_step(steps)]
        largest = sorted(share.micro_batches, key=lambda batch: sum(batch.lengths))[-_MICRO_BATCHES:]
        share = dataclasses.replace(share, micro_batches=largest, step=0, epoch=1.0)
        known = {field.name: getattr(steps, field.name) for field in dataclasses.fields(steps)}
        return cls(**known | {"steps": 1, "share": share})

    def __getitem__(self, step: int) -> Share:
        if step != 0:
            raise IndexError(step)
        return self.share


def _told_data(data: TrainingData) -> str:
    """What became of the rows, as the start of a run tells it, and the steps of the run."""
    steps = f"{counted(data.total_steps, 'step')} in all"
    if isinstance(data.steps, StreamingSteps):
        return steps
    documents, tokens = data.record["documents"], data.record["tokens"]
    held_out = "" if data.held_out is None else f"{len(data.held_out.lengths):,} held out"
    return joined(f"{counted(documents, 'document')}, {tokens:,} tokens", held_out, *data.notes, steps)


def _try_all_reduce(device: torch.device) -> str:
    count = ranks.world_size()
    if count == 1:
        return "one rank: none"
    mine = torch.full((1024,), float(ranks.process_index() + 1), device=device)
    dist.all_reduce(mine)
    right = count * (count + 1) / 2
    wrong = mine[mine != right]
    if len(wrong):
        raise UserError(
            f"an all-reduce over {count} ranks gave {float(wrong[0]):g} where {right:g} is right: the link "
            "between GPUs or hosts is at fault. Run with NCCL_DEBUG=INFO to see which it uses, and try "
            "NCCL_P2P_DISABLE=1 or NCCL_IB_DISABLE=1"
        )
    return f"{dist.get_backend()}, the right sum on {count} ranks"
