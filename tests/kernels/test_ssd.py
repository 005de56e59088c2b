"""Falcon-H1's convolution, scan and gate against the recurrence token by token in float64."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from falcon_qlora.kernels import ops, ssd, ssd_ops
from falcon_qlora.models.packed_attention import Sequences

# With chunks of 16: of one token; one that ends on a chunk's edge; one over several chunks; many in one
# chunk; one that ends with a chunk's first token. 93 tokens in all, no multiple of 16.
LENGTHS = (1, 15, 37, 1, 3, 1, 1, 6, 16, 12)
FORMS = ["torch", "triton"]
SCALE = 0.7
KINDS = {
    "one group": {},
    "two groups, norm behind the gate, no bias": {
        "groups": 2,
        "norm": True,
        "norm_before_gate": False,
        "bias": False,
    },
    "norm before the gate, two taps": {"groups": 2, "norm": True, "norm_before_gate": True, "taps": 2},
    "clamped": {"limits": (0.5, 1.2), "taps": 3},
    "strong decay": {"rate": -60.0},
    "weak decay": {"rate": -1e-3},
}


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    from falcon_qlora.kernels import convolution_triton, ssd_triton

    monkeypatch.setattr(ssd_triton, "_CHUNK", 16)
    monkeypatch.setattr(ssd_triton, "_HEADS_A_PROGRAM", 2)  # of three in a group
    for options in (ssd_triton._WALK, ssd_triton._OUTPUTS, ssd_triton._OF_SHARED):
        monkeypatch.setitem(options, "LANES", 16)
    monkeypatch.setitem(ssd_triton._WALK, "ROWS", 16)
    monkeypatch.setitem(convolution_triton._TILE, "TOKENS", 8)
    monkeypatch.setitem(convolution_triton._TILE, "CHANNELS", 128)


def parameters(
    device="cpu",
    *,
    groups=1,
    heads_a_group=3,
    head_size=16,
    state=32,
    taps=4,
    bias=True,
    norm=False,
    norm_before_gate=False,
    limits=(0.0, float("inf")),
    rate=-1.0,
):
    generator = torch.Generator().manual_seed(7)
    heads = groups * heads_a_group
    width, shared = heads * head_size, groups * state

    def uniform(*shape, low=0.4, high=1.2):
        return torch.empty(shape).uniform_(low, high, generator=generator).to(device)

    multipliers = torch.repeat_interleave(
        torch.tensor([0.8, 0.6, 0.9, 1.2, 0.7]), torch.tensor([width, width, shared, shared, heads])
    )
    return ssd.StateSpace(
        groups=groups,
        state=state,
        multipliers=multipliers.to(device),
        weight=uniform(width + 2 * shared, taps, low=-0.6, high=0.8),
        bias=uniform(width + 2 * shared, low=-0.5, high=0.5) if bias else None,
        step_bias=uniform(heads, low=-1.5, high=1.0),
        limits=limits,
        rate=rate * uniform(heads),
        skip=uniform(heads),
        norm=uniform(width) if norm else None,
        epsilon=1e-5 if norm else 0.0,
        norm_before_gate=norm_before_gate,
    )


def rows(tokens, columns, device="cpu", dtype=torch.float32, seed=1):
    """Apart from each other, as in a slice."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, columns + 16, generator=generator).to(device, dtype)[:, 8:-8]


def token_by_token(projected, space, lengths):
    """The whole of `ssd_ops.mix_forward`, in float64."""
    space = in_float64(space)
    heads, size, state = space.heads, space.head_size, space.state
    every, taps = space.heads // space.groups, space.weight.shape[1]
    outputs = []
    for document in (projected * space.multipliers).split(list(lengths)):
        h = torch.zeros(heads, size, state, dtype=torch.float64, device=projected.device)
        for t in range(len(document)):
            z, _, dt = space.split(document[t])
            before = torch.zeros_like(space.weight[:, 0]) if space.bias is None else space.bias
            for back in range(min(taps, t + 1)):
                before = before + space.weight[:, taps - 1 - back] * space.split(document[t - back])[1]
            shared = space.groups * state
            x, b, c = F.silu(before).split([space.width, shared, shared])
            x = x.view(heads, size)
            b, c = (each.view(-1, state).repeat_interleave(every, 0) for each in (b, c))
            step = torch.log1p(torch.exp(dt + space.step_bias)).clamp(*space.limits)
            h = (step * space.rate).exp()[:, None, None] * h
            h = h + step[:, None, None] * x[:, :, None] * b[:, None, :]
            y = ((h * c[:, None, :]).sum(-1) + space.skip[:, None] * x).flatten()
            gate = F.silu(z)
            if space.norm is None:
                outputs.append(y * gate)
                continue
            normed = (y if space.norm_before_gate else y * gate).view(space.groups, -1)
            normed = normed / (normed.square().mean(-1, keepdim=True) + space.epsilon).sqrt()
            normed = normed.flatten() * space.norm
            outputs.append(normed * gate if space.norm_before_gate else normed)
    return SCALE * torch.stack(outputs)


def in_float64(space):
    tensors = {
        field.name: getattr(space, field.name).double()
        for field in dataclasses.fields(space)
        if isinstance(getattr(space, field.name), torch.Tensor)
    }
    return dataclasses.replace(space, **tensors)


def truth(projected, grad, space, lengths):
    leaf = projected.double().requires_grad_()
    output = token_by_token(leaf, space, lengths)
    return output.detach(), torch.autograd.grad(output, leaf, grad.double())[0]


def mixed(projected, grad, space, lengths):
    """Output, gradient, and the output that the backward pass writes again."""
    sequences = Sequences.from_lengths(lengths, projected.device)
    documents = sequences.position_ids[0], sequences.cu_seqlens
    output, again = (torch.full_like(grad, torch.nan) for _ in range(2))
    of_projected = torch.full_like(projected, torch.nan)
    y = ssd_ops.mix_forward(projected, space, *documents, output, SCALE)
    ssd_ops.mix_backward(grad, projected, y, space, *documents, of_projected, again, SCALE)
    return output, of_projected, again


def segments(tensor, space):
    shared = space.groups * space.state
    sizes = [space.width, space.width, shared, shared, space.heads]
    return dict(zip(("z", "x", "B", "C", "dt"), tensor.split(sizes, dim=-1), strict=True))


def distance(found, expected):
    """Relative to the largest value."""
    return float((found.double() - expected).abs().max() / expected.abs().max())


def errors(found, expected, space):
    """Of the output and of each part of the gradient."""
    output, gradient = expected
    assert output.abs().max() > 0.1
    far = {"output": distance(found[0], output), "output again": distance(found[2], output)}
    for name, part in segments(gradient, space).items():
        assert part.abs().max() > 1e-5, name
        far[name] = distance(segments(found[1], space)[name], part)
    return far


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_output_and_every_gradient_are_the_recurrences(form, kind, device):
    space = parameters(device, **KINDS[kind])
    columns = len(space.multipliers)
    projected, grad = (rows(sum(LENGTHS), n, device, seed=s) for n, s in ((columns, 1), (space.width, 2)))
    with ops.using(form):
        far = errors(mixed(projected, grad, space, LENGTHS), truth(projected, grad, space, LENGTHS), space)
    assert max(far.values()) < 3e-5, far
