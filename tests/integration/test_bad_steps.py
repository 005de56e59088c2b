"""A step whose gradients are not finite changes no weight, with whichever optimizer."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import falcon_qlora
from falcon_qlora import trainer
from falcon_qlora.checkpoint.verify import fault
from falcon_qlora.errors import UserError
from falcon_qlora.step import accumulate_gradients
from tests.integration.interrupted import assert_same_run
from tests.integration.runs import summary
from tests.integration.test_kernels_flag import fine_tune

BAD = 2


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "adamw_torch", "paged_adamw_8bit"])
def test_a_bad_step_changes_nothing(optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before: list[torch.Tensor] = []

    def faulty(model: Any, *args: Any, **words: Any) -> Any:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        before.append(torch.cat([parameter.detach().flatten() for parameter in trained]))
        loss, halvings = accumulate_gradients(model, *args, **words)
        if len(before) == BAD:
            for parameter in trained[3:]:  # most; the loss is fine
                parameter.grad.fill_(torch.nan)  # type: ignore[union-attr]
        return loss, halvings

    monkeypatch.setattr(trainer, "accumulate_gradients", faulty)
    settings: dict[str, Any] = {"optim": optimizer, "max_steps": 4, "max_rows": 40, "max_length": 64}
    settings |= {
        "eval_split": None,
        "eval_steps": None,
        "save_strategy": "no",
        "weight_decay": 0.1,
        "warmup_steps": 0,
    }
    run = fine_tune(tmp_path / "run", **settings)
    changed = [not torch.equal(one, other) for one, other in pairwise(before)]
    assert changed == [True, False, True]
    assert all(each.isfinite().all() for each in before)
    assert summary(run)["bad_steps"] == 1


def spoil(monkeypatch: pytest.MonkeyPatch, bad: set[int]) -> None:
    """Make the losses of these steps, from 1, not numbers."""

    def faulty(model: Any, share: Any, **words: Any) -> Any:
        loss, halvings = accumulate_gradients(model, share, **words)
        return loss * torch.nan if share.step + 1 in bad else loss, halvings

    monkeypatch.setattr(trainer, "accumulate_gradients", faulty)


@pytest.mark.slow
def test_a_run_whose_numbers_stay_bad_is_saved_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"max_steps": 8, "max_rows": 40, "max_length": 64, "save_steps": 6}
    settings |= {"eval_split": None, "eval_steps": None, "max_bad_steps": 2, "logging_steps": 3}
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        spoil(patch, {3, 4})
        with pytest.raises(
            UserError, match=rf"2 steps in a row .* checkpoint is {run}/checkpoints/step-5: --resume"
        ):
            fine_tune(run, **settings)
        assert fault(run / "checkpoints" / "step-5") is None
        falcon_qlora.train(resume=run)
        whole = fine_tune(tmp_path / "whole", **{**settings, "max_bad_steps": 0})
    assert_same_run(run, whole)


def test_a_run_without_a_good_step_leaves_no_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, {1, 2})
    with pytest.raises(UserError, match="all 2 steps had a loss or gradient that is not finite"):
        fine_tune(tmp_path / "run", max_steps=2, max_rows=40, max_length=64, eval_split=None, eval_steps=None)
    assert not (tmp_path / "run" / "adapter").exists()
