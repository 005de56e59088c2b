"""The rotary kernels against Transformers' own rotation, in every layout that has one."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

pytest.importorskip("triton", reason="Triton is not installed")

from falcon_qlora.kernels import ops
from falcon_qlora.kernels.rotary import rotate_, rotate_join

# T, G, Q/G + 2, D: 7B's 71 query heads on one, groups as in 11B, 40B and 180B, and a head size of 3·16.
LAYOUTS = [(3, 1, 73, 64), (9, 4, 6, 64), (3, 2, 18, 128), (2, 2, 31, 64), (9, 2, 3, 48), (1, 1, 3, 2)]
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def _inputs(
    layout: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    angles_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """fused ``[T, G, Q/G + 2, D]``, cosine and sine ``[T, D]``."""
    tokens, _, _, head_dim = layout
    generator = torch.Generator().manual_seed(tokens)
    fused = torch.randn(layout, generator=generator)
    positions = torch.randint(0, 2048, (tokens, 1), generator=generator)
    angles = positions * 10000 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.cat([angles, angles], dim=-1)
    return (
        fused.to(device, dtype),
        angles.cos().to(device, angles_dtype),
        angles.sin().to(device, angles_dtype),
    )


def _parts(fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return fused[:, :, :-2].flatten(1, 2), fused[:, :, -2], fused[:, :, -1]


def _expected(fused: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as Transformers rotates them, in float64."""
    query, key, value = _parts(fused.double())
    query, key = apply_rotary_pos_emb(query, key, cosine.double(), sine.double())
    return query, key, value


def _close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize(
    ("dtype", "angles_dtype"),
    [*((dtype, torch.float32) for dtype in TOLERANCES), (torch.bfloat16,) * 2],
    ids=str,
)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_in_place_it_is_transformers_rotation(
    layout: tuple[int, int, int, int], dtype: torch.dtype, angles_dtype: torch.dtype, device: torch.device
) -> None:
    fused, cosine, sine = _inputs(layout, dtype, device, angles_dtype)
    expected = _expected(fused, cosine, sine)
    value = fused[:, :, -1].clone()
    heads = fused[:, :, :-1]
    assert rotate_(heads, cosine, sine) is heads
    for part, right in zip(_parts(fused)[:2], expected[:2], strict=True):
        _close(part, right, dtype)
    assert torch.equal(fused[:, :, -1], value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_join_is_its_gradient(
    layout: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    fused, cosine, sine = _inputs(layout, dtype, device)
    leaf = fused.double().requires_grad_()
    grads = [torch.randn_like(part).to(dtype) for part in _parts(fused)]
    (expected,) = torch.autograd.grad(_expected(leaf, cosine, sine), leaf, [grad.double() for grad in grads])
    joined = rotate_join(*grads, cosine, sine, torch.full_like(fused, torch.nan))
    _close(joined, expected, dtype)
    assert torch.equal(joined[:, :, -1], grads[2])


@pytest.mark.parametrize("layout", LAYOUTS[:5:2], ids=str)
def test_strided_where_the_projections_lie_side_by_side(
    layout: tuple[int, int, int, int], device: torch.device
) -> None:
    fused, cosine, sine = _inputs(layout, torch.bfloat16, device)
    head_dim = layout[-1]
    wide = F.pad(fused.flatten(1), (8, 40), value=7.0)
    slices = wide[:, 8:-40].unflatten(1, fused.shape[1:])
    rotate_(slices[:, :, :-1], cosine, sine)
    rotated = fused.clone()
    rotate_(rotated[:, :, :-1], cosine, sine)
    assert torch.equal(slices, rotated)
    # The parts as attention may give them: heads before tokens, one buffer for all, wider cosines.
    grads = [part.transpose(0, 1).contiguous().transpose(0, 1) for part in _parts(rotated)]
    cosine, sine = F.pad(cosine, (0, 3))[:, :head_dim], F.pad(sine, (0, 5))[:, :head_dim]
    rotate_join(*grads, cosine, sine, slices)
    torch.testing.assert_close(slices, fused, rtol=2**-7, atol=2**-6)
    assert (wide[:, :8] == 7.0).all()
    assert (wide[:, -40:] == 7.0).all()


# T, Q, G, D: Falcon3's and Falcon-H1's heads, and few of an odd number.
APART = [(9, 12, 4, 256), (3, 12, 2, 128), (5, 3, 3, 6)]


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", APART, ids=str)
def test_queries_keys_and_values_may_lie_apart(
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
    form: Literal["torch", "triton"],
    device: torch.device,
) -> None:
    tokens, queries, keys, head_dim = sizes
    heads, cosine, sine = _inputs((tokens, 1, queries + 2 * keys, head_dim), dtype, device)
    split = [queries, keys, keys]
    query, key, value = heads.double()[:, 0].split(split, dim=1)
    expected = [*apply_rotary_pos_emb(query, key, cosine.double(), sine.double()), value]
    with ops.using(form):
        ops.rotate_(heads[:, :, :-keys], cosine, sine)
        rotated = heads[:, 0].split(split, dim=1)
        for found, right in zip(rotated, expected, strict=True):
            _close(found, right, dtype)
        wide = torch.full((tokens, heads[0].numel() + 24), torch.nan, dtype=dtype, device=device)
        out = wide[:, :-24].unflatten(1, heads.shape[1:])
        again = [rotated[0].contiguous(), rotated[1].transpose(0, 1).contiguous().transpose(0, 1), rotated[2]]
        ops.rotate_join(again[0], again[1], again[2], cosine, sine, out, 0.3)
    wanted = [0.3 * each.double() for each in rotated]
    wanted[:2] = apply_rotary_pos_emb(*wanted[:2], cosine.double(), -sine.double())
    for found, right in zip(out[:, 0].split(split, dim=1), wanted, strict=True):
        _close(found, right, dtype)
    assert wide[:, -24:].isnan().all()


def test_no_tokens_and_what_does_not_fit(device: torch.device) -> None:
    fused, cosine, sine = _inputs((4, 2, 4, 16), torch.float32, device)
    query, key, value = (part.contiguous() for part in _parts(fused))
    none = rotate_join(query[:0], key[:0], value[:0], cosine[:0], sine[:0], fused[:0])
    assert none.shape == (0, 2, 4, 16)
    with pytest.raises(ValueError, match="expected"):
        rotate_join(query, query, value, cosine, sine, fused)
    with pytest.raises(ValueError, match="contiguous last dimension"):
        rotate_join(query, key, value, cosine, sine.T.contiguous().T, fused)
