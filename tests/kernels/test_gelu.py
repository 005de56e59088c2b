"""The GELU kernels against float64 and autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from falcon_qlora.kernels.gelu import gelu, gelu_backward

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 7), (2, 256), (5, 300), (2, 4100)]
RELATIVE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def _inputs(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(shape[1])
    x = 3 * torch.randn(shape, generator=generator)
    grad = torch.randn(shape, generator=generator)
    return x.to(device, dtype), grad.to(device, dtype)


def _expected(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Output and gradient in float64."""
    wide = x.double().requires_grad_()
    y = F.gelu(wide)
    (dx,) = torch.autograd.grad(y, wide, grad.double())
    return y.detach(), dx


def _close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=RELATIVE[dtype], atol=5e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradient(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    x, grad = _inputs(shape, dtype, device)
    expected_y, expected_dx = _expected(x, grad)
    y = gelu(x)
    _close(y, expected_y, dtype)
    dx, again = gelu_backward(grad.clone(), x)
    _close(dx, expected_dx, dtype)
    assert torch.equal(again, y)


def test_in_place_of_the_gradient_and_of_the_input(device: torch.device) -> None:
    x, grad = _inputs((5, 300), torch.bfloat16, device)
    expected_dx, expected_y = gelu_backward(grad.clone(), x)
    in_grad, in_x = grad.clone(), x.clone()
    dx, y = gelu_backward(in_grad, in_x, in_grad, output=in_x)
    assert dx is in_grad
    assert y is in_x
    assert torch.equal(dx, expected_dx)
    assert torch.equal(y, expected_y)


def test_slices_are_read_and_written_where_they_lie(device: torch.device) -> None:
    x, grad = _inputs((5, 300), torch.bfloat16, device)
    expected_dx, expected_y = gelu_backward(grad.clone(), x)

    def slice_of(matrix: Tensor) -> Tensor:
        return F.pad(matrix, (16, 3), value=torch.nan)[:, 16:-3]

    assert torch.equal(gelu(slice_of(x)), expected_y)
    assert torch.equal(gelu(x.T.contiguous().T), expected_y)
    for of_grad in (slice_of(grad), grad.T.contiguous().T):
        buffer = torch.zeros(5, 320, dtype=torch.bfloat16, device=device)
        dx, y = gelu_backward(of_grad, slice_of(x), buffer[:, 16:-4])
        assert torch.equal(y, expected_y)
        assert torch.equal(dx, expected_dx)
        assert torch.equal(buffer[:, 16:-4], expected_dx)
        assert not buffer[:, :16].any()
        assert not buffer[:, -4:].any()
    with pytest.raises(ValueError, match="contiguous last dimension"):
        gelu(x, torch.empty(300, 5, dtype=torch.bfloat16, device=device).T)


def test_the_tail_is_more_exact_than_float32s_error_function(device: torch.device) -> None:
    x = -torch.linspace(0, 13, 2001, dtype=torch.float32, device=device)[None]
    y = gelu(x).double()
    expected = x.double() * 0.5 * torch.special.erfc(-x.double() / 2**0.5)
    assert (y - expected).abs().max() < 1e-7
    near = x > -5
    assert ((y - expected).abs() <= 1e-4 * expected.abs())[near].all()
    assert ((y - expected).abs() <= 1e-2 * expected.abs() + 1e-37).all()
    far = gelu(torch.tensor([[-1e4, -1e15, 1e4, 0.0]], device=device))
    assert far.tolist() == [[0.0, 0.0, 1e4, 0.0]]


def test_no_tokens(device: torch.device) -> None:
    x = torch.empty(0, 64, device=device)
    assert gelu(x).shape == (0, 64)
    assert gelu_backward(x, x)[0].shape == (0, 64)
