"""Dropout by a hash: what it leaves out looks drawn, and both forms leave out the same."""

import pytest
import torch
from torch.testing import assert_close

from falcon_qlora.kernels import dropout, ops
from falcon_qlora.kernels.low_rank import Dropout

SEEDS = [(2, 2), (2**31 - 1, 17), (123_456_789, 2**31 - 1)]


def kept(rows: int, columns: int, wanted: Dropout) -> torch.Tensor:
    return dropout.dropped(torch.ones(rows, columns), wanted) != 0


def murmur(h: int) -> int:
    """The finalizer as published (MurmurHash3's fmix32), in whole numbers."""
    h ^= h >> 16
    h = h * 0x85EBCA6B % 2**32
    h ^= h >> 13
    h = h * 0xC2B2AE35 % 2**32
    return h ^ (h >> 16)


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize(("low", "high"), SEEDS)
def test_what_is_left_out_is_what_the_hash_says(form, low, high, device):
    rows, columns, p = 7, 13, 0.3
    x = torch.randn(rows, columns + 5, device=device)[:, 2 : columns + 2]
    expected = x.clone()
    for row in range(rows):
        for column in range(columns):
            place = row * columns + column
            left_out = murmur(murmur(place ^ low) ^ high) < round(p * 2**32)
            expected[row, column] = 0 if left_out else x[row, column] / (1 - p)
    with ops.using(form):
        assert_close(dropout.dropped(x, Dropout(p, low, high)), expected, rtol=1e-6, atol=0)
    assert (expected == 0).any()


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_it_looks_drawn(p):
    rows, columns = 400, 500
    masks = torch.stack([kept(rows, columns, Dropout(p, low, high)) for low, high in SEEDS]).double()
    deviation = (p * (1 - p)) ** 0.5
    # Five standard deviations of what would be drawn.
    assert (masks.mean((1, 2)) - (1 - p)).abs().max() < 5 * deviation / (rows * columns) ** 0.5
    assert (masks.mean(1) - (1 - p)).abs().max() < 5 * deviation / rows**0.5
    assert (masks.mean(2) - (1 - p)).abs().max() < 5 * deviation / columns**0.5
    centred = (masks - (1 - p)) / deviation
    few = 5 / (rows * columns) ** 0.5
    assert (centred[0] * centred[1]).mean().abs() < few  # one seed against another
    assert (centred[:, 1:] * centred[:, :-1]).mean((1, 2)).abs().max() < few  # a row against the next
    assert (centred[:, :, 1:] * centred[:, :, :-1]).mean((1, 2)).abs().max() < few  # a column


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize(
    ("tokens", "features", "rank"), [(1, 1, 1), (70, 150, 4), (3, 300, 17), (9, 70, 200)]
)
def test_the_sum_is_kept_where_the_values_were(form, tokens, features, rank, dtype, device):
    wanted = Dropout(0.4, *SEEDS[2])
    x = torch.randn(tokens, features + 3, device=device).to(dtype)[:, 1 : features + 1]
    left = torch.randn(tokens, rank + 2, device=device).to(dtype)[:, 2:]
    right = torch.randn(features, rank, device=device).to(dtype).T
    mask = kept(tokens, features, wanted).to(device)
    expected = (x.float() + mask * (left.float() @ right.float()) / 0.6).to(dtype)
    plain = (x.float() + left.float() @ right.float()).to(dtype)
    with ops.using(form):
        found, without = x.clone(), x.clone()
        assert dropout.add_dropped(found, left, right, wanted) is found
        dropout.add_dropped(without, left, right, None)
    tolerance = 1e-5 * max(1, rank / 16) if dtype == torch.float32 else 1e-2  # longer sums, other orders
    assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert_close(without, plain, rtol=tolerance, atol=tolerance)


def test_seeds_come_from_torchs_generator():
    torch.manual_seed(5)
    first, second = Dropout.draw(0.1), Dropout.draw(0.1)
    torch.manual_seed(5)
    assert Dropout.draw(0.1) == first != second
