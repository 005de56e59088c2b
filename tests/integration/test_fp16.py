"""Float16 with a scaler, as a T4 trains: PyTorch's own scaler on a plain model of PEFT is the truth."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from falcon_qlora.data.batches import Share
from falcon_qlora.models.tiny import tiny_path
from falcon_qlora.step import global_batch
from tests.integration.interrupted import ROWS, assert_same_run, at_work, run
from tests.integration.processes import Processes
from tests.integration.runs import metrics, summary, train, write_jsonl
from tests.integration.test_kernels_flag import fine_tune

STEPS, RATE, NORM = 8, 0.3, 0.2
SETTINGS: dict[str, Any] = {
    "compute_dtype": "fp16",
    "quantize_mode": "16bit",
    "max_rows": 40,
    "eval_split": None,
    "eval_steps": None,
    "max_steps": STEPS,
    "max_length": 40,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "optim": "sgd",  # which a scale, or a norm of scaled gradients, would show in
    "learning_rate": RATE,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "max_grad_norm": NORM,
    "weight_decay": 0.0,
    "lora_r": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "max_bad_steps": 1,
}
# A first scale at which gradients overflow, and one that grows again soon.
SCALER = partial(torch.amp.GradScaler, init_scale=2.0**28, backoff_factor=2.0**-5, growth_interval=2)


@pytest.mark.slow
def test_a_run_is_pytorchs_scaler_on_a_plain_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[Share] = []
    first: dict[str, torch.Tensor] = {}
    accumulate = global_batch.accumulate_gradients

    def seen(model: Any, share: Share, **words: Any) -> Any:
        if not shares:
            trained = ((name, each) for name, each in model.named_parameters() if each.requires_grad)
            first.update({name: each.detach().clone() for name, each in trained})
        shares.append(share)
        return accumulate(model, share, **words)

    scaler = SCALER("cpu")
    monkeypatch.setattr(torch.amp, "GradScaler", SCALER)
    monkeypatch.setattr(global_batch, "accumulate_gradients", seen)
    made = fine_tune(tmp_path / "run", **SETTINGS)

    base = AutoModelForCausalLM.from_pretrained(tiny_path(), dtype=torch.float16)
    names = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    model: Any = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=16, target_modules=names))
    assert not model.load_state_dict(first, strict=False).unexpected_keys
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    lines, skipped = metrics(made), 0
    for share, line in zip(shares, lines, strict=True):
        total = 0.0
        for batch in share.micro_batches:
            with torch.autocast("cpu", torch.float16):
                loss = _summed(model, batch) / share.global_targets
            scaler.scale(loss).backward()
            total += loss.item()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), NORM)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < before
        optimizer.zero_grad()
        assert line["loss"] == pytest.approx(total, rel=2e-3)
        assert line["loss_scale"] == scaler.get_scale()
    assert 0 < skipped < STEPS - 3
    assert (summary(made)["overflowed_steps"], summary(made)["bad_steps"]) == (skipped, 0)
    saved = load_file(made / "adapter/adapter_model.safetensors")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            ours, start = saved[name.replace(".default", "")], first[name]
            assert (ours - parameter).norm() <= 0.02 * (parameter - start).norm(), name


def _summed(model: Any, batch: Any) -> torch.Tensor:
    """The cross entropies of a micro-batch's targets, each document by itself."""
    logits = torch.cat([model(doc[None]).logits[0] for doc in batch.input_ids[0].split(list(batch.lengths))])
    return F.cross_entropy(logits[batch.target_positions].float(), batch.targets, reduction="sum")


WORDS = (
    "-m tiny --compute_dtype fp16 --max_length 24 -b 1 --global_batch_size 3 --packing false --steps 4 "
    "--save_steps 2 --logging_steps 1 --learning_rate 1e-3 --warmup_steps 0 --lora_r 4 --max_rows 30 "
    "--max_bad_steps 1 --report_to none --dataset_name rows.jsonl"
).split()


@pytest.fixture
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    with at_work(tmp_path_factory, ROWS) as processes:
        yield processes


@pytest.mark.slow
def test_a_gradient_that_overflows_on_one_rank_is_skipped_by_all_and_the_scale_is_resumed(
    processes: Processes,
) -> None:
    overflow = [{"do": "gradient", "step": 2, "rank": 1}]
    status, told, errors = run(processes, "--output_dir", "whole", faults=overflow, settings=WORDS)
    assert status == 0, errors
    assert "step 2: a gradient overflowed in float16; the step was skipped and the loss scale halved" in told
    assert "1 step, overflowed in float16" in told
    whole, again = (processes.folder / name for name in ("whole", "again"))
    scales = [65536, 32768, 32768, 32768]
    assert [line["loss_scale"] for line in metrics(whole)] == scales
    shutil.copytree(whole, again)
    shutil.rmtree(again / "adapter")
    shutil.rmtree(again / "checkpoints/step-4")
    status, told, errors = run(processes, "--output_dir", "again", "--resume", settings=WORDS)
    assert status == 0, errors
    assert_same_run(again, whole)
    # A scale is a power of two, and hardly shows in what is trained.
    assert [line["loss_scale"] for line in metrics(again)] == scales
    assert summary(again)["overflowed_steps"] == 1
    # Two processes train what one does.
    status, _, errors = run(processes, "--output_dir", "alone", settings=WORDS, gpus=1)
    assert status == 0, errors
    for one, two in zip(metrics(processes.folder / "alone")[:2], metrics(whole)[:2], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)


@pytest.mark.slow
def test_a_first_step_that_overflows_fails_no_dry_run_and_a_run_of_nothing_else_says_so(
    processes: Processes,
) -> None:
    overflow = [{"do": "gradient", "step": 1, "rank": 1}]
    words = ("--output_dir", "run", "--steps", "1", "--save_steps", "1")
    status, told, errors = run(processes, *words, "--dry_run", faults=overflow, settings=WORDS)
    assert status == 0, errors
    assert "dry run: passed on 2 ranks" in told
    assert "no optimizer, as a gradient overflowed in float16" in " ".join(told.split())
    status, told, errors = run(processes, *words, faults=overflow, settings=WORDS)
    assert status == 2
    assert "nothing was trained" in errors
    assert "1 step overflowed in float16" in errors
    assert "Train for more steps" in errors


@pytest.mark.slow
def test_losses_are_those_of_bf16_within_its_noise(tmp_path: Path) -> None:
    losses, rows = {}, write_jsonl(tmp_path / "rows.jsonl", ROWS)
    for dtype in ("fp32", "fp16", "bf16"):
        words = [*WORDS[:-1], rows, "-q", "4bit", "--compute_dtype", dtype]
        train(tmp_path / dtype, *words)
        losses[dtype] = torch.tensor([line["loss"] for line in metrics(tmp_path / dtype)])
    off = {dtype: float((losses[dtype] - losses["fp32"]).abs().max()) for dtype in ("fp16", "bf16")}
    assert off["fp16"] <= off["bf16"] <= 0.03
