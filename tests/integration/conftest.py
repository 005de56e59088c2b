"""What several files of tests copy from."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import falcon_qlora
from falcon_qlora import __main__ as cli
from tests.integration import forks
from tests.integration.runs import write_jsonl

STEP = 2


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test starts by itself is a fork too, see `forks`."""
    monkeypatch.setattr(subprocess, "Popen", forks.Popen)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run`, `streamed` (a run over a stream), `full` (of every weight) and `merged`."""
    folder = tmp_path_factory.mktemp("written")
    rows = [{"instruction": f"Say {number}.", "output": f"It is {number}."} for number in range(40)]
    data = write_jsonl(folder / "rows.jsonl", rows)

    def train(name: str, **settings: Any) -> None:
        run = falcon_qlora.train(
            model_name_or_path="tiny",
            dataset_name=data,
            output_dir=folder / name,
            max_length=64,
            max_steps=STEP,
            save_steps=STEP,
            report_to="none",
            cache_dir=folder / "cache",
            **settings,
        )
        # As W&B would have it written.
        (run / "trackers.json").write_text(json.dumps({"wandb": {"id": "abc", "project": "p"}}))

    train("run", lora_r=4, eval_split=0.25, generate_samples=1, load_best_model_at_end=True)
    train("streamed", lora_r=4, streaming=True)
    train("full", method="full", quantize_mode="16bit", learning_rate=1e-4)
    words = ["--adapter", str(folder / "run"), "--out", str(folder / "merged")]
    assert cli.main(["merge", *words, "--base", "dequantized", "--max_shard_size", "3MB"]) == 0
    return folder
