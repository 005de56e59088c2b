"""A step whose gradients are not finite changes no weight, with whichever optimizer."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from falcon_qlora import trainer
from falcon_qlora.step import accumulate_gradients
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
