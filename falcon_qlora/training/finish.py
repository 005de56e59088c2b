"""The end of a run: writes the adapter and the summary, or says where the run stopped."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from falcon_qlora.checkpoint.adapter_check import AdapterFaultError, Reopened, check_opening, check_tensors
from falcon_qlora.checkpoint.insist import until_written
from falcon_qlora.checkpoint.manifest import write_manifest
from falcon_qlora.checkpoint.write import last_complete, not_kept, not_written, require_same_replicas
from falcon_qlora.common.errors import UserError, reason_of
from falcon_qlora.common.files import flush, quoted, replaced_folder, write_json
from falcon_qlora.config import Configuration
from falcon_qlora.data.batches import TrainingSteps
from falcon_qlora.methods.interface import method_of
from falcon_qlora.models.hub import push_folder
from falcon_qlora.models.sharded import is_sharded, take_part
from falcon_qlora.models.sharded_base import follow, leading
from falcon_qlora.models.streamed_base import replicated
from falcon_qlora.models.tokenizer import save_tokenizer
from falcon_qlora.processes import agreement, endings, launcher, lookout, ranks, stop_signals
from falcon_qlora.processes.stop_signals import Stopped
from falcon_qlora.run_folder.directory import RunDirectory
from falcon_qlora.run_folder.summary import Summary
from falcon_qlora.run_folder.tracking import Trackers
from falcon_qlora.terminal import console, phases
from falcon_qlora.training import checks
from falcon_qlora.training.estimate import told_blocks
from falcon_qlora.training.moved import has_learned, require_moved
from falcon_qlora.training.record import counts, refused_by_peft
from falcon_qlora.training.resume import how_to_go_on
from falcon_qlora.training.rows import TrainingData, told_at_end
from falcon_qlora.training.throughput import card_gib, peak_memory_gib
from falcon_qlora.training.trainer import FalconTrainer

if TYPE_CHECKING:
    from trl import SFTConfig

    from falcon_qlora.checkpoint.mirror import Mirror
    from falcon_qlora.training.batch_tokens import Cutter
    from falcon_qlora.training.estimate import Estimate

# How long a mirror may take to upload the rest: at an error; at a stop, for which one or two minutes are
# usual; and at the end, without anything being uploaded.
FAILING_SECONDS, _STOP_SECONDS, _END_SECONDS = 15.0, 60.0, 300.0


def finish(
    directory: RunDirectory,
    trainer: FalconTrainer,
    trackers: Trackers,
    *,
    describe_adapter: Callable[[Path, dict[str, Any]], None],
    configuration: Configuration,
    data: TrainingData,
    cutter: Cutter,
    estimate: Estimate | None,
) -> None:
    """Check that the replicas agree, write the adapter and the summary, and print what was written.

    Args:
        describe_adapter: completes an adapter's folder, given the summary.
        configuration: of the run.
        data: that it was trained on.
        cutter: how its steps were cut, with the predicted peak memory.
        estimate: from `estimate_here`.

    Raises:
        UserError: if the replicas diverged, if nothing was trained, if the adapter cannot be written, or if
            the written adapter is not the one in memory; it is not kept.
    """
    predicted_gib = cutter.activations.predicted_gib
    held = card_gib()  # PyTorch's allocator keeps what a step took
    model, base, run = trainer.model, configuration.model, configuration.run
    replicas = None
    if not is_sharded(model):
        replicas = require_same_replicas(
            replicated(model), trainer.checkpointer.last_complete, step=trainer.state.global_step
        )
    require_moved(trainer, is_trial=run.dry_run)
    reduction = trainer.meter.share_of_this_start(trainer.step.reduction.clock.finish())
    mine = peak_memory_gib(), round(reduction, 4), checks.facts(trainer, base.quantize_mode)
    peaks, reductions, facts = map(list, zip(*agreement.gather_objects(mine), strict=True))
    endings.forget_siblings(but_main=True)  # the others may be done before this one is; rank 0 writes
    lines: list[dict[str, Any]] = []
    with _told_if_not_written(directory.summary_file):
        lines = directory.read_metrics()
    losses = [line["loss"] for line in lines if "loss" in line]
    evaluations = [
        (line["eval_loss"], line["step"])
        for line in lines
        if line.get("eval_loss") is not None and line["step"] > 0  # at step 0 there is nothing to keep
    ]
    best: tuple[float | None, int | None] = min(evaluations, default=(None, None))
    if trainer.args.load_best_model_at_end:  # of the adapter that is kept
        best = trainer.state.best_metric, trainer.state.best_global_step
    totals = trainer.meter.total()
    plan = trainer.steps.plan if isinstance(trainer.steps, TrainingSteps) else None
    summary = Summary(
        steps=trainer.state.global_step,
        first_loss=losses[0] if losses else None,
        final_loss=losses[-1] if losses else None,
        train_seconds=trainer.meter.seconds,
        tokens_per_second=totals.get("tokens_per_second", 0.0),
        samples_per_second_512=totals.get("samples_per_second_512", 0.0),
        peak_memory_gib=max(peaks),
        total_peak_memory_gib=sum(peaks),
        world_size=ranks.world_size(),
        best_eval_loss=best[0],
        best_step=best[1],
        bad_steps=trainer.step.bad_steps.total,
        overflowed_steps=trainer.step.bad_steps.overflowed,
        micro_batch_parts=2**trainer.step.halvings,
        micro_batch_tokens=cutter.cut.filled if configuration.data.packing else None,
        micro_batches=cutter.cut.micro_batches,
        micro_batch_reason=cutter.cut.why,
        checkpointing=told_blocks(cutter.activations.blocks),
        tokens=trainer.state.num_input_tokens_seen,
        samples=plan.documents_until(trainer.state.global_step) if plan is not None else None,
        predicted_peak_memory_gib=predicted_gib,
        card_gib=held,
        estimated_card_gib=None if estimate is None else estimate.card_gib,
        estimated_tokens_per_second=None if estimate is None else estimate.tokens_per_second,
        reduction_shares=reductions if len(reductions) > 1 else None,
        network_share=min(reductions) if ranks.world_size() > ranks.local_world_size() else None,
        refused_by_peft=refused_by_peft(method_of(model)) or None,
        adapter=run.adapter,
        adapter_sha256=run.adapter_sha256,
        **counts(model),
    )
    figures = asdict(summary)
    title = base.model_name_or_path
    reopened = _keep_adapter(
        directory,
        trainer,
        lambda folder: describe_adapter(folder, figures),
        meanwhile=lambda: directory.draw_loss(title=title, kept=trainer.kept_step),
        is_trial=run.dry_run,
    )
    endings.forget_siblings()
    lookout.end()
    trainer.settle()
    if ranks.is_main_process():
        figures |= _wall_clock(trainer)
        figures["checks"] = proved = checks.collect(
            facts,
            model,
            mode=base.quantize_mode,
            replicas=replicas,
            reopened=reopened,
            predicted_gib=predicted_gib,
            measured_gib=summary.peak_memory_gib,
            clock=figures,
            data=data.record,
            account_at_end=trainer.account,
            documents=summary.samples,
            end_token_appended=configuration.data.append_end_token,
            base=(title, base.model_revision),
            directory=directory,
        )
        with _told_if_not_written(directory.summary_file):
            directory.write("summary", figures)
        told = checks.told_in_lines(proved)
        console.print_end(
            figures,
            directory.told_contents(),
            adapter=directory.address or str(directory.adapter),
            opened_with=["--offload_base"] * run.offload_base,
            checked=told,
        )
    trackers.finish(summary=figures, adapter=directory.adapter)


def leave_as_it_is(directory: RunDirectory, *, steps: int) -> None:
    """Say that nothing is left to do, and let each process end by itself."""
    endings.forget_siblings()
    lookout.end()
    anew = ["--config", str(directory.config_file), "--output_dir", directory.name, "--overwrite"]
    console.note(
        f"{directory.name} is done: nothing is left to train of {steps:,} steps, and nothing was changed. "
        "For more steps give --max_steps or --num_train_epochs; it is begun anew with:  "
        f"{' '.join(map(quoted, launcher.launched(*anew)))}"
    )


def tell_rows(directory: RunDirectory, trainer: FalconTrainer, data: TrainingData, *, train_on: str) -> None:
    """Print and record what became of a stream's rows; those of a corpus are told at the start."""
    if not data.record.get("streaming") or not ranks.is_main_process():
        return
    for line in told_at_end(data, trainer.account, train_on):
        console.note(line)
    with _told_if_not_written(directory.data_file):
        write_json(directory.data_file, {**data.record, "account_at_end": trainer.account})


def _keep_adapter(
    directory: RunDirectory,
    trainer: FalconTrainer,
    describe_adapter: Callable[[Path], None],
    *,
    meanwhile: Callable[[], None],
    is_trial: bool,
) -> Reopened | None:
    """Write the adapter's folder; if the disk fails, see `until_written`.

    Args:
        meanwhile: work of the main process for the time until the last checkpoint is written.
        is_trial: whether what was trained is worth nothing.

    Returns:
        On the main process, what the adapter, opened again, computes.
    """
    model = trainer.model
    reopened: Reopened | None = None

    def write() -> str | None:
        nonlocal reopened
        took_part = False
        try:
            with leading(model), replaced_folder(directory.adapter) as folder:
                took_part = True
                # Copied already, unless the best model has taken the last one's place.
                step, held = trainer.state.global_step, None
                if not trainer.holds_best:
                    held = trainer.checkpointer.trained_state(step)
                method_of(model).save(model, folder, held)
                save_tokenizer(trainer.processing_class, folder)
                describe_adapter(folder)
                with ThreadPoolExecutor(2) as beside:
                    files = [file for file in folder.iterdir() if file.is_file()]
                    flushed = [beside.submit(flush, file) for file in files]
                    # A model card is meant to be edited.
                    described = beside.submit(write_manifest, folder, {"step": step}, leave_out=["README.md"])
                    check_tensors(folder, model, trained=has_learned(trainer))
                    trainer.checkpointer.wait_until_unread()
                    reopened = check_opening(folder, model)
                    # The process ends sooner, and who waits for the memory has it sooner.
                    beside.submit(torch.cuda.empty_cache)
                    meanwhile()
                    for each in (described, *flushed):
                        each.result()
                unsaved = trainer.checkpointer.require_kept()
            if unsaved is not None:
                console.note(
                    f"step {step:,}: the checkpoint could not be saved ({unsaved}); the adapter is whole"
                )
        except OSError as error:
            if is_sharded(model) and not took_part:
                take_part(model)  # the other processes do
            return reason_of(error, directory.adapter)
        except AdapterFaultError as error:
            trainer.checkpointer.join()  # which may be the last complete one
            last = trainer.checkpointer.last_complete()
            told = not_kept(error, last, step=trainer.state.global_step)
            raise UserError(told) from None
        return None

    def attempt() -> str | None:
        if not ranks.is_main_process():
            take_part(model) if is_sharded(model) else follow(model)
        return agreement.from_main_process(write)

    failure = attempt()
    if failure is not None and is_trial:
        raise not_written(directory.adapter, failure)
    told = f"all steps are done, but {directory.adapter} could not be written"
    if failure is not None:
        step = trainer.state.global_step
        failure = until_written(trainer.checkpointer, failure, attempt, step=step, told=told)
    if failure is not None:
        raise UserError(f"{told} ({failure}). {_where_to_go_on(directory)}")
    return reopened


def _where_to_go_on(directory: RunDirectory) -> str:
    """A sentence on what a run that could not save its end has left, and what to do."""

    def tell() -> str:
        how = f"make room there, and go on {how_to_go_on(directory)}"
        return last_complete(directory.checkpoints, directory.address, how=how)

    return agreement.from_main_process(tell)


def _wall_clock(trainer: FalconTrainer) -> dict[str, Any]:
    """How long the whole command took, and where the time went."""
    meter = trainer.meter
    wall = meter.wall_seconds()
    spent = {
        "start_seconds": meter.lost["start"],
        "save_seconds": meter.lost["saves"],
        "evaluation_seconds": meter.lost["evaluation"],
    }
    return {
        "wall_seconds": wall,
        "wall_tokens_per_second": meter.tokens / wall,
        "step_share": meter.seconds / wall,
        **spent,
        "end_seconds": max(wall - meter.seconds - sum(spent.values()), 0.0),
        "start_phases": {name: round(seconds, 3) for name, seconds in phases.seconds.items()},
    }


@contextlib.contextmanager
def _told_if_not_written(file: Path) -> Iterator[None]:
    """Print a note instead of failing: the adapter is worth more than its records."""
    try:
        yield
    except OSError as error:
        console.note(f"{file} could not be written ({reason_of(error)})")


def upload(directory: RunDirectory, training: SFTConfig) -> None:
    """Upload the adapter if `--push_to_hub` asks for it; a failed upload only prints a note."""
    if not training.push_to_hub or not ranks.is_main_process():
        return
    try:
        url = push_folder(
            directory.adapter,
            training.hub_model_id,
            private=training.hub_private_repo,
            token=training.hub_token,
            revision=training.hub_revision,
        )
    except UserError as error:
        console.note(str(error))
    else:
        console.print_plain(f"uploaded to {url}")


def mirror_rest(directory: RunDirectory, mirror: Mirror | None) -> None:
    """Upload what the address of a finished run lacks; every process calls this.

    Where that fails the run ends as one that has stopped: started again, it goes on with the uploading.
    """
    missing = agreement.from_main_process(lambda: None if mirror is None else _flushed(mirror))
    if missing is None and mirror is not None:
        console.print_plain(f"copied to {mirror.store.address}")
    if missing is not None:
        stop_signals.tell_stopped()
        console.note(f"all steps are done, but {missing}; upload it {how_to_go_on(directory)}")


def _flushed(mirror: Mirror) -> str | None:
    """As `Mirror.flush`, with less patience where the process is asked to stop meanwhile."""
    patience = _STOP_SECONDS if stop_signals.asked_to_stop() else _END_SECONDS
    return mirror.flush(patience, hurry=stop_signals.asked_to_stop() is not None)


def stop(
    directory: RunDirectory,
    stopped: Stopped,
    trackers: Trackers,
    *,
    steps: int,
    resumable: bool,
    mirror: Mirror | None = None,
) -> None:
    """Print where a run that was asked to stop has stopped, and how to resume it.

    Args:
        steps: of the whole run.
        resumable: whether its checkpoints hold the optimizer's state.
        mirror: of the main process, where the run has an address.

    Raises:
        UserError: if the checkpoint could not be saved, or the run cannot go on from it.
    """
    trackers.finish(exit_status=int(stopped.failure is not None))
    if ranks.is_main_process():
        directory.draw_loss()
    where = f"stopped at step {stopped.step:,} of {steps:,}"
    if stopped.failure is not None:
        last = _where_to_go_on(directory)
        raise UserError(f"{where}, but the checkpoint could not be saved ({stopped.failure}). {last}")
    if not resumable:
        kept = directory.checkpoints / f"step-{stopped.step}"
        raise UserError(f"{where}. {kept} is weights only: the run cannot be resumed")
    lookout.end()
    missing = mirror.flush(_STOP_SECONDS, hurry=True) if mirror is not None else None
    if missing is not None:
        console.note(
            f"{missing}; {directory} has it, and from this machine it is uploaded as the run goes on"
        )
    stop_signals.tell_stopped()
    console.print_plain(f"{where}. Go on {how_to_go_on(directory)}")
