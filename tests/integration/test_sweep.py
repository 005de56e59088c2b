"""launch/sweep.yaml, as W&B's own agent makes a command of it; the agent's server is not there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from wandb import wandb_agent

from tests.integration import runs
from tests.integration.runs import command, write_jsonl

pytestmark = pytest.mark.slow


def test_the_command_of_a_sweeps_agent_trains_and_reports_to_its_run(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = yaml.safe_load((repository / "launch" / "sweep.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    for name, value in (("SWEEP_ID", "a_sweep"), ("RUN_ID", ""), ("SWEEP_PARAM_PATH", ""), ("DIR", ".")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    rows = [{"instruction": f"Say {n}.", "output": f"It is {n}."} for n in range(20)]
    chosen: dict[str, Any] = {
        name: each.get("value", each.get("min", (each.get("values") or [None])[-1]))
        for name, each in sweep["parameters"].items()
    }
    chosen |= {"model_name_or_path": "tiny", "dataset_name": write_jsonl(tmp_path / "rows.jsonl", rows)}
    chosen |= {"max_steps": 2, "eval_split": 0.2}
    began: list[list[str]] = []

    def begin(command: list[str], **_: Any) -> Any:
        began.append(command)
        return SimpleNamespace()

    monkeypatch.setattr(wandb_agent, "AgentProcess", begin)
    agent = wandb_agent.Agent(None, None, sweep_id="a_sweep")
    agent._sweep_command = sweep["command"]
    args = {
        name: {"value": str(value) if isinstance(value, Path) else value} for name, value in chosen.items()
    }
    asked = {"type": "run", "run_id": "a_run", "program": sweep["program"], "args": args}
    assert "exception" not in agent._process_command(asked)
    (words,) = began
    assert words[:3] == ["/usr/bin/env", "falcon-qlora", "train"]

    monkeypatch.setitem(runs.ENVIRONMENT, "WANDB_MODE", "offline")
    ended = command(*words[2:], "--max_length", "64", "-b", "2", "--output_dir", "run")
    assert ended.returncode == 0, ended.stderr
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (settings["learning_rate"], settings["lora_r"], settings["lora_dropout"]) == (5e-5, 64, 0.05)
    (file,) = (tmp_path / "wandb").glob("offline-run-*-a_run/run-a_run.wandb")
    metric = "eval/loss"
    assert sweep["metric"] == {"name": metric, "goal": "minimize"}
    assert metric.encode() in file.read_bytes()
