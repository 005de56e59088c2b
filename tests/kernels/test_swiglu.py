"""SwiGLU and its gradient against float64 and autograd, over dtypes, odd widths and strided rows."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from falcon_qlora.kernels import ops

SHAPES = [(1, 1), (3, 7), (2, 256), (5, 300), (2, 4100)]
RELATIVE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def inputs(shape, dtype, device):
    """Gate and up side by side, and the output's gradient."""
    generator = torch.Generator().manual_seed(shape[1])
    gate_up = 3 * torch.randn(shape[0], 2 * shape[1], generator=generator)
    grad = torch.randn(shape, generator=generator)
    return gate_up.to(device, dtype), grad.to(device, dtype)


def near(found, expected, dtype):
    assert found.dtype == dtype
    assert_close(found.double(), expected, rtol=RELATIVE[dtype], atol=2e-6)


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize("multipliers", [(), (0.3, 1.7)], ids=["plain", "with multipliers"])
@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradient(shape, dtype, multipliers, form, device):
    gate_up, grad = inputs(shape, dtype, device)
    leaf, (of_gate, of_all) = gate_up.double().requires_grad_(), multipliers or (1.0, 1.0)
    gate, up = leaf.chunk(2, dim=1)
    expected = of_all * up * F.silu(of_gate * gate)
    (of_input,) = torch.autograd.grad(expected, leaf, grad.double())
    with ops.using(form):
        y = ops.swiglu(gate_up, None, *multipliers)
        found, again = ops.swiglu_backward(grad.clone(), gate_up, None, *multipliers)
    near(y, expected.detach(), dtype)
    near(found, of_input, dtype)
    assert torch.equal(again, y)


@pytest.mark.parametrize("form", ["torch", "triton"])
def test_in_place_of_its_input_and_in_slices(form, device):
    gate_up, grad = inputs((5, 300), torch.bfloat16, device)

    def slice_of(matrix):
        return F.pad(matrix, (16, 3), value=torch.nan)[:, 16:-3]

    with ops.using(form):
        y = ops.swiglu(gate_up)
        expected, _ = ops.swiglu_backward(grad.clone(), gate_up)
        for laid in (slice_of, lambda matrix: matrix.T.contiguous().T):
            room = torch.zeros(5, 620, dtype=torch.bfloat16, device=device)
            ops.swiglu(laid(gate_up), room[:, 8:308])
            assert torch.equal(room[:, 8:308], y)
            found, again = ops.swiglu_backward(laid(grad), laid(gate_up), room[:, 16:-4])
            assert torch.equal(again, y)
            assert torch.equal(found, expected)
            assert torch.equal(room[:, 16:-4], expected)
            assert not room[:, :8].any()
            assert not room[:, -4:].any()
        own = slice_of(gate_up)
        found, again = ops.swiglu_backward(grad.clone(), own, own)
        assert found is own
        assert torch.equal(own, expected)
        assert torch.equal(again, y)


@pytest.mark.filterwarnings("ignore:overflow")
def test_far_from_zero_and_without_tokens(device):
    gate = torch.tensor([[-1e4, -200.0, -30.0, 30.0, 1e4]], device=device)
    gate_up, grad = torch.cat([gate, torch.ones_like(gate)], 1), torch.ones_like(gate)
    with ops.using("triton"):
        y = ops.swiglu(gate_up)
        found, _ = ops.swiglu_backward(grad, gate_up)
        assert_close(y, torch.tensor([[0.0, 0.0, -2.8e-12, 30.0, 1e4]], device=device))
        assert_close(found, torch.cat([torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0]], device=device), y], 1))
        assert ops.swiglu(gate_up[:0]).shape == (0, 5)
        assert ops.swiglu_backward(grad[:0], gate_up[:0])[0].shape == (0, 10)
        with pytest.raises(ValueError, match="contiguous last dimension"):
            ops.swiglu(gate_up, torch.empty(5, 1).T.contiguous().T.expand(5, 5))
