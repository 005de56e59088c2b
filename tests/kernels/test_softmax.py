"""Cross entropy of rows of logits and its gradient, against PyTorch in float32."""

import pytest
import torch
from torch import Tensor

from falcon_qlora.kernels import ops
from falcon_qlora.kernels.softmax import cross_entropy_


def rows(count: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 4 * torch.randn(count, vocabulary + 3, generator=generator)
    targets = torch.randint(0, vocabulary, (count,), generator=generator)
    # Rows lie apart from each other, as in a slice.
    return logits.to(device, dtype)[:, :vocabulary], targets.to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [5, 64, 8192, 20_001])
@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_losses_and_gradients_are_those_of_float32(scale, form, vocabulary, dtype, device):
    logits, targets = rows(3, vocabulary, dtype, device)
    targets[0], targets[1] = 0, vocabulary - 1
    leaf = logits.clone().float().requires_grad_()
    losses = torch.nn.functional.cross_entropy(scale * leaf, targets, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    with ops.using(form):
        found = ops.cross_entropy_(logits, targets, True, scale)
    torch.testing.assert_close(found, losses.detach(), rtol=1e-5, atol=1e-5)
    # Rounded once, so off by half a step at most.
    tolerance = 1e-5 if dtype == torch.float32 else 1.01 * 2**-8
    torch.testing.assert_close(logits.float(), gradient, rtol=tolerance, atol=1e-7)


def test_large_and_infinite_logits_stay_finite(device):
    logits = torch.tensor([[3e4, -3e4, 1.0], [float("-inf"), 2.0, 2.0]], device=device)
    targets = torch.tensor([0, 1], device=device)
    found = cross_entropy_(logits, targets, True)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.6931472], device=device))
    torch.testing.assert_close(logits, torch.tensor([[0.0, 0.0, 0.0], [0.0, -0.5, 0.5]], device=device))


def test_without_gradient_the_logits_stay(device):
    logits, targets = rows(2, 100, torch.bfloat16, device)
    before = logits.clone()
    cross_entropy_(logits, targets, False)
    assert torch.equal(logits, before)
