"""The norm kernels against float64 and autograd, over dtypes, odd widths and strided rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from falcon_qlora.kernels.layer_norm import layer_norms, layer_norms_backward

EPS = 1e-5
# 4,544 and 1,100 are held in two parts, 14,848 is the widest Falcon.
WIDTHS = [1, 7, 64, 71, 1024, 1100, 4544, 14848]
# Largest distance to float64, of the largest value: the rounding of the result itself.
TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
DTYPES = list(TOLERANCES)


class Case:
    """Inputs in `dtype` and what float64 makes of them."""

    def __init__(self, tokens: int, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(hidden)

        def make(*shape: int, offset: float = 0.0) -> Tensor:
            return (torch.randn(shape, generator=generator) + offset).to(device, dtype)

        self.x = make(tokens, hidden, offset=1.5)
        self.weights = [make(hidden, offset=1.0), make(hidden, offset=1.0)]
        self.biases = [make(hidden), make(hidden)]
        self.dy = [make(tokens, hidden), make(tokens, hidden)]
        self.add = make(tokens, hidden)

    def expected(self, norms: int, with_add: bool) -> tuple[list[Tensor], Tensor]:
        x = self.x.double().requires_grad_()
        hidden = (x.shape[1],)
        results = [
            F.layer_norm(x, hidden, self.weights[i].double(), self.biases[i].double(), EPS)
            for i in range(norms)
        ]
        (dx,) = torch.autograd.grad(results, x, [dy.double() for dy in self.dy[:norms]])
        return [y.detach() for y in results], dx + self.add.double() if with_add else dx


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    (y,), mean, rstd = layer_norms(x, [(weight, bias)], eps, [out])
    return y, mean, rstd


def layer_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, **options: Tensor
) -> Tensor:
    return layer_norms_backward(x, [grad], mean, rstd, [weight], **options)


def _close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    largest = expected.abs().max().item()
    # The gradient of a row of few values is a difference of numbers larger than itself.
    torch.testing.assert_close(
        actual.double(), expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype] * max(largest, 1.0)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", WIDTHS)
def test_one_norm_and_its_gradient(hidden: int, dtype: torch.dtype, device: torch.device) -> None:
    case = Case(3, hidden, dtype, device)
    y, mean, rstd = layer_norm(case.x, case.weights[0], case.biases[0], EPS)
    dx = layer_norm_backward(case.dy[0], case.x, mean, rstd, case.weights[0])
    (expected_y,), expected_dx = case.expected(1, with_add=False)
    _close(y, expected_y, dtype)
    if hidden > 1:  # a row of one value has no variance, and rstd of 300 makes noise of rounding
        _close(dx, expected_dx, dtype)
    torch.testing.assert_close(mean.double(), case.x.double().mean(-1), rtol=1e-6, atol=1e-6)
    assert mean.dtype == rstd.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", WIDTHS[1:])
def test_two_norms_share_statistics_and_gradients(
    hidden: int, dtype: torch.dtype, device: torch.device
) -> None:
    case = Case(2, hidden, dtype, device)
    (w1, w2), (b1, b2) = case.weights, case.biases
    (y1, y2), mean, rstd = layer_norms(case.x, [(w1, b1), (w2, b2)], EPS)
    dx = layer_norms_backward(case.x, case.dy, mean, rstd, [w1, w2], addend=case.add)
    (expected_1, expected_2), expected_dx = case.expected(2, with_add=True)
    _close(y1, expected_1, dtype)
    _close(y2, expected_2, dtype)
    _close(dx, expected_dx, dtype)


@pytest.mark.parametrize("hidden", [71, 1100])
def test_the_residual_gradient_is_added_before_rounding(hidden: int, device: torch.device) -> None:
    case = Case(3, hidden, torch.bfloat16, device)
    _, mean, rstd = layer_norm(case.x, case.weights[0], case.biases[0], EPS)
    dx = layer_norm_backward(case.dy[0], case.x, mean, rstd, case.weights[0], addend=case.add)
    _close(dx, case.expected(1, with_add=True)[1], torch.bfloat16)
    for out in (case.dy[0].clone(), case.add.clone()):
        # In place of either input.
        dy, add = (out, case.add) if torch.equal(out, case.dy[0]) else (case.dy[0], out)
        again = layer_norm_backward(dy, case.x, mean, rstd, case.weights[0], addend=add, out=out)
        assert again is out
        assert torch.equal(out, dx)


@pytest.mark.parametrize("hidden", [71, 1100])
def test_rows_may_lie_apart_or_across(hidden: int, device: torch.device) -> None:
    case = Case(3, hidden, torch.bfloat16, device)
    weight, bias = case.weights[0], case.biases[0]
    y, mean, rstd = layer_norm(case.x, weight, bias, EPS)
    dx = layer_norm_backward(case.dy[0], case.x, mean, rstd, weight, addend=case.add)

    def apart(matrix: Tensor) -> Tensor:
        return torch.cat([torch.full_like(matrix, torch.nan), matrix], 1)[:, hidden:]

    def across(matrix: Tensor) -> Tensor:
        return matrix.T.contiguous().T

    for laid in (apart, across):
        x, dy, add = laid(case.x), laid(case.dy[0]), laid(case.add)
        assert torch.equal(layer_norm(x, weight, bias, EPS)[0], y)
        assert torch.equal(layer_norm_backward(dy, x, mean, rstd, weight, addend=add), dx)
    buffer = torch.zeros(3, hidden + 9, dtype=torch.bfloat16, device=device)
    layer_norm(case.x, weight, bias, EPS, out=buffer[:, 4:-5])
    assert torch.equal(buffer[:, 4:-5], y)
    layer_norm_backward(case.dy[0], case.x, mean, rstd, weight, addend=case.add, out=buffer[:, 4:-5])
    assert torch.equal(buffer[:, 4:-5], dx)
    assert not buffer[:, :4].any()
    assert not buffer[:, -5:].any()


def test_float32_weights_with_bfloat16_tokens(device: torch.device) -> None:
    case = Case(3, 71, torch.bfloat16, device)
    weight, bias = case.weights[0].float() * 1.001, case.biases[0].float() * 1.001
    y, mean, rstd = layer_norm(case.x, weight, bias, EPS)
    expected = F.layer_norm(case.x.double(), (71,), weight.double(), bias.double(), EPS)
    _close(y, expected, torch.bfloat16)
    assert layer_norm_backward(case.dy[0], case.x, mean, rstd, weight).dtype == torch.bfloat16


def test_no_tokens(device: torch.device) -> None:
    case = Case(0, 64, torch.float32, device)
    y, mean, rstd = layer_norm(case.x, case.weights[0], case.biases[0], EPS)
    assert y.shape == (0, 64)
    assert layer_norm_backward(case.dy[0], case.x, mean, rstd, case.weights[0]).shape == (0, 64)


def test_a_large_mean_costs_no_precision(device: torch.device) -> None:
    x = torch.randn(2, 512, generator=torch.Generator().manual_seed(0)).to(device) + 1000
    ones, zeros = torch.ones(512, device=device), torch.zeros(512, device=device)
    y = layer_norm(x, ones, zeros, EPS)[0]
    expected = F.layer_norm(x.double(), (512,), eps=EPS)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=2e-3)
