"""Trackers: offline without a key, an error for a rejected one, and never the end of a run."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import time
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import wandb
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from falcon_qlora.common.errors import UserError
from falcon_qlora.config.arguments import TRACKERS
from falcon_qlora.run_folder import tracking
from falcon_qlora.run_folder.directory import RunDirectory
from falcon_qlora.terminal import console
from tests.panics import PanicException

KEY = "0123456789" * 4
EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]


@pytest.fixture(autouse=True)
def fresh_wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts W&B anew: it keeps the settings it first saw."""
    monkeypatch.delenv("WANDB_MODE")
    console.console.cache_clear()
    yield
    wandb.teardown()


def _train(trackers: tracking.Trackers, steps: int = 3) -> None:
    state = SimpleNamespace(is_world_process_zero=True, is_hyper_param_search=False, trial_name=None)
    args = SimpleNamespace(run_name=None, to_json_string=lambda: "{}")
    state.global_step = 0
    trackers.callback.on_train_begin(args, state, None, model=None)
    for step in range(1, steps + 1):
        state.global_step = step
        trackers.callback.on_log(args, state, None, model=None, logs={"loss": 1.0 / step, "eval_loss": 2.0})
    trackers.callback.on_train_end(args, state, None, model=None)


def _offline_files(directory: RunDirectory) -> list[Path]:
    return sorted((directory.path / "wandb").glob("offline-run-*/run-*.wandb"))


def test_without_a_key_wandb_runs_offline_and_says_so(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    trackers = tracking.choose(["wandb"])
    trackers.start(directory=directory, config={"lora_r": 64})
    _train(trackers)
    trackers.finish(summary={"steps": 3})
    assert trackers.lines[0].startswith("W&B: offline (no key")
    (file,) = _offline_files(directory)
    # The record is a log of protobuf messages: names and values stand in it as they are.
    content = file.read_bytes()
    for part in (b"lora_r", b"train/loss", b"eval/loss", b"train/global_step"):
        assert part in content
    assert wandb.run is None


def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    ids = []
    for resume in (False, True, False):
        trackers = tracking.choose(["wandb"])
        trackers.start(directory=directory, config={}, resume=resume)
        ids.append(directory.tracker_record("wandb")["id"])
        trackers.finish()
    assert ids[0] == ids[1]
    assert ids[2] != ids[0]


def test_the_resumed_id_and_permission_to_resume_reach_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = RunDirectory(tmp_path)
    directory.write_tracker_record("wandb", {"id": "abc123", "project": "p", "entity": "me"})
    seen: dict[str, Any] = {}
    _pretend_online(monkeypatch, seen)
    trackers = tracking.choose(["wandb"])
    trackers.start(directory=directory, config={"seed": 1}, resume=True)
    assert (seen["id"], seen["resume"], seen["mode"]) == ("abc123", "allow", "online")
    assert (seen["project"], seen["entity"], seen["config"]) == ("p", "me", {"seed": 1})
    assert trackers.lines == ["W&B: https://example.invalid/run"]


def test_wandb_variables_are_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    _pretend_online(monkeypatch, seen)
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("WANDB_NAME", "named")
    monkeypatch.setenv("WANDB_RUN_ID", "chosen")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    tracking.choose(["wandb"]).start(directory=RunDirectory(tmp_path / "run"), config={})
    assert (seen["project"], seen["name"], seen["id"]) == ("theirs", "named", "chosen")
    assert seen["dir"] == str(tmp_path / "elsewhere")


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_wandb_mode_is_respected_and_no_key_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setattr(wandb, "login", lambda **_: pytest.fail("asked for the key"))
    directory = RunDirectory(tmp_path)
    trackers = tracking.choose(["wandb"])
    trackers.start(directory=directory, config={})
    trackers.finish()
    assert bool(_offline_files(directory)) == (mode == "offline")
    assert mode in trackers.lines[0]


@pytest.mark.parametrize(
    "answer",
    ["returned error 401: {}", "invalid credentials: no account", "error 403", "user is not logged in"],
)
def test_a_rejected_key_is_an_error_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    def verify(**_: Any) -> bool:
        raise wandb.errors.AuthenticationError(
            f"Failed to authenticate with https://example.invalid: {answer}"
        )

    monkeypatch.setattr(wandb, "login", verify)
    with pytest.raises(UserError, match=r"W&B rejected the key.*WANDB_API_KEY.*--report_to none"):
        tracking.choose(["wandb"])


def test_a_key_of_the_wrong_form_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(UserError, match="rejected the key") as error:
        tracking.choose(["wandb"])
    assert "short" not in str(error.value).replace("shorter", "")


def test_a_server_that_cannot_be_reached_means_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def verify(**_: Any) -> bool:
        raise wandb.errors.AuthenticationError("the service process is busy and did not respond in time")

    monkeypatch.setattr(wandb, "login", verify)
    trackers = tracking.choose(["wandb"])
    trackers.start(directory=RunDirectory(tmp_path), config={})
    trackers.finish()
    assert trackers.lines[0].startswith("W&B: offline (its server cannot be reached)")


def test_a_start_that_fails_online_goes_on_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init = wandb.init

    def fail_online(**options: Any) -> Any:
        if options["mode"] == "online":
            raise wandb.errors.CommError("run initialization has timed out after 90.0 sec")
        return init(**options)

    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.setattr(wandb, "init", fail_online)
    trackers = tracking.choose(["wandb"])
    trackers.start(directory=RunDirectory(tmp_path), config={})
    trackers.finish()
    assert "timed out" in trackers.lines[0]
    assert _offline_files(RunDirectory(tmp_path))


@pytest.mark.parametrize("error", [ConnectionError, PanicException])
def test_a_tracker_that_raises_is_told_of_once_and_never_stops_the_run(
    capsys: pytest.CaptureFixture[str], error: type[BaseException]
) -> None:
    class Broken(TrainerCallback):
        calls = 0

        def on_log(self, *arguments: Any, **kwargs: Any) -> None:
            self.calls += 1
            raise error("the network is down")

    broken, trackers = Broken(), tracking.choose(["none"])
    seen = _Recorder()
    trackers.callback.add("broken", broken)
    trackers.callback.add("working", seen)
    _train(trackers, steps=10)
    output = capsys.readouterr().out
    assert len(re.findall(r"broken failed \(.*the network is down\); the training goes on", output)) == 1
    assert broken.calls == 3, "after three failures in a row it is left alone"
    assert seen.events.count("on_log") == 10


def test_wandb_failing_in_mid_run_does_not_stop_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trackers = tracking.choose(["wandb"])
    trackers.start(directory=RunDirectory(tmp_path), config={})

    def fail(*arguments: Any, **options: Any) -> None:
        raise wandb.errors.CommError("lost")

    monkeypatch.setattr(wandb, "log", fail)
    _train(trackers)
    monkeypatch.setattr(trackers._wandb_run, "finish", fail)
    run = wandb.run
    trackers.finish()
    output = capsys.readouterr().out
    assert output.count("W&B failed (lost)") == 1
    assert "could not close the run (lost)" in output
    monkeypatch.undo()
    run.finish()


def test_every_event_of_the_loop_reaches_a_tracker() -> None:
    callback, seen = tracking.TrackersCallback(), _Recorder()
    callback.add("seen", seen)
    for event in EVENTS:
        getattr(callback, event)(None, None, None)
    assert seen.events == EVENTS


def test_one_tracker_changing_the_logs_does_not_change_anothers() -> None:
    class Greedy(TrainerCallback):
        def on_log(self, *arguments: Any, logs: Any = None, **kwargs: Any) -> None:
            logs.clear()

    callback, seen, logs = tracking.TrackersCallback(), _Recorder(), {"loss": 1.0}
    callback.add("greedy", Greedy())
    callback.add("seen", seen)
    callback.on_log(None, None, None, logs=logs)
    assert logs == seen.logs == {"loss": 1.0}


def test_other_processes_have_no_trackers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(wandb, "login", lambda **_: pytest.fail("asked for the key"))
    trackers = tracking.choose(["wandb", "mlflow"])
    trackers.start(directory=RunDirectory("nowhere"), config={})
    assert trackers.lines == []


def test_the_flag_takes_every_tracker_of_transformers() -> None:
    assert set(TRACKERS) == {*INTEGRATION_TO_CALLBACK, "none"}


@pytest.mark.parametrize(
    ("tracker", "told"),
    [
        ("azure_ml", "pip install azureml-sdk"),
        ("clearml", "pip install clearml"),
        ("codecarbon", "pip install codecarbon"),
        ("comet_ml", "pip install comet-ml.*COMET_API_KEY"),
        ("dagshub", "pip install mlflow"),
        ("dvclive", "pip install dvclive"),
        ("flyte", "pip install flytekit"),
        ("kubeflow", "KUBEFLOW_TRAINER_SERVER_URL"),
        ("mlflow", "pip install mlflow"),
        ("neptune", "pip install neptune"),
        ("swanlab", "pip install swanlab"),
        ("tensorboard", "pip install tensorboard"),
        ("trackio", "pip install trackio"),
        ("wandb", "pip install wandb"),
    ],
)
def test_a_tracker_that_is_not_installed_is_an_error_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tracker: str, told: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    unraisable: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    with pytest.raises(UserError, match=rf"^--report_to {tracker}: .*{told}") as error:
        tracking.choose([tracker])
    assert "\n" not in str(error.value)
    assert unraisable == [], "they would be shown after the message"


def test_every_tracker_is_transformers_own_from_the_trainers_beginning_to_its_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """CodeCarbon's begins with the trainer, and its meter with the training."""
    told: list[str] = []

    class EmissionsTracker:
        def __init__(self, output_dir: str) -> None:
            told.append(output_dir)

        def start(self) -> None:
            told.append("start")

        def stop(self) -> None:
            told.append("stop")

    codecarbon = ModuleType("codecarbon")
    codecarbon.EmissionsTracker = EmissionsTracker  # type: ignore[attr-defined]
    codecarbon.__spec__ = ModuleSpec("codecarbon", None)
    monkeypatch.setitem(sys.modules, "codecarbon", codecarbon)
    trackers = tracking.choose(["codecarbon"])
    state = SimpleNamespace(is_local_process_zero=True, is_world_process_zero=True)
    args = SimpleNamespace(output_dir="run")
    trackers.callback.on_init_end(args, state, None)
    trackers.start(directory=RunDirectory(tmp_path), config={})
    trackers.callback.on_train_begin(args, state, None, model=None)
    assert (trackers.lines, told) == (["codecarbon"], ["run", "start"])
    trackers.finish(exit_status=1)  # stopped, or failed
    assert told == ["run", "start", "stop"]
    trackers.finish()
    assert told[3:] == []


@pytest.mark.parametrize(
    ("run_name", "variable", "shown"), [("flag", "env", "flag"), (None, "env", "env"), (None, None, "run")]
)
def test_a_flag_wins_over_a_variable_and_names_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_name: str | None, variable: str | None, shown: str
) -> None:
    seen: dict[str, Any] = {}
    _pretend_online(monkeypatch, seen)
    for name in ("NAME", "PROJECT", "ENTITY"):
        monkeypatch.setenv(f"WANDB_{name}", variable or "")
    trackers = tracking.choose(["wandb"])
    trackers.start(
        directory=RunDirectory(tmp_path / "run"),
        config={},
        run_name=run_name,
        project=run_name and "p",
        entity=run_name and "e",
    )
    assert seen["name"] == shown
    assert (seen["project"], seen["entity"]) == (
        ("p", "e") if run_name else (variable or tracking.PROJECT, variable or None)
    )


@pytest.mark.parametrize(("run_name", "folder"), [(None, ""), ("a/b", "a-b")])
def test_a_name_is_tensorboards_name_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_name: str | None, folder: str
) -> None:
    written: dict[str, float] = {}

    class SummaryWriter:
        def __init__(self, log_dir: str) -> None:
            assert log_dir == str(tmp_path / "tensorboard" / folder)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written[name] = value

        def add_text(self, *arguments: Any) -> None:
            pass

        flush = close = lambda self: None

    board = ModuleType("tensorboardX")
    board.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    board.__spec__ = ModuleSpec("tensorboardX", None)
    monkeypatch.setitem(sys.modules, "tensorboardX", board)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    trackers = tracking.choose(["tensorboard"])
    trackers.start(directory=RunDirectory(tmp_path), config={}, run_name=run_name)
    _train(trackers)
    assert trackers.lines == [f"TensorBoard: tensorboard --logdir {tmp_path / 'tensorboard'}"]
    assert written == {"train/loss": 1 / 3, "eval/loss": 2.0}


def test_no_tracker_is_no_tracker(tmp_path: Path) -> None:
    trackers = tracking.choose(["none"])
    trackers.start(directory=RunDirectory(tmp_path), config={})
    _train(trackers)
    trackers.finish()
    assert trackers.lines == []
    assert list(tmp_path.iterdir()) == []


def test_wandb_prints_nothing_of_its_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trackers = tracking.choose(["wandb"])
    trackers.start(directory=RunDirectory(tmp_path), config={})
    _train(trackers)
    trackers.finish()
    output = capfd.readouterr()
    assert output.out == output.err == ""


def test_a_token_on_the_command_line_is_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "--hub_token", "hf_secretsecret"])
    directory = RunDirectory(tmp_path)
    trackers = tracking.choose(["wandb"])
    trackers.start(directory=directory, config={})
    trackers.finish()
    for file in directory.path.rglob("*"):
        assert not file.is_file() or b"hf_secretsecret" not in file.read_bytes()


class _Recorder(TrainerCallback):
    def __init__(self) -> None:
        self.events: list[str] = []
        self.logs: Any = None


def _record(event: str) -> Any:
    def method(self: _Recorder, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.events.append(event)
        self.logs = logs

    return method


for _event in EVENTS:
    setattr(_Recorder, _event, _record(_event))


def _pretend_online(monkeypatch: pytest.MonkeyPatch, seen: dict[str, Any]) -> None:
    """Have W&B take the key and record what its run is opened with."""

    def init(**options: Any) -> Any:
        seen.update(options)
        url = "https://example.invalid/run"
        return SimpleNamespace(id=options["id"] or "new", project="p", entity="me", url=url)

    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.setattr(wandb, "init", init)


@pytest.mark.parametrize(
    ("start", "why"),
    [
        (lambda **_: time.sleep(5), "its own process does not answer within 0 s"),
        (lambda **_: importlib.import_module("no.such"), "No module named 'no'"),
    ],
)
def test_wandb_that_does_not_start_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, start: Any, why: str
) -> None:
    monkeypatch.setattr(wandb, "setup", start)
    monkeypatch.setattr(tracking, "_START_SECONDS", 0.2)
    begun = time.monotonic()
    with pytest.raises(UserError, match=rf"W&B could not start \({why}\)\. .*--report_to none"):
        tracking.choose(["wandb"])
    assert time.monotonic() - begun < 3


def test_wandb_that_stops_answering_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb, "init", lambda **_: time.sleep(5))
    monkeypatch.setattr(tracking, "_INIT_SECONDS", 0.2)
    trackers = tracking.choose(["wandb"])
    trackers.start(directory=RunDirectory(tmp_path), config={})
    assert trackers.lines == ["W&B: off, it could not start (its own process does not answer within 0 s)"]
