"""A whole block with Triton's forms of the operations: the same as with PyTorch's."""

import pytest

from falcon_qlora.kernels import ops
from falcon_qlora.models.fast import apply_fast_path
from tests.layouts import documents
from tests.packing import packed
from tests.unit.test_fast_path import FAST_LAYOUTS, adapted, assert_same, step


@pytest.mark.parametrize("layout", FAST_LAYOUTS)
def test_loss_and_adapter_gradients_are_the_same_with_either_form(layout, device):
    model = adapted(layout, "4bit", device=device.type, compute_dtype="fp32")
    apply_fast_path(model)
    arguments = packed(documents([5, 17, 1], device=device.type))
    results = []
    for form in ("torch", "triton"):
        with ops.using(form):
            assert ops.triton_runs_on(device) == (form == "triton")
            results.append(step(model, arguments))
    assert_same(results[1], results[0])
