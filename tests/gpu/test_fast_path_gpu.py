"""The fast path on a GPU, in bfloat16: as near to float32 as the reference path, waiting for nothing."""

import copy

import pytest
import torch

from falcon_qlora.kernels import fp8, ops
from falcon_qlora.models.fast_path import apply_fast_path, keep_dequantized_weights, remove_fast_path
from falcon_qlora.models.forward import enable_packing
from tests.layouts import documents, plain_float32, tiny_model
from tests.packing import gradients, one_by_one, packed, with_adapter
from tests.unit.test_fast_path import FAST_LAYOUTS, adapted

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
LENGTHS = [7, 300, 1, 130, 64]


def loss_and_gradients(model, arguments, autocast=True):
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        loss = model(**arguments).loss
    loss.backward()
    return loss.detach(), copy.deepcopy(gradients(model))


def distance(found, truth):
    return sum(float((found[n].cpu() - g.cpu()).norm() / g.norm()) for n, g in truth.items()) / len(truth)


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize("mode", ["4bit", "8bit", "16bit"])
@pytest.mark.parametrize("layout", [*FAST_LAYOUTS, "falcon3-256", "falcon-h1-128"])
def test_gradients_are_as_near_to_float32_as_on_the_reference_path(layout, mode, form):
    base = tiny_model(layout, mode, device="cuda", compute_dtype="bf16")
    plain = with_adapter(plain_float32(base))
    model = with_adapter(base)
    enable_packing(model)
    docs = documents(LENGTHS)
    one_by_one(plain, docs).backward()
    exact = gradients(plain)
    arguments = packed([doc.cuda() for doc in docs])
    _, reference = loss_and_gradients(model, arguments)
    report = apply_fast_path(model)
    assert not any("padded batches" in line for line in report.values())
    with ops.using(form):
        found = [loss_and_gradients(model, arguments)]
        keep_dequantized_weights(model, 2**30)
        found += [loss_and_gradients(model, arguments) for _ in range(2)]
    for _, ours in found:
        assert all(gradient.dtype == torch.float32 for gradient in ours.values())
        assert distance(ours, exact) < 1.15 * distance(reference, exact)
    remove_fast_path(model)


@pytest.mark.parametrize("r", [4, 64])  # compilers may treat ranks differently
@pytest.mark.parametrize("mode", ["4bit", "8bit", "16bit"])
@pytest.mark.parametrize("layout", ["falcon-7b", "falcon-40b", "falcon3-256", "falcon-h1", "falcon-h1-128"])
def test_in_fp8_gradients_are_as_near_to_float32_as_with_products_of_the_same_operands(layout, mode, r):
    device = torch.device("cuda", torch.cuda.current_device())
    if (reason := fp8.why_not(device)) is not None:
        pytest.skip(reason)
    base = tiny_model(layout, mode, device="cuda", compute_dtype="bf16")
    plain = with_adapter(plain_float32(base), r=r)
    model = with_adapter(base, r=r)
    enable_packing(model)
    docs = documents(LENGTHS)
    one_by_one(plain, docs).backward()
    exact = gradients(plain)
    arguments = packed([doc.cuda() for doc in docs])
    for libraries in (True, False):  # GELU in products where there are any, and apart
        report = apply_fast_path(model, fp8_products=True, libraries=libraries)
        assert all("FP8" in line for line in report.values())
        _, ours = loss_and_gradients(model, arguments)
        with fp8.emulated():
            _, emulated = loss_and_gradients(model, arguments)
        assert 0.02 < distance(ours, exact) < 1.15 * distance(emulated, exact)


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize("layout", [*FAST_LAYOUTS, "falcon3-256", "falcon-h1-128"])
def test_recomputation_changes_no_gradient(layout, form):
    model = adapted(layout, "4bit", device="cuda", compute_dtype="bf16")
    apply_fast_path(model)
    arguments = packed(documents(LENGTHS, device="cuda"))
    with ops.using(form):
        loss, without = loss_and_gradients(model, arguments)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        again, recomputed = loss_and_gradients(model, arguments)
    assert torch.equal(loss, again)
    # The attention kernel's backward adds up queries' gradients in no fixed order.
    assert distance(recomputed, without) < 1e-2


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize("mode", ["4bit", "8bit", "16bit"])
@pytest.mark.parametrize("layout", ["falcon-7b", "falcon3-256", "falcon-h1-128"])
def test_a_step_waits_for_nothing(layout, mode, form):
    model = adapted(layout, mode, device="cuda", compute_dtype="bf16")
    apply_fast_path(model)
    arguments = packed(documents(LENGTHS, device="cuda"))
    with ops.using(form):
        loss_and_gradients(model, arguments)  # what is made once is made
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.autocast("cuda", torch.bfloat16):
                model(**arguments).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
