"""RMS norm and its gradient against float64 and autograd, over dtypes, odd widths and strided rows."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from falcon_qlora.kernels import ops

EPS = 1e-6
# 3,072 and 1,100 are held in two parts.
WIDTHS = [1, 7, 71, 1024, 1100, 3072]
# Largest distance to float64, of the largest value: the rounding of the result itself.
TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def inputs(hidden, dtype, device):
    """x, the output's gradient, what is added to the input's, and a weight with places after its mantissa."""
    generator = torch.Generator().manual_seed(hidden)
    x, grad, added = (torch.randn(3, hidden, generator=generator).to(device, dtype) for _ in range(3))
    weight = 1 + torch.randn(hidden, generator=generator) / 3
    return 2 * x, grad, added, weight.to(device, dtype)


def near(found, expected, dtype):
    assert found.dtype == dtype
    allowed = TOLERANCES[dtype]
    assert_close(found.double(), expected, rtol=allowed, atol=allowed * max(float(expected.abs().max()), 1.0))


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("hidden", WIDTHS)
def test_output_and_gradient(hidden, dtype, form, device):
    x, grad, added, weight = inputs(hidden, dtype, device)
    leaf = x.double().requires_grad_()
    expected = F.rms_norm(leaf, (hidden,), weight.double(), EPS)
    (of_x,) = torch.autograd.grad(expected, leaf, grad.double())
    with ops.using(form):
        y, rstd = ops.rms_norm(x, weight, EPS)
        plain = ops.rms_norm_backward(grad, x, rstd, weight)
        with_addend = ops.rms_norm_backward(grad, x, rstd, weight, added)
    near(y, expected.detach(), dtype)
    near(plain, of_x, dtype)
    near(with_addend, of_x + added.double(), dtype)
    assert rstd.dtype == torch.float32
    assert_close(rstd.double(), torch.rsqrt(x.double().square().mean(-1) + EPS), rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", ["torch", "triton"])
def test_in_bfloat16_it_is_nearer_to_float32_than_transformers(form, device):
    x, _, _, weight = inputs(1100, torch.bfloat16, device)
    theirs = LlamaRMSNorm(1100, EPS).to(device, torch.bfloat16)
    with torch.no_grad():
        theirs.weight.copy_(weight)
    exact = F.rms_norm(x.double(), (1100,), weight.double(), EPS)
    with ops.using(form):
        ours = ops.rms_norm(x, weight, EPS)[0]
    errors = [float((found.double() - exact).norm() / exact.norm()) for found in (ours, theirs(x).detach())]
    assert errors[0] < 0.9 * errors[1], errors


@pytest.mark.parametrize("hidden", [71, 1100])
def test_rows_may_lie_apart_and_outputs_in_inputs(hidden, device):
    x, grad, added, weight = inputs(hidden, torch.bfloat16, device)

    def apart(matrix):
        return torch.cat([torch.full_like(matrix, torch.nan), matrix], 1)[:, hidden:]

    with ops.using("triton"):
        y, rstd = ops.rms_norm(x, weight.float(), EPS)
        of_x = ops.rms_norm_backward(grad, x, rstd, weight.float(), added)
        for laid in (apart, lambda matrix: matrix.T.contiguous().T):
            room = torch.zeros(3, hidden + 9, dtype=torch.bfloat16, device=device)
            inside = room[:, 4:-5]
            assert torch.equal(ops.rms_norm(laid(x), weight.float(), EPS, inside)[0], y)
            assert torch.equal(inside, y)
            ops.rms_norm_backward(laid(grad), laid(x), rstd, weight.float(), laid(added), inside)
            assert torch.equal(inside, of_x)
            assert not room[:, :4].any()
            assert not room[:, -5:].any()
        for place in (0, 1):
            given = [grad.clone(), added.clone()]
            found = ops.rms_norm_backward(given[0], x, rstd, weight.float(), given[1], given[place])
            assert found is given[place]
            assert torch.equal(found, of_x)
        assert ops.rms_norm(x[:0], weight, EPS)[0].shape == (0, hidden)
        assert ops.rms_norm_backward(grad[:0], x[:0], rstd[:0], weight).shape == (0, hidden)
        with pytest.raises(ValueError, match="contiguous last dimension"):
            ops.rms_norm(x, weight, EPS, torch.empty(hidden, 3).T)
