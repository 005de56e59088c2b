"""One training run, from a configuration to an adapter on disk: the whole project in one function."""

from __future__ import annotations

import dataclasses
import functools
import gc
import time
from pathlib import Path
from typing import TYPE_CHECKING

from falcon_qlora.common.errors import EXIT_HANGING, memory_advice
from falcon_qlora.config import Configuration
from falcon_qlora.processes import agreement, endings, launcher, ranks
from falcon_qlora.processes.command_clock import command_began
from falcon_qlora.processes.watchdog import end_native_code_after

if TYPE_CHECKING:
    from falcon_qlora.run_folder.lock import RunLock
    from falcon_qlora.training.dry_run import DryRun
    from falcon_qlora.training.estimate import Estimate


def train(configuration: Configuration) -> Path:
    """Fine-tune as `configuration` says, as one of `ranks.world_size()` processes.

    Returns:
        The run directory.

    Raises:
        UserError: for what the user can fix, before anything is computed where possible.
    """
    from falcon_qlora.run_folder.lock import RunLock
    from falcon_qlora.terminal.console import note
    from falcon_qlora.training.sharding import ways_to_take_less

    began = command_began(default=time.time())
    # Processes that torchrun ends before it starts others may take a while to exit.
    patience = 60.0 if ranks.restart_count() else 0.5
    goes_on = "" if configuration.run.dry_run else ". A run goes on from its last checkpoint with --resume"
    less = memory_advice(f"take less: {', '.join(ways_to_take_less(configuration))}{goes_on}")
    with RunLock(note, patience_seconds=patience) as lock:
        if not configuration.run.dry_run:
            with less:
                return _train(configuration, lock, began)
        from falcon_qlora.training.dry_run import DryRun

        with DryRun(configuration) as trial, less:
            return _train(configuration, lock, began, trial)
        raise AssertionError("unreachable")


def _train(configuration: Configuration, lock: RunLock, began: float, trial: DryRun | None = None) -> Path:
    from falcon_qlora.processes.stop_signals import Stopped
    from falcon_qlora.terminal import console, phases
    from falcon_qlora.terminal.phases import phase

    phases.seconds.clear()
    with phase("libraries"):
        from falcon_qlora.checkpoint.mirror import Mirror
        from falcon_qlora.kernels.ops import hash_triton
        from falcon_qlora.models.fast_path import choose_kernels
        from falcon_qlora.models.sharded import needs_all_processes
        from falcon_qlora.training import batch_tokens, build, finish, preflight, record, resume, rows
        from falcon_qlora.training.activations import choose_activations, on_reference_path, warm_up
        from falcon_qlora.training.alike import check_alike
        from falcon_qlora.training.base import check_base
        from falcon_qlora.training.disk import check_disk, waiting_saves
        from falcon_qlora.training.kernel_check import check_kernels
        from falcon_qlora.training.same_run import check_data, compared_settings
        from falcon_qlora.training.sharding import shard_if_wanted, shares_out_base, ways_to_take_less

        if not gc.isenabled():  # as `falcon_qlora.train` has it; what the libraries made stays
            gc.freeze()
            gc.enable()
        hash_triton()
    base, run, training = configuration.model, configuration.run, configuration.training
    endings.remember_siblings()  # of whose death a collective may tell long before the first step
    start = preflight.check(configuration, lock)
    if trial is not None:
        start = trial.beside(start)
    max_length, method = configuration.data.max_length, configuration.method
    begin_from = run.adapter if start.checkpoint is None else None

    end_native_code_after(run.hang_minutes, status=EXIT_HANGING)
    with phase("rows", "reading rows"):
        launcher.wait_for(launcher.ROWS)
        tokenizer = rows.load_tokenizer(base, method)
        share_out = shares_out_base(configuration)
        together = method.is_whole or share_out
        data = rows.training_data(configuration.data, run, tokenizer, together=together)
    check_data(data, start.checkpoint, base.tokenizer_name_or_path or base.model_name_or_path)
    configuration.log_steps_of_short_run(data.total_steps)
    if trial is None and resume.is_done(start.directory, start.checkpoint, data.total_steps):
        finish.leave_as_it_is(start.directory, steps=data.total_steps)
        mirror = Mirror.of(start.directory, limit=training.save_total_limit, goes_on=True)
        finish.mirror_rest(start.directory, mirror)
        finish.upload(start.directory, training)
        return start.directory.path

    with phase("model", "loading the base model"):
        fingerprint = check_base(base, checkpoint=start.checkpoint, adapter=begin_from)
        check_alike(configuration, data, tokenizer)
        model = build.model_with_adapter(
            base,
            method,
            tokenizer,
            seed=run.seed,
            adapter=begin_from,
            share_out=share_out,
            offload=run.offload_base,
        )
    kernels = choose_kernels(model, kernels=base.kernels, compute_dtype=base.compute_dtype)
    notes = shard_if_wanted(configuration, model)
    cutter = batch_tokens.choose(
        configuration,
        model.config,
        data.plan,
        reference=next(iter(on_reference_path(kernels)), None),
        shared_out=needs_all_processes(model),
        checkpoint=start.checkpoint,
    )
    if configuration.data.packing:
        data.steps.dealing = dataclasses.replace(data.steps.dealing, tokens=cutter.cut.tokens)
    cutter.keep(
        functools.partial(
            choose_activations, run, model, kernels, max_length=max_length, optimizer=configuration.optimizer
        )
    )

    def estimated() -> Estimate | None:
        return batch_tokens.estimate_here(configuration, model.config, data.plan, cutter)

    needed = check_disk(
        start.directory if trial is None else trial.directory,
        model,
        training,
        optimizer=configuration.optimizer,
        whole=method.is_whole,
        steps=data.total_steps,
        by_clock=run.save_every_minutes > 0,
    )
    if trial is not None:
        data = trial.one_step(data, needed=needed)
    agreement.wait_for_all()  # nothing is written before every process has come this far
    describe_adapter = functools.partial(record.describe_adapter, configuration, data, fingerprint, tokenizer)
    with start.run_folder() as directory:
        trainer = build.build_trainer(
            training,
            run,
            directory,
            max_length=max_length,
            tokenizer=tokenizer,
            data=data,
            model=model,
            trackers=start.trackers,
            describe_adapter=describe_adapter,
            settings=compared_settings(configuration),
            began=began,
            cutter=cutter,
        )
        if trial is not None:
            trial.try_parts(trainer)
        with phase("first_step", "preparing the first step"):
            warm_up(trainer, functools.partial(ways_to_take_less, configuration))
            device = trainer.args.device
            trainer.kernel_check = agreement.done_by_all(lambda: check_kernels(model, device, base.kernels))
        start.trackers.start(
            directory=directory,
            config=configuration.resolved(),
            run_name=configuration.trainer.get("run_name"),
            project=run.wandb_project,
            entity=run.wandb_entity,
            resume=start.goes_on,
        )
        record.write_start(configuration, directory, data, start.trackers, kernels, start.checkpoint)
    mirror = Mirror.of(
        directory,
        limit=training.save_total_limit,
        goes_on=start.checkpoint is not None,
        overwrite=run.overwrite,
    )
    console.print_start(
        record.start_rows(
            configuration,
            directory,
            data,
            model,
            tracking=start.trackers.lines,
            kernels=kernels,
            cutter=cutter,
            checkpoint=start.checkpoint,
        ),
        notes=[
            *record.start_notes(configuration, data, model, kernels, estimated()),
            *cutter.notes,
            *filter(None, [cutter.told_smaller()]),
            *notes,
            *waiting_saves(trainer, optimizer=configuration.optimizer),
        ],
    )

    trainer.args.eval_on_start &= start.checkpoint is None  # a resumed run was evaluated at its start
    try:
        trainer.train(resume_from_checkpoint=start.checkpoint)
        if trial is not None:
            trial.require_saved(trainer)
        finish.tell_rows(directory, trainer, data, train_on=configuration.data.train_on)
        finish.finish(
            directory,
            trainer,
            start.trackers,
            describe_adapter=describe_adapter,
            configuration=configuration,
            data=data,
            cutter=cutter,
            estimate=estimated(),
        )
        if trial is not None:
            trial.finish(trainer, directory)
    except Stopped as stopped:
        resumable = not trainer.args.save_only_model
        finish.tell_rows(directory, trainer, data, train_on=configuration.data.train_on)
        finish.stop(
            directory, stopped, start.trackers, steps=data.total_steps, resumable=resumable, mirror=mirror
        )
    except BaseException:
        trainer.close(failing=True)
        if mirror is not None:
            mirror.flush(finish.FAILING_SECONDS, hurry=True)
        # The process may end without the shutdown that trackers rely on.
        start.trackers.finish(exit_status=1)
        raise
    else:
        trainer.close()
        finish.mirror_rest(directory, mirror)
        finish.upload(directory, training)
    return directory.path
