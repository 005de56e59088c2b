"""Trackers: all that Transformers reports to, through its own callbacks.

They run on the main process alone. A fault found before the run is an error (a missing package, a rejected
key). Once the run has started, no tracker stops it.

    trackers = choose(["wandb"])                         # early: nothing is loaded yet
    trainer = FalconTrainer(..., callbacks=[trackers.callback])
    trackers.start(directory=..., config=..., run_name=...)
    trackers.finish(summary=..., adapter=...)
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    WandbCallback,
    WandbLogModel,
)

from falcon_qlora.common.errors import UserError, first_line, panics_as_errors
from falcon_qlora.common.files import plain, quoted
from falcon_qlora.processes import ranks
from falcon_qlora.run_folder.directory import RunDirectory
from falcon_qlora.run_folder.environment import without_secrets
from falcon_qlora.terminal.console import note
from falcon_qlora.terminal.library_logging import ENVIRONMENT

PROJECT = "falcon-qlora"

# Where Transformers' own messages do not say what is missing.
_HINTS = {
    "comet_ml": "; it needs COMET_API_KEY too",
    "tensorboard": "; pip install tensorboard",
}

# A tracker that fails this often in a row is dropped: its time-outs would slow every step.
_PATIENCE = 3
# It gives its own process 30 seconds to start, and its server 90.
_START_SECONDS = 60.0
_INIT_SECONDS = 150.0
_FINISH_SECONDS = 120.0
_REJECTED = re.compile(
    r"error 40[13]\b|invalid|not logged in|permission denied|unauthorized|forbidden", re.IGNORECASE
)


def choose(report_to: Sequence[str]) -> Trackers:
    """Check the trackers a user asked for, W&B's key included.

    Args:
        report_to: Names that `--report_to` takes; ``none`` is no tracker.

    Raises:
        UserError: if a tracker's package or key is missing, or W&B rejects the key. On the main process
            only; the others get no trackers.
    """
    if not ranks.is_main_process():
        return Trackers({}, wandb_mode="disabled")
    callbacks = {name: _callback(name) for name in report_to if name != "none"}
    mode, reason = _wandb_mode() if "wandb" in callbacks else ("disabled", "")
    return Trackers(callbacks, wandb_mode=mode, wandb_reason=reason)


def _callback(name: str) -> TrainerCallback:
    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None  # some, half built, raise again when deleted
    try:
        with panics_as_errors():
            return _WandbCallback() if name == "wandb" else INTEGRATION_TO_CALLBACK[name]()
    except Exception as error:  # each looks for its package, and says how to get it
        told = first_line(error)
    finally:
        sys.unraisablehook = hook
    raise UserError(f"--report_to {name}: {told}{_HINTS.get(name, '')}")


class Trackers:
    """The trackers of one run.

    Attributes:
        callback: Give it to the trainer, whose own `report_to` must then be ``"none"``.
        lines: Where each tracker writes, for the start summary.
    """

    def __init__(self, callbacks: Mapping[str, TrainerCallback], *, wandb_mode: str, wandb_reason: str = ""):
        self.lines: list[str] = []
        self.callback = TrackersCallback()
        self._callbacks = dict(callbacks)
        self._wandb = self._callbacks.pop("wandb", None)
        for name, callback in self._callbacks.items():
            self.callback.add(name, callback)
        self._wandb_mode = wandb_mode
        self._wandb_reason = wandb_reason
        self._wandb_run: Any = None
        self._wandb_ours = False

    @property
    def written(self) -> tuple[str, ...]:
        """Names of what `start` has written in the run directory."""
        return ("wandb", "trackers.json") if self._wandb_run is not None else ()

    def start(
        self,
        *,
        directory: RunDirectory,
        config: Mapping[str, Any],
        run_name: str | None = None,
        project: str | None = None,
        entity: str | None = None,
        resume: bool = False,
    ) -> None:
        """Open the run at W&B, and list where each tracker writes; the others open when training begins.

        Args:
            directory: The run directory. It gets local files, and the ids that a resumed run continues.
            config: The resolved configuration, without secrets.
            run_name: The run's name at W&B and TensorBoard; None: the run directory's.
            project: W&B's project; None: as WANDB_PROJECT or an earlier start says.
            entity: The user or team at W&B; None: as WANDB_ENTITY or an earlier start says.
            resume: Continue the runs that `directory` records.
        """
        if self._wandb is not None:
            known = directory.tracker_record("wandb") if resume else {}
            where = {
                "name": run_name or os.environ.get("WANDB_NAME") or directory.path.resolve().name,
                "project": project or os.environ.get("WANDB_PROJECT") or known.get("project") or PROJECT,
                "entity": entity or os.environ.get("WANDB_ENTITY") or known.get("entity"),
                "id": os.environ.get("WANDB_RUN_ID") or known.get("id"),
                # Offline, the id alone joins the parts into one run once they are uploaded.
                "resume": "allow" if known and "WANDB_RESUME" not in os.environ else None,
            }
            self._start_wandb(directory, config, where)
        for tracker, callback in self._callbacks.items():
            if tracker == "tensorboard" and callback.logging_dir is None:
                folder = directory.path / "tensorboard"
                callback.logging_dir = str(folder / run_name.replace("/", "-") if run_name else folder)
                self.lines.append(f"TensorBoard: tensorboard --logdir {quoted(str(folder))}")
            else:
                self.lines.append({"trackio": "Trackio: trackio show"}.get(tracker, tracker))

    def finish(
        self, *, summary: Mapping[str, Any] | None = None, adapter: Path | None = None, exit_status: int = 0
    ) -> None:
        """Close the runs, also after a training that broke off; never raises.

        Args:
            summary: The fields of `summary.json`, shown in W&B's run summary.
            adapter: The adapter's folder, uploaded if WANDB_LOG_MODEL asks for it.
            exit_status: 0 if the run went well.
        """
        self.callback.end()
        run, self._wandb_run = self._wandb_run, None
        if run is None:
            return
        try:
            import wandb

            run.summary.update(plain(summary or {}))
            wanted = os.environ.get("WANDB_LOG_MODEL", "false").lower() in ("true", "end", "checkpoint")
            if adapter is not None and wanted:
                artifact = wandb.Artifact(name=f"adapter-{run.id}", type="model")
                artifact.add_dir(str(adapter))
                run.log_artifact(artifact)
            if self._wandb_ours:
                run.finish(exit_code=exit_status)
                # Waits for W&B's own process, which writes the end of a run after `finish`.
                wandb.teardown()
        except Exception as error:
            note(f"W&B could not close the run ({first_line(error)}); nothing of the training is lost")

    def _start_wandb(
        self, directory: RunDirectory, config: Mapping[str, Any], where: Mapping[str, Any]
    ) -> None:
        if self._wandb_mode == "disabled":
            self.lines.append(f"W&B: off ({self._wandb_reason})")
            return
        import wandb

        self._wandb_ours = wandb.run is None
        try:
            run = wandb.run or self._init_wandb(directory, config, where)
        except Exception as error:
            if self._wandb_mode != "online":
                self.lines.append(f"W&B: off, it could not start ({first_line(error)})")
                return
            if _REJECTED.search(str(error)):
                raise UserError(
                    f"W&B refused the run: {first_line(error)}. Check --wandb_entity and --wandb_project, or "
                    "use --report_to none"
                ) from error
            self._wandb_mode, self._wandb_reason = "offline", f"no connection: {first_line(error)}"
            self._start_wandb(directory, config, where)
            return
        self._wandb_run = run
        directory.write_tracker_record("wandb", {"id": run.id, "project": run.project, "entity": run.entity})
        self.callback.add("W&B", self._wandb)
        if self._wandb_mode == "offline":
            folder = Path(run.settings.sync_dir)
            if folder.is_relative_to(Path.cwd()):
                folder = folder.relative_to(Path.cwd())
            self.lines.append(f"W&B: offline ({self._wandb_reason}); upload with  wandb sync {folder}")
        else:
            self.lines.append(f"W&B: {run.url}")

    def _init_wandb(
        self, directory: RunDirectory, config: Mapping[str, Any], where: Mapping[str, Any]
    ) -> Any:
        import wandb

        settings = wandb.Settings(
            silent=True,
            # Captured output would hold the progress bar, and its capture garbles it.
            console="off",
            finish_timeout=_FINISH_SECONDS,
            # W&B records the command line, which must not happen if it holds a secret.
            x_disable_meta=without_secrets(sys.argv) != sys.argv,
        )
        online = self._wandb_mode == "online"
        folder = os.environ.get("WANDB_DIR") or str(directory.path)
        Path(folder).mkdir(parents=True, exist_ok=True)
        init = partial(
            wandb.init,
            **{**where, "resume": where["resume"] if online else None},
            config=plain(config),
            allow_val_change=True,
            dir=folder,
            mode=self._wandb_mode,
            settings=settings,
        )
        return _in_time(init, _INIT_SECONDS)


class TrackersCallback:
    """Passes all of the trainer's events to the trackers and catches their failures."""

    def __init__(self) -> None:
        self._trackers: list[tuple[str, TrainerCallback]] = []
        self._failures: dict[str, int] = {}
        self._told: set[str] = set()
        self._open: tuple[Any, Any, Any] | None = None

    def add(self, name: str, tracker: TrainerCallback) -> None:
        self._trackers.append((name, tracker))

    def end(self) -> None:
        """Tell the trackers that training ended, if it broke off before."""
        if self._open is not None:
            self._pass_on("on_train_end", *self._open)

    def __getattr__(self, event: str) -> Any:
        if not event.startswith("on_"):
            raise AttributeError(event)
        return partial(self._pass_on, event)

    def _pass_on(self, event: str, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Pass `event` to each tracker; warn once if one raises, and drop it if it keeps failing."""
        if event in ("on_train_begin", "on_train_end"):
            self._open = (args, state, control) if event == "on_train_begin" else None
        for name, tracker in list(self._trackers):
            try:
                # A copy each: some remove from the logs what they do not show.
                own = {**kwargs, "logs": dict(kwargs["logs"])} if kwargs.get("logs") else kwargs
                with panics_as_errors():
                    getattr(tracker, event)(args, state, control, **own)
                self._failures[name] = 0
            except Exception as error:
                self._failures[name] = self._failures.get(name, 0) + 1
                if name not in self._told:
                    self._told.add(name)
                    note(f"{name} failed ({first_line(error)}); the training goes on")
                if self._failures[name] >= _PATIENCE:
                    self._trackers.remove((name, tracker))


class _WandbCallback(WandbCallback):
    """Transformers' callback, for a run that is already open and has its configuration."""

    def __init__(self) -> None:
        super().__init__()
        # Its upload builds a second trainer; Trackers.finish uploads instead.
        self._log_model = WandbLogModel.FALSE

    def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
        self._initialized = True
        self._wandb.define_metric("train/global_step")
        self._wandb.define_metric("*", step_metric="train/global_step", step_sync=True)


def _in_time(work: Callable[[], Any], seconds: float) -> Any:
    """What `work` returns. W&B waits without end for its own process where that fails as it starts.

    Raises:
        TimeoutError: after so long.
        Exception: what `work` raises.
    """
    found: list[tuple[Any, Exception | None]] = []

    def run() -> None:
        try:
            found.append((work(), None))
        except Exception as error:
            found.append((None, error))

    thread = threading.Thread(target=run, name="W&B", daemon=True)
    thread.start()
    thread.join(seconds)
    if not found:
        raise TimeoutError(f"its own process does not answer within {seconds:.0f} s")
    result, error = found[0]
    if error is not None:
        raise error
    return result


def _wandb_mode() -> tuple[str, str]:
    """How W&B will run: ``online``, ``offline`` or ``disabled``, and why."""
    # Before W&B is imported: its background process reads these when it starts.
    os.environ.setdefault("WANDB_ERROR_REPORTING", ENVIRONMENT["WANDB_ERROR_REPORTING"])
    import wandb

    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes"):
        return "disabled", "WANDB_DISABLED is set"
    try:
        # Starts its process.
        mode = _in_time(
            lambda: wandb.setup(settings=wandb.Settings(silent=True)).settings.mode, _START_SECONDS
        )
    except Exception as error:
        raise UserError(
            f"--report_to wandb: W&B could not start ({first_line(error)}). Try again, or train without it: "
            "--report_to none"
        ) from None
    if mode == "disabled":
        return "disabled", "W&B's mode is disabled"
    if mode in ("offline", "dryrun"):
        return "offline", "W&B's mode is offline"
    try:
        found = wandb.login(verify=True, prompt=False)  # its server checks the key
    except wandb.errors.AuthenticationError as error:
        if _REJECTED.search(str(error)):
            raise UserError(
                f"W&B rejected the key: {first_line(error)}. Log in again (wandb login --relogin) or set "
                "another WANDB_API_KEY; or run without it: WANDB_MODE=offline, or --report_to none"
            ) from error
        return "offline", "its server cannot be reached"
    return ("online", "") if found else ("offline", "no key; wandb login stores one")
