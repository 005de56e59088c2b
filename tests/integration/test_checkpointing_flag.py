"""``--checkpointing`` changes what a step keeps, never what it computes; and the trial before the first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from falcon_qlora.common.errors import UserError
from falcon_qlora.config import parse
from falcon_qlora.models.step_memory import allocated_optimizer_bytes
from falcon_qlora.training import activations
from tests.integration.runs import command, metrics, summary
from tests.integration.test_kernels_flag import fine_tune

SETTINGS = (
    "-m tiny -q 4bit --compute_dtype fp32 --dataset_name sample --max_rows 60 --max_length 64 -s 3 -b 2"
)


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in metrics(output)]


@pytest.mark.slow
def test_two_processes_train_the_same_with_each_setting(tmp_path: Path) -> None:
    told = {
        "none": "kept",
        "auto": "kept",
        "selective": "the largest recomputed",
        "full": "recomputed",
        "offload": "recomputed from inputs in CPU memory",
    }
    expected: list[float] | None = None
    for setting, words in told.items():
        output = tmp_path / setting
        where = ["--output_dir", output, "--gpus", "2", "--report_to", "none", "--save_strategy", "no"]
        result = command("train", *SETTINGS.split(), *where, "--checkpointing", setting)
        assert result.returncode == 0, result.stderr[-3000:]
        assert f"activations: {words}\n" in result.stdout
        expected = expected or losses(output)
        assert losses(output) == pytest.approx(expected, rel=1e-6)
        for figure in ("predicted_peak_memory_gib", "card_gib", "estimated_card_gib"):
            assert summary(output)[figure] is None  # not on a CPU


def test_reference_blocks_recompute_or_refuse(tmp_path: Path) -> None:
    small = {"max_steps": 2, "kernels": "off", "eval_split": None, "eval_steps": None, "max_length": 48}
    runs = {
        setting: fine_tune(tmp_path / setting, checkpointing=setting, **small)
        for setting in ("full", "offload")
    }
    assert losses(runs["full"]) == pytest.approx(losses(runs["offload"]), rel=1e-6)
    with pytest.raises(
        UserError, match=r"selective .* 5 of 5 blocks .*--kernels off.*; give --checkpointing full"
    ):
        fine_tune(tmp_path / "off", checkpointing="selective", **small)
    with pytest.raises(
        UserError, match=r"5 of 5 blocks run on the reference path \(Dora instead of plain LoRA\)"
    ):
        fine_tune(
            tmp_path / "dora",
            checkpointing="selective",
            **small | {"kernels": "auto", "use_dora": True},
        )
    assert not (tmp_path / "off").exists()


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.1, "packing": False}, {"quantize_mode": "8bit"}])
def test_the_trial_of_the_largest_micro_batch_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object]
) -> None:
    small = {"max_steps": 3, "eval_split": None, "eval_steps": None, "max_length": 48, **settings}
    without = fine_tune(tmp_path / "without", **small)
    tried = []
    original = activations.largest_micro_batch

    def noted(trainer):  # type: ignore[no-untyped-def]
        batch = original(trainer)
        seen = [max(sum(each.lengths) for each in trainer.steps[n].micro_batches) for n in range(3)]
        tried.append((sum(batch.lengths), seen))
        return batch

    monkeypatch.setattr(activations, "largest_micro_batch", noted)
    monkeypatch.setattr(activations, "warms_up", lambda device: True)
    with_it = fine_tune(tmp_path / "with", **small)
    assert [tokens for tokens, _ in tried] == [max(tried[0][1])]
    assert losses(with_it) == losses(without)
    adapters = [load_file(run / "adapter/adapter_model.safetensors") for run in (without, with_it)]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


def test_a_trial_that_does_not_fit_says_what_to_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(activations, "warms_up", lambda device: True)
    monkeypatch.setattr("falcon_qlora.step.loss.sum_of_losses", too_much)
    with pytest.raises(
        UserError, match=r"does not fit.*: --batch_tokens \d+, a smaller .*, --checkpointing full, --check"
    ):
        fine_tune(tmp_path / "run", checkpointing="none")
    # Where the micro-batch is as small as it can be cut, cutting it is no advice.
    with pytest.raises(UserError, match=r"does not fit.*Take less: a smaller --max_length, --checkp"):
        fine_tune(tmp_path / "run", checkpointing="none", per_device_train_batch_size=1)
    assert not (tmp_path / "run").exists()


def test_the_recipe_for_the_smallest_setting_is_what_the_arithmetic_is_of() -> None:
    configuration = parse(["--recipe", "smallest"])
    run = configuration.run
    assert run.per_device_train_batch_size * configuration.data.max_length == 8192
    assert (run.checkpointing, configuration.method.r) == ("offload", 64)
    assert allocated_optimizer_bytes(configuration.optimizer) == 0


@pytest.mark.parametrize(
    "given", [{}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": ""}]
)
def test_segments_expand_unless_the_user_says_how(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str]
) -> None:
    import os

    from falcon_qlora.common.allocator import use_expandable_segments

    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    of_torch: Any = torch._C  # imported before, as in a notebook
    before = of_torch._accelerator_getAllocatorSettings()
    of_torch._accelerator_setAllocatorSettings("expandable_segments:False")
    try:
        use_expandable_segments()
        assert of_torch._accelerator_getAllocatorSettings().endswith("False" if given else "True")
    finally:
        of_torch._accelerator_setAllocatorSettings(before)
    found = {name: os.environ[name] for name in os.environ if name.endswith("ALLOC_CONF")}
    assert found == (given or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})
