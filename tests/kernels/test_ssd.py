"""Falcon-H1's convolution, scan and gate against the recurrence token by token in float64."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from falcon_qlora.kernels import ops, ssd, ssd_ops
from falcon_qlora.models.layouts.falcon_h1 import state_space
from falcon_qlora.models.packed_attention import Sequences
from tests.unit.test_falcon_h1 import KINDS as KINDS_OF_MODELS
from tests.unit.test_falcon_h1 import plain_model

# With chunks of 16: of one token; one that ends on a chunk's edge; one over several chunks that ends with a
# chunk's first token; many in one chunk; 59 tokens in all, no multiple of 16.
LENGTHS = (1, 15, 33, 1, 2, 1, 6)
FORMS = ["torch", "triton"]
SCALE = 0.7
KINDS = {
    "one group": {},
    "two groups, norm behind the gate, no bias": {
        "groups": 2,
        "heads_a_group": 1,
        "norm": True,
        "bias": False,
    },
    "norm before the gate, two taps": {
        "groups": 2,
        "heads_a_group": 2,
        "norm": True,
        "norm_before_gate": True,
        "taps": 2,
    },
    "clamped": {"limits": (0.5, 1.2), "taps": 3},
    "strong decay": {"rate": -60.0},
    "weak decay": {"rate": -1e-3},
}
ALWAYS = ("two groups, norm behind the gate, no bias", "strong decay")


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
    """The whole of `ssd_ops.mix_forward` and `mix_output`, in float64."""
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
    y = ssd_ops.mix_forward(projected, space, *documents)
    ssd_ops.mix_output(projected, y, space, output, SCALE)
    ssd_ops.mix_backward(grad, projected, y, space, *documents, of_projected, again, SCALE)
    return output, of_projected, again


def segments(tensor, space):
    shared = space.groups * space.state
    sizes = [space.width, space.width, shared, shared, space.heads]
    return dict(zip(("z", "x", "B", "C", "dt"), tensor.split(sizes, dim=-1), strict=True))


def distance(found, expected):
    """Relative to the largest value."""
    return float((found.double() - expected).abs().max() / expected.abs().max())


def of_norms(found, expected):
    """Relative, of all values together: one value may be off by a rounding more."""
    return float((found.double() - expected).norm() / expected.norm())


def errors(found, expected, space, distance=distance):
    """Of the output and of each part of the gradient."""
    output, gradient = expected
    assert output.abs().max() > 0.1
    far = {"output": distance(found[0], output), "output again": distance(found[2], output)}
    for name, part in segments(gradient, space).items():
        assert part.abs().max() > 1e-5, name
        far[name] = distance(segments(found[1], space)[name], part)
    return far


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[] if kind in ALWAYS else pytest.mark.slow) for kind in KINDS],
)
@pytest.mark.parametrize("form", FORMS)
def test_output_and_every_gradient_are_the_recurrences(form, kind, device):
    space = parameters(device, **KINDS[kind])
    columns = len(space.multipliers)
    projected, grad = (rows(sum(LENGTHS), n, device, seed=s) for n, s in ((columns, 1), (space.width, 2)))
    with ops.using(form):
        far = errors(mixed(projected, grad, space, LENGTHS), truth(projected, grad, space, LENGTHS), space)
    assert max(far.values()) < 3e-5, far


@pytest.mark.parametrize(
    ("head_size", "state"), [(16, 64), (64, 16), pytest.param(32, 128, marks=pytest.mark.slow)]
)
def test_heads_and_states_in_several_tiles(head_size, state, device):
    space = parameters(device, heads_a_group=1, head_size=head_size, state=state)
    lengths = (20, 13)
    columns = len(space.multipliers)
    projected, grad = (rows(33, n, device, seed=s) for n, s in ((columns, 1), (space.width, 2)))
    with ops.using("triton"):
        found = mixed(projected, grad, space, lengths)
    assert max(errors(found, truth(projected, grad, space, lengths), space).values()) < 3e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALWAYS)
def test_bfloat16_is_hardly_further_from_float64_than_what_is_kept_in_it(kind, device):
    """The plain form rounds what lies in memory too, and Triton's the operands of products as well."""
    space = parameters(device, **KINDS[kind])
    columns = len(space.multipliers)
    projected, grad = (
        rows(sum(LENGTHS), n, device, torch.bfloat16, seed=s) for n, s in ((columns, 1), (space.width, 2))
    )
    expected, far = truth(projected, grad, space, LENGTHS), {}
    for form in FORMS:
        with ops.using(form):
            found = mixed(projected, grad, space, LENGTHS)
        assert all(each.dtype == torch.bfloat16 for each in found)
        far[form] = errors(found, expected, space, of_norms)
    assert max(far["torch"].values()) < 0.04
    for name, ours in far["triton"].items():
        assert ours < 1.3 * far["torch"][name] + 2**-9, (name, far)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["norm behind the gate", "two groups, no norm, no bias"])
def test_no_further_from_float32_than_transformers_in_bfloat16(kind, device):
    """Each document alone through Transformers' mixer, in float32 and in bfloat16."""
    sizes = {"mamba_d_ssm": 64, "mamba_d_head": 32, "mamba_n_heads": 2}
    mixer = plain_model(**KINDS_OF_MODELS[kind] | sizes).model.layers[0].mamba.to(device)
    generator = torch.Generator().manual_seed(5)
    width = mixer.in_proj.weight.shape[0]
    projected = torch.randn(sum(LENGTHS), width, generator=generator).to(device, torch.bfloat16)
    grad = torch.randn(sum(LENGTHS), 64, generator=generator).to(device, torch.bfloat16)

    def theirs(dtype):
        copied = copy.deepcopy(mixer).to(dtype)
        copied.mup_vector, copied.ssm_in_multiplier = copied.mup_vector.to(dtype), 1.0
        leaf = projected.to(dtype).requires_grad_()
        copied.in_proj, copied.out_proj = torch.nn.Identity(), torch.nn.Identity()
        output = torch.cat([copied(each[None])[0] for each in leaf.split(LENGTHS)])
        return output.detach().double(), torch.autograd.grad(output, leaf, grad.to(dtype))[0].double()

    space = state_space(mixer)
    space = dataclasses.replace(space, rate=space.rate.detach())
    exact, rounded = theirs(torch.float32), theirs(torch.bfloat16)
    sequences = Sequences.from_lengths(LENGTHS, device)
    documents = sequences.position_ids[0], sequences.cu_seqlens
    with torch.no_grad(), ops.using("triton"):
        output, of_projected = torch.empty_like(grad), projected.clone()
        y = ssd_ops.mix_forward(projected, space, *documents)
        ssd_ops.mix_output(projected, y, space, output)
        ssd_ops.mix_backward(grad, of_projected, y, space, *documents, of_projected, grad)
    assert torch.equal(grad, output)  # written again, over the gradient

    assert of_norms(output, exact[0]) < of_norms(rounded[0], exact[0])
    for name, expected in segments(exact[1], space).items():
        ours = of_norms(segments(of_projected, space)[name], expected)
        assert ours < max(of_norms(segments(rounded[1], space)[name], expected), 2**-8), name


@pytest.mark.slow
def test_what_no_document_sees_and_no_tokens(device):
    """Changing the first and last document moves not a bit of the one between."""
    space = parameters(device, groups=2, heads_a_group=1, norm=True)
    columns, results = len(space.multipliers), []
    for seed in (1, 2):
        projected, grad = (rows(29, n, device, seed=s) for n, s in ((columns, 1), (space.width, 2)))
        for each in (projected, grad):
            each[:5], each[22:] = (rows(n, each.shape[1], device, seed=seed + 5) for n in (5, 7))
        with ops.using("triton"):
            found = mixed(projected, grad, space, (5, 17, 7))
        results.append([each[5:22] for each in found])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    with ops.using("triton"):
        empty = rows(0, columns, device), rows(0, space.width, device)
        positions, starts = torch.empty(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
        y = ssd_ops.mix_forward(empty[0], space, positions, starts)
        ssd_ops.mix_output(empty[0], y, space, empty[1])
        ssd_ops.mix_backward(empty[1], empty[0], y, space, positions, starts, empty[0], empty[1])
    assert y.shape == (0, space.width)
