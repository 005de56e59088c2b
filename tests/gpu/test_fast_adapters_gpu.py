"""Adapters on the fast path on a GPU, in bfloat16: as near to float32 as the reference path, no waiting."""

from itertools import product

import pytest
import torch

from falcon_qlora.kernels import ops
from falcon_qlora.models.fast_path import apply_fast_path
from tests.layouts import MODES, documents, plain_float32, tiny_model
from tests.packing import packed
from tests.unit.test_fast_adapters import NAMES, assert_same, attached, distance, on_packed, truth
from tests.unit.test_fast_path import PARALLEL

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
LENGTHS = [7, 300, 3, 130, 64]
NAMES_AND_LAYOUTS = [*product(NAMES, PARALLEL), ("adapter", "falcon3"), ("adapter", "falcon3-256")]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "layout"), NAMES_AND_LAYOUTS)
def test_gradients_are_as_near_to_float32_as_on_the_reference_path(name, layout, mode):
    base = tiny_model(layout, mode, device="cuda", compute_dtype="bf16")
    plain = attached(name, plain_float32(base, "cuda"))
    model = attached(name, base)
    docs = documents(LENGTHS, device="cuda")
    exact = truth(plain, docs)[1]

    def error():
        with torch.autocast("cuda", torch.bfloat16):
            return distance(on_packed(model, docs)[1], exact)

    reference = error()
    report = apply_fast_path(model)
    assert all(line.startswith("fast") and "padded batches" not in line for line in report.values())
    for form in ("torch", "triton"):
        with ops.using(form):
            assert error() < 1.15 * reference, form


@pytest.mark.parametrize(("name", "layout"), NAMES_AND_LAYOUTS)
def test_in_float32_both_forms_are_the_reference_path(name, layout):
    model = attached(name, tiny_model(layout, "4bit", device="cuda", compute_dtype="fp32"))
    docs = documents(LENGTHS, device="cuda")
    reference = on_packed(model, docs)
    apply_fast_path(model)
    for form in ("torch", "triton"):
        with ops.using(form):
            assert_same(on_packed(model, docs), reference, 1e-3)


@pytest.mark.parametrize("keep", ["attention", "input", "offload"])
@pytest.mark.parametrize("layout", ["falcon-7b", "falcon-40b"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_changes_no_gradient(name, layout, keep):
    model = attached(name, tiny_model(layout, "4bit", device="cuda", compute_dtype="bf16"))
    docs = documents(LENGTHS, device="cuda")
    apply_fast_path(model)
    loss, everything = on_packed(model, docs)
    apply_fast_path(model, keep=keep)
    again, recomputed = on_packed(model, docs)
    assert torch.equal(loss, again)
    # The attention kernel's backward adds up queries' gradients in no fixed order.
    assert distance(recomputed, everything) < 1e-2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_a_step_waits_for_nothing(name, mode):
    model = attached(name, tiny_model("falcon-7b", mode, device="cuda", compute_dtype="bf16"))
    apply_fast_path(model)
    arguments = packed(documents(LENGTHS, device="cuda"))
    for debug in ("default", "error"):  # what is made once is made in the first
        torch.cuda.set_sync_debug_mode(debug)
        try:
            with torch.autocast("cuda", torch.bfloat16):
                model(**arguments).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
