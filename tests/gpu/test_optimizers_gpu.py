"""On a GPU: what an optimizer keeps is taken up again, and a run that stopped is the run that did not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import falcon_qlora
from tests.integration.runs import metrics
from tests.integration.test_adapter import fine_tune

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

# bitsandbytes keeps tensors of fewer numbers than 4,096 in 32 bits: some are larger here, some smaller.
OPTIMIZERS = ["adamw_torch_fused", "adamw_torch", "paged_adamw_8bit", "adamw_bnb_8bit", "paged_adamw_32bit"]
OPTIMIZERS += ["lion_8bit", "adafactor", "sgd"]


@pytest.mark.parametrize(
    ("optimizer", "compute_dtype"),
    [
        *((optimizer, "bf16") for optimizer in OPTIMIZERS),
        ("adamw_torch", "fp16"),
        ("paged_adamw_8bit", "fp16"),
    ],
)
def test_a_run_goes_on_with_its_optimizer(tmp_path: Path, optimizer: str, compute_dtype: str) -> None:
    settings = {"optim": optimizer, "compute_dtype": compute_dtype, "quantize_mode": "4bit", "lora_r": 16}
    settings |= {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "save_total_limit": 9}
    whole = fine_tune(tmp_path, **settings, output_dir=tmp_path / "whole")
    falcon_qlora.train(resume=whole / "checkpoints" / "step-2")
    again = [line["loss"] for line in metrics(whole)]
    first = fine_tune(tmp_path, **settings, output_dir=tmp_path / "other")
    assert again == pytest.approx([line["loss"] for line in metrics(first)], rel=1e-2)
