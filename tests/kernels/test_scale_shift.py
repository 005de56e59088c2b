"""Scaled and shifted outputs and the sums that come back, against autograd in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from falcon_qlora.kernels import ops, scale_shift

SHAPES = [(1, 5), (7, 600), (21, 256), (17, 1030)]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
FORMS = ["torch", "triton"]


def rows(shape, dtype, device, seed):
    """Apart from each other, as in a slice."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape[0], shape[1] + 3, generator=generator).to(device, dtype)[:, :-3]


def vectors(columns, device, seed):
    return rows((2, columns), torch.float32, device, seed)


def near(found, expected, dtype):
    allowed = TOLERANCES[dtype]
    scale = float(expected.abs().max())
    assert_close(found.double(), expected.double(), rtol=allowed, atol=allowed * scale)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_there_and_back(form, shape, dtype, gelu, device, monkeypatch):
    from falcon_qlora.kernels import scale_shift_triton

    monkeypatch.setattr(scale_shift_triton, "_PROGRAMS", 6)  # so that a program goes through several tiles
    x, grad = (rows(shape, dtype, device, seed) for seed in (1, 2))
    scale, bias = vectors(shape[1], device, 3)
    leaves = [each.double().requires_grad_() for each in (x, scale, bias)]
    product = x.clone()
    with ops.using(form):
        after = torch.full_like(x, torch.nan) if gelu else None
        y = scale_shift.scale_shift(x, scale, bias, x, after)  # in place
        assert y is x
        exact = leaves[1] * (leaves[0] + leaves[2])
        near(y, exact.detach(), dtype)
        if after is not None:
            near(after, F.gelu(y.double()), dtype)
            # Where the rounded result is, as it is what is kept.
            exact = exact + (y.double() - exact).detach()
            exact = F.gelu(exact)
        expected = torch.autograd.grad(exact, leaves, grad.double())
        kept = y if gelu else product
        sums = scale_shift.scale_backward(grad, kept, scale, grad, through_gelu=gelu)  # in place too
    near(grad, expected[0], dtype)
    assert sums.dtype == torch.float32
    along, total = sums.double()
    of_scale = along / scale if gelu else along + bias * total
    near(of_scale, expected[1], dtype)
    near(scale * total, expected[2], dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_two_outputs_and_what_they_are_added_to(form, shape, dtype, device):
    x, first, second = (rows(shape, dtype, device, seed) for seed in (1, 2, 3))
    (s_1, b_1), (s_2, b_2) = (vectors(shape[1], device, seed) for seed in (4, 5))
    with ops.using(form):
        found = scale_shift.add_scaled(x, (first, s_1, b_1), (second, s_2, b_2))
    assert found.dtype == dtype
    near(found, x.double() + s_1 * (first.double() + b_1) + s_2 * (second.double() + b_2), dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_the_gradients_of_a_norm(form, shape, dtype, device):
    x, grad = (rows(shape, dtype, device, seed) for seed in (1, 2))
    weight, bias = (each.double().requires_grad_() for each in vectors(shape[1], device, 3))
    normal = F.layer_norm(x.double(), x.shape[1:], weight, bias, 1e-5)
    expected = torch.autograd.grad(normal, [weight, bias], grad.double())
    _, mean, rstd = ops.layer_norms(x, [(weight.detach().float(), bias.detach().float())], 1e-5)
    with ops.using(form):
        found = scale_shift.norm_gradients(grad, x, mean, rstd)
    near(found, torch.stack(expected), torch.float32)


@pytest.mark.parametrize("form", FORMS)
def test_small_changes_of_a_scale_are_not_rounded_away(form, device):
    x = rows((16, 256), torch.bfloat16, device, 1)
    none, one = torch.zeros(256, device=device), torch.ones(256, device=device)
    with ops.using(form):
        assert torch.equal(scale_shift.scale_shift(x, one, none, torch.empty_like(x)), x)
        # Both are the same in bfloat16.
        few, more = (scale_shift.scale_shift(x, by * one, none, torch.empty_like(x)) for by in (1.3, 1.302))
    assert (few != more).float().mean() > 0.1


def test_no_tokens_and_what_does_not_fit(device):
    x = rows((4, 40), torch.float32, device, 1)
    scale, bias = vectors(40, device, 2)
    with ops.using("triton"):
        none = x[:0].clone()
        assert scale_shift.add_scaled(none, (none, scale, bias), (none, scale, bias)).shape == (0, 40)
        assert not scale_shift.scale_backward(none, none, scale, none, through_gelu=True).any()
        with pytest.raises(ValueError, match="contiguous last dimension"):
            scale_shift.scale_shift(x, scale, bias, torch.empty(40, 4).T)
