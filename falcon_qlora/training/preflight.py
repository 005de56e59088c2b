"""Checks that refuse a run before anything large is read.

A refused run leaves no new folder and takes nothing from an existing one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from falcon_qlora.checkpoint.bring import bring_run
from falcon_qlora.common import stores
from falcon_qlora.common.errors import UserError
from falcon_qlora.config import Configuration
from falcon_qlora.config.arguments import RunArguments
from falcon_qlora.config.quantized import refuse_needing_16bit
from falcon_qlora.models.hub import check_login
from falcon_qlora.processes import agreement, devices, ranks
from falcon_qlora.run_folder import choose as folders
from falcon_qlora.run_folder import tracking
from falcon_qlora.run_folder.directory import RunDirectory
from falcon_qlora.run_folder.lock import RunLock
from falcon_qlora.terminal.console import note
from falcon_qlora.training import base, resume, same_run, schedule, sharding, start_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from falcon_qlora.models.schemes import Scheme
    from falcon_qlora.run_folder.tracking import Trackers

_MOST_PARAMETERS_ON_CPU = 10**9
_STORAGE = ("quantize_mode", "double_quantization")


@dataclass(frozen=True)
class Start:
    """What a run starts with, once all checks have passed.

    Attributes:
        directory: where it would write; a fresh one is not made yet.
        checkpoint: that it resumes from, or None.
        trackers: none of them open yet.
    """

    directory: RunDirectory
    checkpoint: str | None
    trackers: Trackers
    _choose: Callable[[bool], str]

    @property
    def goes_on(self) -> bool:
        """Whether the run continues an earlier start."""
        return self.checkpoint is not None or ranks.restart_count() > 0

    @contextlib.contextmanager
    def run_folder(self) -> Iterator[RunDirectory]:
        """The run directory, made on entry; removed again if the block fails and no run has written there."""
        address = self.directory.address
        made = RunDirectory(agreement.from_main_process(lambda: self._choose(True)), address=address)
        try:
            yield made
        except BaseException:
            if ranks.is_main_process():
                made.remove_if_empty()
            raise


def check(configuration: Configuration, lock: RunLock) -> Start:
    """Find the folder, the checkpoint to resume from and the base model, and refuse what cannot work.

    The configuration takes over the global batch size of a run to resume, and the method and base of an
    adapter to begin from.

    Args:
        lock: taken by the main process on the run's folder.

    Raises:
        UserError: for what the user can fix.
    """
    run, model = configuration.run, configuration.model
    named = f"{model.quantize_mode}-{configuration.method.short}"

    def choose(make: bool) -> str:
        path = folders.choose(
            run.output_dir,
            model=model.model_name_or_path,
            settings=named,
            resume=run.resume,
            overwrite=run.overwrite,
            restarted=ranks.restart_count() > 0,
            make=make,
            dry_run=run.dry_run,
        )
        if path.is_dir() and not run.dry_run:
            lock.take(path)
        return str(path)

    found = RunDirectory(agreement.from_main_process(lambda: choose(False)), address=_address(run))
    if found.address is not None:
        agreement.from_main_process(lambda: _bring(found, run, lock))
    checkpoint = resume.checkpoint_to_resume(found, resume=run.resume, overwrite=run.overwrite)
    if run.resume:
        base.check_recorded_folders(model, checkpoint)
    start_adapter.adopt(configuration, found, checkpoint)
    if checkpoint is not None:
        same_run.adopt(configuration, checkpoint)
    _follow_checkpoint(configuration)
    trackers = tracking.choose(run.report_to)
    config = _check_model(configuration)
    sharding.check(configuration, config)
    training = configuration.training
    schedule.check(training, [name for name, origin in configuration.explicit.items() if origin == "flag"])
    if training.push_to_hub:
        agreement.from_main_process(lambda: check_login(training.hub_token))
    return Start(found, checkpoint, trackers, choose)


def _follow_checkpoint(configuration: Configuration) -> None:
    """Take over how the base is stored, where that shows only now: on the hub, or named by an adapter."""
    from falcon_qlora.models.fingerprint import folder_here
    from falcon_qlora.models.locate import find_config
    from falcon_qlora.models.schemes import scheme_in

    model, given = configuration.model, configuration.explicit
    name, revision = model.model_name_or_path, model.model_revision

    def find() -> Scheme | None:
        if folder_here(name, revision=revision) is None:
            find_config(name, revision=revision)
        return scheme_in(folder_here(name, revision=revision))

    scheme = agreement.from_main_process(find)
    if scheme is not None:
        asked = (getattr(model, each) if each in given else None for each in _STORAGE)
        scheme.refuse_others(name, *asked)
        refuse_needing_16bit(configuration.method, scheme, name)
        model.quantize_mode, model.double_quantization = scheme.mode, scheme.double_quantization


def _address(run: RunArguments) -> str | None:
    return run.output_dir if run.output_dir is not None and stores.is_address(run.output_dir) else None


def _bring(found: RunDirectory, run: RunArguments, lock: RunLock) -> None:
    """Have what the run goes on from here, and say where the run is written; on the main process."""
    note(f"the run is written in {found.path}, and copied to {found.address}")
    if (run.resume or ranks.restart_count()) and not run.dry_run:
        found.path.mkdir(parents=True, exist_ok=True)
        lock.take(found.path)
        bring_run(found)


def _check_model(configuration: Configuration) -> PreTrainedConfig:
    """Refuse a model of unknown layout or too large for the device, before its weights are downloaded."""
    import torch

    from falcon_qlora.kernels import fp8
    from falcon_qlora.methods.interface import trainable_count
    from falcon_qlora.models.fingerprint import folder_here
    from falcon_qlora.models.layouts import layout_of
    from falcon_qlora.models.load import check_mode_runs_on
    from falcon_qlora.models.locate import find_config
    from falcon_qlora.models.schemes import scheme_in
    from falcon_qlora.models.sizes import check_fits, check_host
    from falcon_qlora.models.zero3 import check_installed

    settings, method, run = configuration.model, configuration.method, configuration.run
    if run.sharding == "zero3":
        check_installed()
    device = devices.local_device()
    dtype = devices.compute_dtype(settings.compute_dtype, device)
    check_mode_runs_on(settings.quantize_mode, dtype, device)
    reason = fp8.why_not(device) if settings.compute_dtype == "fp8" else None
    if reason is not None:
        raise UserError(f"--compute_dtype fp8: {reason}. Use --compute_dtype auto.")
    config = agreement.from_main_process(
        lambda: find_config(settings.model_name_or_path, revision=settings.model_revision)
    )
    trainable = trainable_count(method, config)
    stored = scheme_in(folder_here(settings.model_name_or_path, revision=settings.model_revision))
    fixed = stored is not None or method.needs_16bit is not None
    if run.offload_base:
        check_host(
            config,
            settings.quantize_mode,
            double_quantization=settings.double_quantization,
            compute_bytes=dtype.itemsize,
            processes=ranks.local_world_size(),
            fixed=fixed,
        )
    if device.type != "cuda":
        count = layout_of(config).parameter_count()
        if count > _MOST_PARAMETERS_ON_CPU and run.device != "cpu":
            raise UserError(
                f"{settings.model_name_or_path} has {count / 1e9:.1f} billion parameters, and no GPU is "
                "visible (see nvidia-smi and CUDA_VISIBLE_DEVICES). If the CPU is meant: --device cpu"
            )
        return config
    check_fits(
        config,
        settings.quantize_mode,
        trainable=trainable,
        free_bytes=torch.cuda.mem_get_info(device)[0],
        double_quantization=settings.double_quantization,
        processes=ranks.world_size() if sharding.shares_out_base(configuration) else 1,
        offloaded=run.offload_base,
        ways=sharding.ways_to_hold_less(configuration),
        fixed=fixed,
    )
    return config
