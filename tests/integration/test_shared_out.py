"""Adapters on a base that is shared out over processes: the numbers of replicas, to the last bit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from falcon_qlora.data.sample_data import path as sample_rows
from falcon_qlora.step import global_batch
from falcon_qlora.step.bad_steps import BadSteps
from falcon_qlora.step.global_batch import Step
from tests.integration.interrupted import SMALL, assert_same_run
from tests.integration.runs import ENVIRONMENT, command, metrics, train
from tests.integration.shared_out import CASES

# 7 documents, one at a time: more of them on one process than on another, and each forward takes all.
SETTINGS = (
    f"{SMALL} --max_length 64 -b 1 --global_batch_size 7 --packing false --steps 4 --save_steps 2 "
    "--logging_steps 1 --learning_rate 1e-3 --warmup_steps 1 --lora_r 8 --max_rows 60 "
    f"--dataset_name {sample_rows()}"
).split()
SHARED = ("--sharding", "fsdp")


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_what_is_shared_out_computes_what_is_whole() -> None:
    # Three, which divide no block evenly.
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3"]
    result = subprocess.run(
        [*torchrun, "-m", "tests.integration.shared_out"],
        env={**os.environ, **ENVIRONMENT, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stderr[-5000:]
    assert result.stdout.splitlines() == [f"{' '.join(case)} is the same" for case in CASES]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "-q 4bit --eval_split 0.1 --eval_steps 2 --generate_samples 1",
        "-q 8bit --kernels off --checkpointing full --lora_dropout 0.1 --global_batch_size 4 --packing true",
    ],
)
def test_a_run_is_that_of_replicas_to_the_last_bit(tmp_path: Path, flags: str) -> None:
    replicas, shared = tmp_path / "replicas", tmp_path / "shared"
    train(replicas, *SETTINGS, *flags.split(), gpus=2)
    train(shared, *SETTINGS, *flags.split(), *SHARED, gpus=2)
    assert_same_run(shared, replicas)
    losses = [[line.get("eval_loss") for line in metrics(run)] for run in (shared, replicas)]
    assert losses[0] == losses[1]
    if "--generate_samples" in flags:
        assert any(losses[0])
        answers = [(run / "samples.jsonl").read_text() for run in (shared, replicas)]
        assert answers[0] == answers[1] != ""


@pytest.mark.slow
def test_a_run_goes_on_shared_out_or_not_and_over_another_number_of_processes(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    train(whole, *SETTINGS, *SHARED, gpus=2)

    def resumed(name: str, sharding: str, gpus: int) -> Path:
        run = tmp_path / name
        shutil.copytree(whole, run)
        shutil.rmtree(run / "adapter")
        shutil.rmtree(run / "checkpoints/step-4")
        result = command("train", "--resume", run, "--sharding", sharding, "--gpus", str(gpus))
        assert (result.returncode, result.stderr) == (0, "")
        assert "going on from step 2" in result.stdout
        return run

    assert_same_run(resumed("again", "fsdp", 2), whole)
    assert_same_run(resumed("replicas", "none", 2), whole)
    assert_same_run(resumed("three", "fsdp", 3), resumed("three_replicas", "none", 3))
    train(tmp_path / "alone", *SETTINGS)
    for one, three in zip(metrics(tmp_path / "alone"), metrics(tmp_path / "three"), strict=True):
        assert three["loss"] == pytest.approx(one["loss"], rel=1e-4)


def test_micro_batches_that_were_split_are_whole_again_where_each_forward_needs_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def step() -> Step:
        return Step(
            torch.nn.Linear(2, 2),
            device=torch.device("cpu"),
            processes=1,
            max_grad_norm=0.0,
            bad_steps=BadSteps(most=0, rows_of=str, say=print),
            wants_save=lambda: False,
            save_failed=lambda: False,
            at=lambda *place: None,
        )

    monkeypatch.setattr(global_batch, "needs_all_processes", lambda model: False)
    replica = step()
    split = {**replica.state(), "halvings": 2}
    replica.load_state(split)
    assert (replica.halvings, replica.reduction.can_retry) == (2, True)
    monkeypatch.setattr(global_batch, "needs_all_processes", lambda model: True)
    shared = step()
    shared.load_state(split)
    assert (shared.halvings, shared.reduction.can_retry) == (0, False)
