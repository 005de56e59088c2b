"""On GPUs: in fp16 a gradient that overflows is one thing, one that is no number at any scale another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from falcon_qlora.common.errors import UserError
from falcon_qlora.step import global_batch
from falcon_qlora.step.loss import accumulate_gradients
from tests.integration.runs import summary
from tests.integration.test_kernels_flag import fine_tune

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

SETTINGS: dict[str, Any] = {"compute_dtype": "fp16", "max_rows": 200, "max_length": 64, "eval_split": None}
SETTINGS |= {"eval_steps": None, "save_strategy": "no", "max_steps": 40}


def spoil(monkeypatch: pytest.MonkeyPatch, number: float, steps: set[int]) -> None:
    """Put `number` into the gradients of these steps, from 1; the losses are fine."""

    def faulty(model: Any, share: Any, **words: Any) -> Any:
        result = accumulate_gradients(model, share, **words)
        if share.step + 1 in steps:
            next(p for p in model.parameters() if p.requires_grad).grad.fill_(number)  # type: ignore[union-attr]
        return result

    monkeypatch.setattr(global_batch, "accumulate_gradients", faulty)


@pytest.mark.parametrize("norm", [1.0, 0.0])
def test_gradients_that_are_no_numbers_at_any_scale_are_bad_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, norm: float
) -> None:
    spoil(monkeypatch, torch.nan, set(range(1, 41)))
    with pytest.raises(UserError, match="2 steps in a row had a non-finite loss or gradient"):
        fine_tune(tmp_path / "run", **SETTINGS, max_bad_steps=2, max_grad_norm=norm)


def test_some_that_overflow_are_the_scalers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, torch.inf, {2, 5, 6})
    run = fine_tune(tmp_path / "run", **{**SETTINGS, "max_steps": 8}, max_bad_steps=2)
    assert summary(run)["bad_steps"] == 0
    assert summary(run)["overflowed_steps"] >= 3
