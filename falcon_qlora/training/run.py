"""One training run, from a configuration to an adapter on disk: the whole project in one function."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from falcon_qlora.config import Configuration
from falcon_qlora.processes import agreement, endings, ranks

if TYPE_CHECKING:
    from falcon_qlora.run_folder.lock import RunLock


def train(configuration: Configuration) -> Path:
    """Fine-tune as `configuration` says, as one of `ranks.world_size()` processes.

    Returns:
        The run directory.

    Raises:
        UserError: for what the user can mend, before anything is computed where that can be known.
    """
    from falcon_qlora.run_folder.lock import RunLock
    from falcon_qlora.terminal.console import note

    # The processes that torchrun ends before it starts others may take a while to go.
    patience = 60.0 if ranks.restart_count() else 0.5
    with RunLock(note, patience_seconds=patience) as lock:
        return _train(configuration, lock)


def _train(configuration: Configuration, lock: RunLock) -> Path:
    from falcon_qlora.models.fast_path import choose_kernels
    from falcon_qlora.processes.stop_signals import Stopped
    from falcon_qlora.terminal import console
    from falcon_qlora.training import build as builder
    from falcon_qlora.training import preflight, record, resume, rows
    from falcon_qlora.training.activations import choose_activations, warm_up
    from falcon_qlora.training.sharding import shard_if_wanted

    assert configuration.training is not None  # built here: it starts the process group
    directory = preflight.find_folder(configuration, lock)
    checkpoint = resume.checkpoint_to_resume(configuration, directory)
    resume.adopt(configuration, checkpoint)
    trackers = preflight.choose_trackers(configuration)
    preflight.check_model(configuration)
    tokenizer = rows.load_tokenizer(configuration)
    data = rows.training_data(configuration, tokenizer)
    resume.check_data(data, checkpoint)
    model = builder.model_with_adapter(configuration, tokenizer)
    kernels = choose_kernels(
        model, kernels=configuration.model.kernels, compute_dtype=configuration.model.compute_dtype
    )
    notes = shard_if_wanted(configuration, model)
    activations = choose_activations(configuration, model, kernels)
    preflight.check_disk(configuration, directory, model, steps=data.total_steps)
    agreement.wait_for_all()  # nothing is written before every process has come so far
    with preflight.run_folder(configuration, lock) as directory:
        trainer = builder.build_trainer(
            configuration,
            directory,
            tokenizer=tokenizer,
            data=data,
            model=model,
            trackers=trackers,
            describe_adapter=functools.partial(record.describe_adapter, configuration, data),
        )
        warm_up(trainer, configuration)
        going_on = checkpoint is not None or ranks.restart_count() > 0
        preflight.start_trackers(configuration, directory, trackers, resume=going_on)
        record.write_start(configuration, directory, data, trackers, kernels, checkpoint)
    console.print_start(
        record.start_summary(
            configuration,
            directory,
            data,
            model,
            tracking=trackers.lines,
            kernels=kernels,
            activations=activations,
            checkpoint=checkpoint,
            notes=notes,
        )
    )

    trainer.args.eval_on_start &= checkpoint is None  # a run that goes on has been evaluated at its start
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        endings.forget_siblings()
        record.finish(configuration, directory, trainer, data, trackers, activations)
    except Stopped as stopped:
        resumable = not trainer.args.save_only_model
        record.stop(directory, stopped, trackers, steps=data.total_steps, resumable=resumable)
        return directory.path
    except BaseException:
        # The process may end without the goodbyes that trackers wait for.
        trackers.finish(exit_status=1)
        raise
    return directory.path
