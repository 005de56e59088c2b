"""The process that is furthest behind hangs: so places rise as it comes along, and waiting has its own."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from falcon_qlora.processes.watchdog import Watchdog
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
