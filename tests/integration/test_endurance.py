"""A few draws of `tests.endurance`."""

from __future__ import annotations

import pytest

from tests import endurance


@pytest.mark.slow
def test_a_few_interruptions(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "")  # which it sets
    monkeypatch.setenv("PLACES", "")
    status = endurance.main(["--draws", "5", "--minutes", "1.5", "--seed", "3"])
    assert status == 0, capsys.readouterr().out
