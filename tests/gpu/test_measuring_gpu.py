"""On a GPU too, eval gives the loss that the run itself noted: int8 weights, and FP8 products."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from falcon_qlora.kernels import fp8
from tests.integration.runs import metrics
from tests.integration.test_kernels_flag import fine_tune, measured_again

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("settings", "kernels"),
    [
        ({"quantize_mode": "8bit"}, "int8 dequantized"),
        ({"quantize_mode": "4bit", "compute_dtype": "fp8"}, "NF4 dequantized to FP8"),
    ],
    ids=["8bit", "fp8"],
)
def test_eval_measures_what_the_run_measured(
    tmp_path: Path, settings: dict[str, object], kernels: str
) -> None:
    reason = fp8.why_not(torch.device("cuda", 0)) if "compute_dtype" in settings else None
    if reason is not None:
        pytest.skip(reason)
    run = fine_tune(tmp_path / "run", **settings)
    loss, ran = measured_again(run)
    assert kernels in ran
    assert loss == pytest.approx(metrics(run)[-1]["eval_loss"], rel=2e-3)
