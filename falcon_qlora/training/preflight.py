"""What is refused before anything large is read, and what is opened only when a run is sure to start.

A run that is refused leaves no folder and takes nothing from one that is there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.files import free_bytes
from falcon_qlora.common.quantities import gib
from falcon_qlora.config import Configuration
from falcon_qlora.processes import agreement, devices, ranks
from falcon_qlora.run_folder import directory
from falcon_qlora.run_folder.directory import RunDirectory
from falcon_qlora.run_folder.lock import RunLock

if TYPE_CHECKING:
    from falcon_qlora.run_folder.tracking import Trackers

# The record beside the weights, with room to spare for what the disk itself takes.
_SMALL_FILES = 16 * 2**20


def find_folder(configuration: Configuration, lock: RunLock) -> RunDirectory:
    """Where the run would write, which nothing must speak against; a folder that is not there is not made.

    Args:
        lock: taken by the main process on a folder that is there.
    """
    return RunDirectory(agreement.from_main_process(lambda: _choose_folder(configuration, lock, make=False)))


@contextlib.contextmanager
def run_folder(configuration: Configuration, lock: RunLock) -> Iterator[RunDirectory]:
    """The run directory, made for the run that starts in the block; removed again if it does not start.

    Args:
        lock: taken on it by the main process.
    """
    path = agreement.from_main_process(lambda: _choose_folder(configuration, lock, make=True))
    directory = RunDirectory(path)
    try:
        yield directory
    except BaseException:
        if ranks.is_main_process():
            directory.remove_if_empty()
        raise


def _choose_folder(configuration: Configuration, lock: RunLock, *, make: bool) -> str:
    run, model = configuration.run, configuration.model
    settings = f"{model.quantize_mode}-{configuration.method.short}"
    path = directory.choose(
        run.output_dir,
        model=model.model_name_or_path,
        settings=settings,
        resume=True if run.resume == "latest" else (run.resume or False),
        overwrite=run.overwrite,
        restarted=ranks.restart_count() > 0,
        make=make,
    )
    if path.is_dir():
        lock.take(path)
    return str(path)


def check_model(configuration: Configuration) -> None:
    """Refuse a model of no known layout or that exceeds the GPU, before its weights are downloaded.

    Raises:
        UserError: also if there is no such model, the hub cannot be reached, or DeepSpeed is not installed
            and should shard it.
    """
    import torch

    from falcon_qlora.kernels import fp8
    from falcon_qlora.methods.interface import trainable_count
    from falcon_qlora.models.load import check_mode_runs_on
    from falcon_qlora.models.sizes import check_fits
    from falcon_qlora.models.zero3 import check_installed

    if configuration.run.sharding == "zero3":
        check_installed()
    settings = configuration.model
    device = devices.local_device()
    dtype = devices.compute_dtype(settings.compute_dtype, device)
    check_mode_runs_on(settings.quantize_mode, dtype, device)
    reason = fp8.why_not(device) if settings.compute_dtype == "fp8" else None
    if reason is not None:
        raise UserError(f"--compute_dtype fp8: {reason}. Use --compute_dtype auto.")
    config = agreement.from_main_process(lambda: read_config(configuration))
    trainable = trainable_count(configuration.method, config)
    if device.type != "cuda":
        return
    check_fits(
        config,
        settings.quantize_mode,
        trainable=trainable,
        free_bytes=torch.cuda.mem_get_info(device)[0],
        double_quantization=settings.double_quantization,
    )


def read_config(configuration: Configuration) -> Any:
    """The base model's configuration, without its weights.

    Raises:
        UserError: if there is no such model, or it is of no known layout.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError

    from falcon_qlora.models.checkpoints import read_folder_config
    from falcon_qlora.models.hub import Unreachable, plan_model
    from falcon_qlora.models.locate import is_on_hub, open_checkpoint

    name, revision = configuration.model.model_name_or_path, configuration.model.model_revision
    if is_on_hub(name):
        # Without the hub the cache may hold the model, or it is said how to bring it there.
        with contextlib.suppress(Unreachable, HTTPError, OSError):
            plan_model(name, revision=revision).check_disk()
            file = Path(hf_hub_download(name, "config.json", revision=revision))
            return read_folder_config(file.parent, source=name)
    return open_checkpoint(name, revision=revision).config


def check_disk(configuration: Configuration, directory: RunDirectory, model: Any, *, steps: int) -> None:
    """Refuse a disk on which the run's checkpoints have no room.

    Args:
        directory: where they will be.
        model: with its trainable parameters.
        steps: of the run.

    Raises:
        UserError: with what is needed and what is free.
    """
    from falcon_qlora.models.step_memory import embedded_share

    training = configuration.training
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trainable = sum(parameter.numel() for parameter in trained)
    needed = predicted_bytes(
        trainable,
        bytes_each=trained[0].element_size(),
        embedded=embedded_share(model.config) if configuration.method.is_whole else 0.0,
        optimizer=configuration.optimizer,
        saves=_saves(training, steps),
        limit=training.save_total_limit,
        keeps_best=training.load_best_model_at_end,
    )
    agreement.from_main_process(lambda: _check_room(directory, needed))


def predicted_bytes(
    trainable: int,
    *,
    optimizer: str,
    saves: int,
    limit: int | None,
    keeps_best: bool = False,
    bytes_each: int = 4,
    embedded: float = 0.0,
) -> int:
    """Bytes of the checkpoints that lie on the disk at once, and of the adapter at the end.

    Args:
        trainable: parameters.
        optimizer: by the trainer's name.
        saves: checkpoints in the whole run.
        limit: how many are kept; the new one is whole before an old one goes.
        keeps_best: whether the best stays beyond the limit.
        bytes_each: of a parameter.
        embedded: share of the parameters that are an embedding's.
    """
    from falcon_qlora.models.step_memory import optimizer_bytes

    state = optimizer_bytes(optimizer, bytes_each, embedded=embedded)
    at_once = saves if limit is None else min(saves, limit + 1 + keeps_best)
    weights = int(trainable * bytes_each)
    return at_once * (weights + int(trainable * state) + _SMALL_FILES) + weights + _SMALL_FILES


def _saves(training: Any, steps: int) -> int:
    if training.save_strategy == "no":
        return 0
    if training.save_strategy != "steps":
        return 1 + int(training.num_train_epochs)
    every = training.save_steps if training.save_steps >= 1 else max(steps * training.save_steps, 1)
    return max(int(steps / every), 1)


def _check_room(directory: RunDirectory, needed: int) -> None:
    free = free_bytes(directory.path)
    # What an earlier part of the run has written is replaced.
    written = (path.stat().st_size for path in directory.checkpoints.rglob("*") if path.is_file())
    if needed > free + sum(written):
        raise UserError(
            f"{directory}: the run's checkpoints will take {gib(needed)} and {gib(free)} "
            "are free there. Name another folder with --output_dir, or keep fewer with --save_total_limit"
        )


def choose_trackers(configuration: Configuration) -> Trackers:
    """The trackers a user asked for, checked, on the main process; none on the others."""
    from falcon_qlora.run_folder import tracking

    return tracking.choose(configuration.run.report_to)


def start_trackers(
    configuration: Configuration, directory: RunDirectory, trackers: Trackers, *, resume: bool
) -> None:
    """Open the run at each tracker."""
    trackers.start(
        directory=directory,
        config=configuration.resolved(),
        run_name=configuration.trainer.get("run_name"),
        resume=resume,
    )
