"""The process that is furthest behind hangs: so places rise as it comes along, and waiting has its own."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from falcon_qlora.data.batches import Share, TrainingSteps
from falcon_qlora.processes.watchdog import Watchdog
from falcon_qlora.training.trainer import FalconTrainer
from tests.integration.test_adapter import fine_tune


def test_places_rise_through_steps_evaluations_and_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[tuple[int, int, str]] = []
    monkeypatch.setattr(Watchdog, "at", lambda self, *place: places.append(place))
    fine_tune(tmp_path, eval_split=0.3, eval_steps=1, save_steps=1, max_steps=2)
    assert all(one[:2] <= other[:2] for one, other in pairwise(places)), places
    second = [what for step, _, what in dict.fromkeys(places) if step == 2]
    assert second == [
        "reading data",
        "computing",
        "adding up the gradients",
        "waiting for the device",
        "evaluating",
        "adding up the evaluation",
        "saving a checkpoint",
    ]
    assert len({place[:2] for place in places if place[0] == 2}) == len(second)


def test_a_step_is_read_before_the_one_before_it_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    read, log = TrainingSteps.__getitem__, FalconTrainer.log

    def reading(self: TrainingSteps, step: int) -> Share:
        seen.append(f"read {step + 1}")
        if step == 2:
            raise OSError("the disk is gone")
        return read(self, step)

    def logging(self: FalconTrainer, logs: dict[str, float], *more: float) -> None:
        seen.append(f"logged {self.state.global_step}")
        log(self, logs, *more)

    monkeypatch.setattr(TrainingSteps, "__getitem__", reading)
    monkeypatch.setattr(FalconTrainer, "log", logging)
    with pytest.raises(OSError, match="the disk is gone"):
        fine_tune(tmp_path, max_steps=4)
    # The loop reads the loss, for which the device is waited for, to log it; an error does not come before.
    assert seen == ["read 1", "read 2", "logged 1", "read 3", "logged 2"]
