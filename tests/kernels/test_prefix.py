"""What queries read from a prefix, and all gradients, against PyTorch's attention in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from falcon_qlora.kernels import ops, prefix

# T, G, Q/G, D, P: 7B's one key head, groups, one key head a query head, odd sizes, one row, more than a tile.
SHAPES = [(5, 1, 71, 64, 10), (21, 2, 4, 16, 10), (9, 3, 1, 8, 5), (3, 2, 29, 48, 1), (40, 1, 5, 128, 33)]
SHAPES += [(19, 4, 3, 256, 20)]  # Falcon3's
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
FORMS = ["torch", "triton"]


def inputs(shape, dtype, device):
    """Query ``[T, G, Q/G, D]`` as it lies in the fused projection, output, key, value, gate and gradients."""
    tokens, kv_heads, group, head_dim, rows = shape
    generator = torch.Generator().manual_seed(tokens)

    def normal(*sizes):
        return torch.randn(sizes, generator=generator).to(device, dtype)

    fused = normal(tokens, kv_heads, group + 2, head_dim)
    key, value = normal(2, rows, 3 * kv_heads, head_dim)[:, :, ::3]  # heads apart from each other
    heads = kv_heads * group
    output, of_query = normal(2, tokens, heads, head_dim)
    # As a part of the gradient of what is joined: rows are longer.
    grad = normal(tokens, heads * head_dim + 24)[:, 24:].unflatten(1, (heads, head_dim))
    return fused[:, :, :-2], output, key, value, normal(heads).float(), grad, of_query


def expected(query, output, key, value, gate, grad, of_query):
    """The sum and the five gradients, by autograd in float64."""
    leaves = [each.detach().double().requires_grad_() for each in (query, output, key, value, gate)]
    query, output, key, value, gate = leaves
    group = query.shape[2]
    heads = [each.repeat_interleave(group, 1).transpose(0, 1) for each in (key, value)]
    read = F.scaled_dot_product_attention(query.flatten(1, 2).transpose(0, 1), *heads).transpose(0, 1)
    total = output + gate[:, None] * read
    grads = torch.autograd.grad(total, [leaves[0], *leaves[2:]], grad.double())
    return total.detach(), of_query.double() + grads[0].flatten(1, 2), *grads[1:]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_sum_and_every_gradient(shape, dtype, form, device, monkeypatch):
    from falcon_qlora.kernels import prefix_triton

    monkeypatch.setattr(prefix_triton, "_PROGRAMS", 2)  # so that a program goes through several tiles
    query, output, key, value, gate, grad, of_query = inputs(shape, dtype, device)
    truth = expected(query, output, key, value, gate, grad, of_query)
    with ops.using(form):
        found = [prefix.add(query, output, key, value, gate)]
        found += prefix.add_backward(grad, query, key, value, gate, of_query)
    assert found[0].dtype == found[1].dtype == dtype
    assert {each.dtype for each in found[2:]} == {torch.float32}
    for ours, theirs in zip(found, truth, strict=True):
        scale = float(theirs.abs().max())
        assert_close(ours.double(), theirs, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype] * scale)


@pytest.mark.parametrize("form", FORMS)
def test_small_changes_of_a_gate_are_not_rounded_away(form, device):
    query, output, key, value, gate, *_ = inputs(SHAPES[1], torch.bfloat16, device)
    output, gate = torch.zeros_like(output), torch.ones_like(gate)
    with ops.using(form):
        one, more = (prefix.add(query, output, key, value, gate * by) for by in (1.0, 1 + 2**-9))
    assert (one != more).float().mean() > 0.3


def test_no_tokens_large_scores_and_what_does_not_fit(device):
    query, output, key, value, gate, grad, of_query = inputs(SHAPES[1], torch.float32, device)
    with ops.using("triton"):
        none = prefix.add_backward(grad[:0], query[:0], key, value, gate, of_query[:0])
        assert prefix.add(query[:0], output[:0], key, value, gate).shape == output[:0].shape
        assert not any(each.any() for each in none[1:])
        far = prefix.add(1e4 * query, output, key, value, gate)
        with pytest.raises(ValueError, match="expected"):
            prefix.add(query, output[:, 1:], key, value, gate)
        with pytest.raises(ValueError, match="contiguous last dimension"):
            prefix.add(query, output.mT.contiguous().mT, key, value, gate)
    with ops.using("torch"):
        plain = prefix.add(1e4 * query, output, key, value, gate)
    assert_close(far, plain, rtol=1e-3, atol=1e-3)
