"""Offloading on a GPU: the copies' order is right, and nothing waits for the host."""

from __future__ import annotations

import pytest
import torch

from falcon_qlora.models.activations import set_checkpointing
from falcon_qlora.models.blocks.attention import PackedAttention
from falcon_qlora.models.fast_path import apply_fast_path
from falcon_qlora.models.layouts import preset_config
from falcon_qlora.models.packed_attention import Sequences
from falcon_qlora.models.step_memory import Step
from tests.layouts import documents
from tests.packing import packed
from tests.unit.test_fast_path import adapted, step

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("layout", ["falcon-7b", "falcon-40b", "falcon3", "falcon-h1-128"])
def test_offloading_changes_no_bit_of_what_full_computes(layout, fast):
    model = adapted(layout, "4bit", device="cuda", compute_dtype="bf16")
    if fast:
        apply_fast_path(model)
    # Large ones first and last, so that buffers and the device's memory are used again in between.
    batches = [
        packed(documents(lengths, seed=seed, device="cuda"))
        for seed, lengths in enumerate([[4000, 4000], [700, 30], [2000], [8000]])
    ]
    results = []
    for setting in ("full", "offload", "offload"):
        set_checkpointing(model, [setting] * 2)
        results.append([step(model, batch) for batch in batches])
    for other in results[1:]:
        for (loss, found), (expected_loss, expected) in zip(other, results[0], strict=True):
            assert torch.equal(loss, expected_loss)
            for name, gradient in expected.items():
                # Attention's gradient is added up in an order of its own every time.
                torch.testing.assert_close(
                    found[name], gradient, rtol=2e-2, atol=float(gradient.abs().max()) / 50
                )


def test_an_offloading_step_waits_for_nothing():
    model = adapted("falcon-7b", "4bit", device="cuda", compute_dtype="bf16")
    apply_fast_path(model, keep="offload")
    arguments = packed(documents([3000, 1000], device="cuda"))
    step(model, arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**arguments).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_attentions_backward_takes_what_the_memory_model_counts():
    config, tokens = preset_config("falcon-7b"), 8192
    query, grad = (torch.randn(tokens, 71, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    key, value = (torch.randn(tokens, 1, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    sequences = Sequences.from_lengths([tokens // 2] * 2, "cuda")
    attention = PackedAttention(sequences, "variable-length kernel")
    kept = attention.forward(query, key, value)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    attention.backward(grad, query, key, value, kept)
    taken = torch.cuda.max_memory_allocated() - before
    one = Step(config=config, tokens=tokens, trainable=0, fast=True)
    joined = config.hidden_size + config.ffn_hidden_size
    counted = 2 * tokens * (one.working_values("none")[2] - joined)
    assert 0.9 * counted < taken < 1.15 * counted
