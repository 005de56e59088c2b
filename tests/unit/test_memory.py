"""The arithmetic of a step's memory against what was measured on an H200 (tests/benchmarks)."""

from __future__ import annotations

import pytest

from falcon_qlora import memory
from falcon_qlora.models.falcon import lora_parameter_count, preset_config

FALCON_7B = preset_config("falcon-7b")
TRAINABLE = lora_parameter_count(FALCON_7B, r=64)


@pytest.mark.parametrize(("fast", "measured"), [(True, 2.20e6), (False, 3.92e6)])
def test_activations_of_7b_are_those_measured(fast: bool, measured: float) -> None:
    predicted = memory.activation_bytes_per_token(FALCON_7B, fast=fast, recompute=False, lora_rank=64)
    assert predicted == pytest.approx(measured, rel=0.12)


@pytest.mark.parametrize(
    ("tokens", "fast", "recompute", "measured_gb"),
    [
        (8192, True, False, 27.9),
        (16384, True, False, 46.1),
        (8192, False, False, 42.0),
        (8192, True, True, 13.8),
        (8192, False, True, 13.4),
    ],
)
def test_a_step_of_7b_in_4bit_takes_what_was_measured(
    tokens: int, fast: bool, recompute: bool, measured_gb: float
) -> None:
    weights_and_adapter = 4.2e9 + 4 * TRAINABLE
    needed = memory.step_bytes(
        FALCON_7B, tokens=tokens, trainable=TRAINABLE, fast=fast, recompute=recompute, lora_rank=64
    )
    assert 0.99 * measured_gb < (weights_and_adapter + needed) / 1e9 < 1.15 * measured_gb


def test_auto_recomputes_where_the_gpu_is_too_small() -> None:
    needed = memory.step_bytes(
        FALCON_7B, tokens=8192, trainable=TRAINABLE, fast=True, recompute=False, lora_rank=64
    )
    assert memory.must_recompute(needed, 18 * memory.GIB)
    assert not memory.must_recompute(needed, 74 * memory.GIB)
