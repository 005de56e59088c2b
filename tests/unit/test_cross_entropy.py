"""The chunked cross entropy computes what plain PyTorch computes, and keeps no logits."""

import pytest
import torch
from torch.testing import assert_close

from falcon_qlora.kernels.cross_entropy import chunked_cross_entropy

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")


def reference(states, weight, targets):
    """The sum of the cross entropies in plain PyTorch, the product in the weight's dtype."""
    return torch.nn.functional.cross_entropy((states @ weight.T).float(), targets, reduction="sum")


def example(tokens, hidden=24, vocabulary=97, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens)
    states = torch.randn(tokens, hidden, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, hidden, generator=generator).to(dtype).requires_grad_()
    return states, weight, torch.randint(0, vocabulary, (tokens,), generator=generator)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 16, 17, 1000])
@pytest.mark.parametrize("tokens", [1, 16, 33])
def test_loss_and_gradients_equal_the_reference(tokens, chunk_tokens):
    states, weight, targets = example(tokens)
    expected = reference(states, weight, targets)
    expected_gradients = torch.autograd.grad(expected * 0.37, [states, weight])
    loss = chunked_cross_entropy(states, weight, targets, chunk_tokens=chunk_tokens)
    assert loss.dtype == torch.float32
    assert_close(loss, expected, rtol=1e-6, atol=1e-5)
    gradients = torch.autograd.grad(loss * 0.37, [states, weight])
    assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_a_multiplier_of_the_logits(dtype, allowed):
    states, weight, targets = example(33, dtype=dtype)
    rows = (
        torch.tensor([4, 90]),
        torch.randn(2, 24, generator=torch.Generator().manual_seed(1)).requires_grad_(),
    )
    leaves = [each.detach().double().requires_grad_() for each in (states, weight, rows[1])]
    logits = 0.21 * (leaves[0] @ leaves[1].index_copy(0, rows[0], leaves[2]).T)
    exact = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    expected = torch.autograd.grad(0.37 * exact, leaves)
    loss = chunked_cross_entropy(states, weight, targets, rows=rows, scale=0.21, chunk_tokens=7)
    assert_close(loss.double(), exact, rtol=allowed, atol=0)
    gradients = torch.autograd.grad(0.37 * loss, [states, weight, rows[1]])
    for found, gradient in zip(gradients, expected, strict=True):
        assert (found - gradient).norm() < allowed * gradient.norm()


@pytest.mark.parametrize("chunk_tokens", [7, 1000])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_scaled_and_shifted_logits_too(dtype, allowed, chunk_tokens):
    states, weight, targets = example(33, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    vectors = [1 + torch.randn(97, generator=generator), torch.randn(97, generator=generator)]
    vectors[0][3] = 0.0
    leaves = [each.detach().double().requires_grad_() for each in (states, weight, *vectors)]
    logits = leaves[2] * (leaves[0] @ leaves[1].T + leaves[3])
    exact = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    expected = torch.autograd.grad(0.37 * exact, leaves)
    vectors = [each.requires_grad_() for each in vectors]
    loss = chunked_cross_entropy(states, weight, targets, vectors=tuple(vectors), chunk_tokens=chunk_tokens)
    assert_close(loss.double(), exact, rtol=allowed, atol=0)
    gradients = torch.autograd.grad(0.37 * loss, [states, weight, *vectors])
    for found, gradient in zip(gradients, expected, strict=True):
        assert (found - gradient).norm() < allowed * gradient.norm()
    with torch.no_grad():  # an adapter opened for inference
        again = chunked_cross_entropy(states, weight, targets, vectors=tuple(vectors))
    assert_close(again, loss.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_to_float32_as_the_reference_is(dtype):
    states, weight, targets = example(40, dtype=dtype)
    exact = reference(states.float(), weight.float(), targets)
    exact_gradient = torch.autograd.grad(exact, states)[0].float()
    loss = chunked_cross_entropy(states, weight, targets, chunk_tokens=9)
    gradient = torch.autograd.grad(loss, states)[0]
    assert gradient.dtype == dtype
    assert_close(loss, exact, rtol=5e-3, atol=0)
    assert (gradient.float() - exact_gradient).norm() / exact_gradient.norm() < 1e-2


def test_a_frozen_head_gets_no_gradient_and_without_any_need_nothing_is_kept():
    states, weight, targets = example(5)
    chunked_cross_entropy(states, weight.detach(), targets).backward()
    assert weight.grad is None
    assert states.grad is not None
    with torch.no_grad():
        assert not chunked_cross_entropy(states, weight, targets).requires_grad


def test_no_targets_are_a_zero_that_backward_can_pass():
    states, weight, targets = example(0)
    loss = chunked_cross_entropy(states, weight, targets)
    loss.backward()
    assert loss.item() == 0
    assert states.grad.shape == (0, 24)
    assert not weight.grad.any()


def test_what_is_kept_for_backward_is_the_hidden_gradient_alone():
    states, weight, targets = example(64, vocabulary=1000)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        chunked_cross_entropy(states, weight.detach(), targets, chunk_tokens=8)
    assert sum(kept) == states.numel()


def test_under_autocast_the_product_runs_in_autocasts_dtype():
    states, weight, targets = example(12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = chunked_cross_entropy(states, weight.detach(), targets)
        expected = reference(states, weight.detach(), targets)
    loss.backward()
    assert_close(loss, expected, rtol=1e-6, atol=1e-5)
    assert states.grad.dtype == torch.float32
