"""What a run draws at random, rows by weights and noise, is drawn the same when the run goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import falcon_qlora
from falcon_qlora.checkpoint.manifest import MANIFEST
from falcon_qlora.common.errors import UserError
from falcon_qlora.data.packing import Plan
from tests.integration.interrupted import assert_same_run
from tests.integration.runs import metrics, summary, write_jsonl
from tests.integration.test_adapter import fine_tune


def test_weighted_epochs_and_noise_go_on_as_they_would_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws: dict[int, list[int]] = {}
    drawn = Plan._drawn

    def noted(self: Plan, epoch: int) -> Any:
        found = drawn(self, epoch)
        assert draws.setdefault(epoch, found.tolist()) == found.tolist()
        return found

    monkeypatch.setattr(Plan, "_drawn", noted)
    files = [
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {n} {2 * n}"} for n in range(count)])
        for name, count in (("many", 24), ("few", 4))
    ]
    settings: dict[str, Any] = {"dataset_name": files, "dataset_weights": [1, 1], "max_steps": -1}
    settings |= {"num_train_epochs": 3, "neftune_noise_alpha": 5, "lora_r": 4, "logging_steps": 1}
    whole = fine_tune(tmp_path, **settings, save_steps=2, save_total_limit=9)
    assert len({tuple(draw) for draw in draws.values()}) == len(draws) >= 3
    assert summary(whole)["samples"] == 3 * 28
    assert json.loads((whole / "data.json").read_text())["documents"] == 28
    steps = len(metrics(whole))
    assert steps > 4
    again = shutil.copytree(whole, tmp_path / "again")
    falcon_qlora.train(resume=again / "checkpoints" / "step-2")
    assert_same_run(whole, again)

    quiet = fine_tune(tmp_path, **{**settings, "neftune_noise_alpha": None}, output_dir=tmp_path / "quiet")
    assert metrics(quiet)[0]["loss"] != metrics(whole)[0]["loss"]

    for manifest in (again / "checkpoints").glob(f"step-*/{MANIFEST}"):
        record = json.loads(manifest.read_text())
        del record["drawing"]  # of a release before
        manifest.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"^--resume: .* drew the rows by --dataset_weights once for all"):
        falcon_qlora.train(resume=again, num_train_epochs=4)
