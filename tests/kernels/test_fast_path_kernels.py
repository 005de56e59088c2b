"""A whole block with Triton's forms of the operations: the same as with PyTorch's."""

import pytest

from falcon_qlora.kernels import fp8, ops
from falcon_qlora.models.fast_path import apply_fast_path
from tests.layouts import documents, tiny_model
from tests.packing import packed
from tests.unit.test_fast_adapters import attached, on_packed
from tests.unit.test_fast_path import adapted, assert_same, few_targets, step


# One query head's keys for all, groups under one norm, and under two; one sublayer after the other, without
# a state space and with one.
@pytest.mark.parametrize(
    ("layout", "few"),
    [
        *((layout, False) for layout in ("falcon-7b", "falcon-11b", "falcon-40b", "falcon3", "falcon-h1")),
        ("falcon-7b", True),
        ("falcon-40b", True),
    ],
)
def test_loss_and_adapter_gradients_are_the_same_with_either_form(layout, few, device):
    model = adapted(layout, "4bit", device=device.type, compute_dtype="fp32")
    apply_fast_path(model)
    arguments = packed(documents([5, 17, 1], device=device.type))
    arguments = few_targets(arguments) if few else arguments
    results = []
    for form in ("torch", "triton"):
        with ops.using(form):
            assert ops.triton_runs_on(device) == (form == "triton")
            results.append(step(model, arguments))
    assert_same(results[1], results[0])


@pytest.mark.parametrize("layout", ["falcon-11b", "falcon-40b", "falcon-h1"])
def test_with_fp8_products_it_is_as_near_with_either_form(layout, device):
    model = adapted(layout, "4bit", device=device.type, compute_dtype="fp32", r=5)
    arguments = packed(documents([5, 17, 1], device=device.type))
    apply_fast_path(model)
    exact = step(model, arguments)
    distances = []
    with fp8.emulated():
        apply_fast_path(model, fp8_products=True)
        for form in ("torch", "triton"):
            with ops.using(form):
                found = step(model, arguments)[1]
            ratios = [float((found[name] - grad).norm() / grad.norm()) for name, grad in exact[1].items()]
            distances.append(sum(ratios) / len(ratios))
    assert 0.5 < distances[1] / distances[0] < 1.5, distances


@pytest.mark.parametrize(
    ("name", "layout"), [("adapter", "falcon-11b"), ("adapter_v2", "falcon-40b"), ("adapter", "falcon3")]
)
def test_with_an_adapter_loss_and_gradients_are_the_same_with_either_form(name, layout, device):
    model = attached(name, tiny_model(layout, "4bit", device.type, "fp32"))
    docs = documents([5, 17, 1], device=device.type)
    apply_fast_path(model)
    results = []
    for form in ("torch", "triton"):
        with ops.using(form):
            results.append(on_packed(model, docs))
    assert_same(results[1], results[0])
