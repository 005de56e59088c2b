"""A run that has trained nothing ends with an error that says why; one step is enough to train something."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

import falcon_qlora
from falcon_qlora.common.errors import UserError
from falcon_qlora.step import global_batch
from falcon_qlora.step.loss import accumulate_gradients
from falcon_qlora.training.moved import footprint
from falcon_qlora.training.trainer import FalconTrainer
from tests.integration.runs import command, metrics, write_jsonl
from tests.integration.test_adapter import fine_tune

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"quantize_mode": "4bit", "lora_r": 4},
    "adapter": {"quantize_mode": "4bit"},
    "adapter_v2": {"quantize_mode": "4bit"},
    "full": {"quantize_mode": "16bit"},
}


def still(self: Any, num_training_steps: int, optimizer: Any = None) -> Any:
    """`FalconTrainer.create_scheduler`, with a rate of 0 in every step."""
    self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda step: 0.0)
    return self.lr_scheduler


def refusal(folder: Path, **settings: Any) -> str:
    with pytest.raises(UserError, match=r"^nothing was trained: after ") as refused:
        fine_tune(folder, save_strategy="no", **settings)
    assert not (folder / "run" / "adapter").exists()
    return str(refused.value)


@pytest.mark.parametrize("method", METHODS)
def test_a_rate_that_a_schedule_keeps_at_0_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(FalconTrainer, "create_scheduler", still)
    said = refusal(tmp_path, method=method, max_steps=2, weight_decay=0.1, **METHODS[method])
    assert "after 2 steps" in said
    assert "The learning rate was 0 in every step: look at --learning_rate (0.01)" in said


@pytest.mark.parametrize("method", METHODS)
def test_gradients_that_reach_nothing_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Weight decay may move what does not start at zero: the adapter is the base all the same."""

    def unreached(model: Any, *args: Any, **words: Any) -> Any:
        loss, halvings = accumulate_gradients(model, *args, **words)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad.zero_()
        return loss, halvings

    monkeypatch.setattr(global_batch, "accumulate_gradients", unreached)
    decay = 0.0 if method == "full" else 0.1
    said = refusal(tmp_path, method=method, max_steps=2, weight_decay=decay, **METHODS[method])
    assert "No step had a finite gradient other than zero: the loss reaches nothing" in said


def test_updates_that_are_lost_in_rounding_are_told(tmp_path: Path) -> None:
    settings = {"method": "full", "compute_dtype": "bf16", "optim": "sgd", "learning_rate": 1e-12}
    said = refusal(tmp_path, max_steps=1, **settings)
    assert "lost in rounding, as the weights are bfloat16: raise --learning_rate (1e-12)" in said


def test_few_rows_for_a_step_or_two_are_told_and_logged(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = write_jsonl(
        tmp_path / "few.jsonl", [{"instruction": f"{n}?", "output": f"{n}."} for n in range(3)]
    )
    run = fine_tune(tmp_path, dataset_name=str(rows), max_steps=-1, num_train_epochs=1, quantize_mode="4bit")
    told = re.search(r"note: the rows make (\d) steps? in all, too few to learn much", capfd.readouterr().out)
    assert told
    assert [line["step"] for line in metrics(run)] == list(range(1, int(told[1]) + 1))


@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_one_step_trains(tmp_path: Path, method: str) -> None:
    run = fine_tune(
        tmp_path, method=method, max_steps=1, warmup_steps=0.03, learning_rate=1e-3, **METHODS[method]
    )
    (line,) = metrics(run)
    assert line["learning_rate"] == 1e-3
    if method == "lora":
        tensors = load_file(run / "adapter" / "adapter_model.safetensors")
        assert all(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)


def test_the_warm_up_of_transformers_in_a_run_of_one_step_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FalconTrainer, "create_scheduler", Trainer.create_scheduler)
    said = refusal(tmp_path, max_steps=1, warmup_steps=0.03, lora_r=4)
    assert "The learning rate was 0 in every step" in said


@pytest.mark.parametrize(
    ("schedule", "length", "longer"),
    [
        ("cosine", {"max_steps": -1, "num_train_epochs": 2}, {"num_train_epochs": 3}),
        ("linear", {"max_steps": 4}, {"max_steps": 7}),
        pytest.param(
            "linear",
            {"max_steps": -1, "num_train_epochs": 1.5},
            {"num_train_epochs": 3},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_that_goes_on_for_longer_has_the_longer_runs_rates(
    tmp_path: Path, schedule: str, length: dict[str, Any], longer: dict[str, Any]
) -> None:
    settings: dict[str, Any] = {"lora_r": 4, "lr_scheduler_type": schedule, "warmup_steps": 0.03}
    run = fine_tune(tmp_path, **settings, **length, logging_steps=1, max_length=32)
    before = len(metrics(run))
    falcon_qlora.train(resume=run, **longer)
    rates = [line["learning_rate"] for line in metrics(run)]
    steps = len(rates)
    assert steps > before > 1
    done = [(step - 1) / (steps - 1) for step in range(before, steps)]  # the first step has the whole rate
    decay = [0.5 * (1 + math.cos(math.pi * part)) if schedule == "cosine" else 1 - part for part in done]
    assert rates[before:] == pytest.approx([1e-2 * factor for factor in decay], rel=1e-12)
    assert rates[0] == 1e-2


@pytest.mark.slow
def test_the_command_ends_with_status_2(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"{n} and {n} is {2 * n}."} for n in range(8)])
    words = ["train", "-m", "tiny", "--dataset_name", rows, "--output_dir", tmp_path / "run", "--lora_r", "4"]
    ended = command(*words, "--report_to", "none", "--steps", "1", "--learning_rate", "1e-60")
    assert ended.returncode == 2, ended.stderr
    assert "error: nothing was trained: after 1 step the weights" in ended.stderr
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_zero3_model_has_moved_where_a_part_on_this_process_has() -> None:
    """DeepSpeed leaves parameters empty and hangs the parts on them."""
    model = nn.Linear(3, 2)
    for parameter in model.parameters():
        parameter.ds_tensor = parameter.detach().clone().flatten()
        parameter.data = torch.empty(0)
    at_start = footprint(model)
    assert footprint(model) == at_start
    model.bias.ds_tensor[1] += 1
    assert footprint(model) != at_start
