"""The FP8 operations' kernels against their references, over shapes that fit no tile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from falcon_qlora.models.quantize import bnb, empty_quantized_linear, fill_quantized_weight

pytest.importorskip("triton", reason="Triton is not installed")

from falcon_qlora.kernels import fp8, fp8_gelu, fp8_low_rank, fp8_quantize, fp8_swiglu, ops
from falcon_qlora.kernels.fp8_gelu_products import balance, least
from falcon_qlora.kernels.fp8_rows import DTYPE, LARGEST, Rows
from falcon_qlora.kernels.low_rank import LowRank

DTYPES = [torch.bfloat16, torch.float32]


def both(operation: Any, *arguments: Any) -> tuple[Any, Any]:
    """The kernel's results and the reference's, on copies of the same arguments."""
    results = []
    for form in ("triton", "torch"):
        copies = [a.clone() if isinstance(a, Tensor) and a.is_contiguous() else a for a in arguments]
        with ops.using(form):
            results.append(operation(*copies))
    return results[0], results[1]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    # Rows of very different sizes.
    values = torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator).exp2()
    return values.to("cuda" if torch.cuda.is_available() else "cpu", dtype)


def low_rank(tokens: int, features: int, rank: int, dtype: torch.dtype, seed: int) -> LowRank | None:
    """Both factors as they lie in training: columns of a wider matrix, and a transposed matrix."""
    if not rank:
        return None
    return LowRank(
        random(tokens, rank + 5, seed=seed, dtype=dtype)[:, 2:-3],
        (random(features, rank, seed=seed + 1, dtype=dtype) * (4 * rank**-0.5)).T,  # rounding is of one size
    )


def assert_same_rows(ours: Rows, theirs: Rows) -> None:
    """Equal but for values that lie between two of FP8's, where one rounding before decides."""
    torch.testing.assert_close(ours.scales, theirs.scales, rtol=1e-6, atol=0)
    assert ours.values.dtype == theirs.values.dtype == DTYPE
    difference = (ours.values.float() - theirs.values.float()).abs()
    assert (difference <= theirs.values.float().abs() * 2**-3 + 2**-9).all()
    assert (difference > 0).float().mean() < 0.02


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (9, 272)], ids=str)
def test_rows_are_quantized_to_the_nearest(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = random(*shape, dtype=dtype)
    x[0] = 0
    (ours, lengths), (theirs, reference_lengths) = both(fp8.quantize_rows, x)
    assert_same_rows(ours, theirs)
    torch.testing.assert_close(lengths, reference_lengths)
    # Half a step of e4m3 is 2^-4 of a value, and 2^-10 of the scale below its smallest normal one.
    error = (ours.float() - x.float()).abs()
    assert (error <= 2**-4 * x.float().abs() + 1.01 * 2**-10 * ours.scales[:, None]).all()
    assert ours.values.float().abs().amax(1)[1:].eq(LARGEST).all()
    apart = torch.nn.functional.pad(x, (16, 3), value=torch.nan)[:, 16:-3]
    with ops.using("triton"):
        again = fp8.quantize_rows(apart)[0]
        of_transposed = fp8.quantize_rows(x.T.contiguous().T)[0]
    for one in (again, of_transposed):
        assert torch.equal(one.values.float(), ours.values.float())


@pytest.mark.parametrize(("rows", "rank"), [(3, 5), (70, 8), (40, 17), (33, 64)])
@pytest.mark.parametrize("of_weight", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_value_is_split_in_two(rows: int, rank: int, of_weight: bool, dtype: torch.dtype) -> None:
    x = 3 * random(rows, rank, dtype=dtype)
    x[0, 0] = 0
    scales, balance = (random(size, 1)[:, 0].abs() + 0.5 for size in (rows, rank))
    size = -(-3 * rank // 16) * 16
    found = {}
    for form, matrix in (("torch", x), ("triton", x), ("transposed", x.T.contiguous().T)):
        wide = torch.ones(rows, size + 32, dtype=torch.uint8, device=x.device).view(DTYPE)
        out = wide[:, 16:-16]
        with ops.using("torch" if form == "torch" else "triton"):
            fp8.split_columns(matrix, scales, balance, out, of_weight)
        assert all(edge.view(torch.uint8).eq(1).all() for edge in (wide[:, :16], wide[:, -16:]))
        found[form] = out.float()
    assert torch.equal(found["transposed"], found["triton"])
    expected = x.double() / scales[:, None] * (balance if of_weight else 1 / balance)
    assert expected.abs().max() < LARGEST
    for columns in found.values():
        high, low, again = (columns[:, part * rank : (part + 1) * rank] for part in range(3))
        if of_weight:
            low, again = again, low
        assert torch.equal(high, again)
        assert not columns[:, 3 * rank :].any()
        error = (high.double() + low.double() - expected).abs()
        assert (error <= 2**-8 * expected.abs() + 2**-10).all()


def test_rows_longer_than_registers_are_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    x = random(5, 272, dtype=torch.bfloat16)
    x[0], x[1, 200], x[2, 3] = 0, 30, -30
    ours, lengths = fp8_quantize.quantize_rows(x)
    monkeypatch.setattr(fp8_quantize, "_LONGEST", 64)
    monkeypatch.setattr(fp8_quantize, "_PIECE", 64)
    again, lengths_again = fp8_quantize.quantize_rows(x)
    assert torch.equal(again.values.float(), ours.values.float())
    assert torch.equal(again.scales, ours.scales)
    torch.testing.assert_close(lengths_again, lengths)


@pytest.mark.parametrize("whole", [True, False])
def test_rows_beside_other_columns_with_a_least_scale(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not whole:
        monkeypatch.setattr(fp8_quantize, "_LONGEST", 64)
        monkeypatch.setattr(fp8_quantize, "_PIECE", 64)
    x = random(5, 272, dtype=torch.bfloat16)
    x[0] = 0
    least = x.float().abs().amax(1) * torch.tensor([1.0, 0.5, 1.0, 2.0, 40.0], device=x.device)
    wide = [torch.ones(5, 288, dtype=torch.uint8, device=x.device).view(DTYPE) for _ in range(2)]
    for form, values in zip(("triton", "torch"), wide, strict=True):
        with ops.using(form):
            rows, lengths = fp8.quantize_rows(x, values[:, 16:], least)
        assert rows.values.data_ptr() == values[:, 16:].data_ptr()
        assert values[:, :16].view(torch.uint8).eq(1).all()
        largest = torch.maximum(least, x.float().abs().amax(1))
        torch.testing.assert_close(rows.scales[1:], largest[1:] / LARGEST)
        assert rows.scales[0] == 1
        torch.testing.assert_close(lengths, x.float().norm(dim=1))
        again = Rows((x.float() / rows.scales[:, None]).to(DTYPE), rows.scales)
        assert_same_rows(rows, again)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("mode", ["4bit", "8bit", "16bit"])
@pytest.mark.parametrize("shape", [(64, 64), (80, 192), (208, 64)], ids=str)
def test_weights_of_every_storage(
    shape: tuple[int, int], mode: Any, transpose: bool, device: torch.device
) -> None:
    layer: Any = torch.nn.Linear(*shape[::-1], bias=False, device=device)
    plain = random(*shape, dtype=torch.bfloat16) * 0.02
    if mode == "16bit":
        layer.weight = torch.nn.Parameter(plain, requires_grad=False)
    else:
        layer = empty_quantized_linear(
            layer, mode, compute_dtype=torch.bfloat16, double_quantization=True, llm_int8_threshold=6.0
        )
        fill_quantized_weight(layer, plain)
        assert isinstance(layer, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)
    scale = torch.tensor(3e-4, device=device)
    out = torch.empty(shape[::-1] if transpose else shape, dtype=DTYPE, device=device)
    ours, theirs = both(fp8.quantize_weight, layer, scale, out, transpose)
    # Beside another weight, whose values stay.
    wide = torch.zeros(len(out), 16 + out.shape[1], dtype=DTYPE, device=device)
    with ops.using("triton"):
        fp8.quantize_weight(layer, scale, wide[:, 16:], transpose)
    assert torch.equal(wide[:, 16:].float(), ours.float())
    assert not wide[:, :16].float().any()
    ones = torch.ones(out.shape[0], device=device)
    assert_same_rows(Rows(ours, ones), Rows(theirs, ones))
    weight = ops.dequantize(layer).float()
    error = (ours.float() * scale - (weight.T if transpose else weight)).abs()
    assert (error <= 1.1 * 2**-4 * weight.abs().max()).all()
    assert error.mean() < 0.03 * weight.abs().mean()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("addends", "rank"), [(0, 1), (0, 40), (1, 5), (1, 200), (2, 0), (2, 16)], ids=str)
def test_sums_with_the_low_rank_part(
    addends: int, rank: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8_quantize, "_SUM_PROGRAMS", 0)  # no program's columns are split
    x = random(70, 272, dtype=dtype)
    others = tuple(random(70, 272, seed=n + 1, dtype=dtype) for n in range(addends))
    low = low_rank(70, 272, rank, dtype, 7)
    ours, theirs = both(fp8.add, x, low, others)
    tolerance = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    expected = x.float() + sum(other.float() for other in others)
    if low is not None:
        expected += low.left.float() @ low.right.float()
    torch.testing.assert_close(theirs.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("shape", "rank", "next_rank"),
    [((1, 16), 0, 0), ((3, 48), 5, 0), ((9, 272), 0, 7), ((70, 144), 150, 3), ((150, 208), 64, 5)],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_and_its_gradient(
    dtype: torch.dtype, shape: tuple[int, int], rank: int, next_rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8_gelu, "_COLUMN_PROGRAMS", 0)  # no sum is split
    x, grad = (2 * random(*shape, seed=seed, dtype=dtype) for seed in (1, 2))
    low, low_grad = low_rank(*shape, rank, dtype, 3), low_rank(*shape, next_rank, dtype, 5)
    constant = x.float().abs().max().expand(len(x))
    lengths = grad.float().norm(dim=1)
    before, of_after = (
        matrix.float() + (0 if part is None else part.left.float() @ part.right.float())
        for matrix, part in ((x, low), (grad, low_grad))
    )
    y, dx = torch.nn.functional.gelu(before), torch.ops.aten.gelu_backward(of_after, before)
    pairs = [(y, both(fp8.gelu, x, low, constant))]
    (ours, *of), (theirs, *reference) = both(fp8.gelu_backward, grad, low_grad, lengths, x, low, constant)
    pairs.append((dx, (ours, theirs)))
    for part, other, *found in zip((low_grad, low), (y, dx), of, reference, strict=True):
        for one in found:
            assert (one is None) == (part is None)
            if part is not None:
                exact = part.left.float().T @ other
                # Where it has no registers of its own, the sum is made of values in FP8.
                in_registers = min(rank, next_rank) > 0 and fp8_gelu._fits(x, rank, next_rank)
                assert (one - exact).norm() < (0.005 if in_registers else 0.04) * exact.norm()
    tolerance = 2**-7 if dtype == torch.bfloat16 else 2e-5 * max(1, rank / 16)  # longer sums, other orders
    for exact, (rows, reference) in pairs:
        assert_same_rows(rows, reference)
        # The bounds hold: nothing was cut off.
        assert rows.values.float().abs().max() < LARGEST
        error = (rows.float() - exact).abs()
        limit = (2**-4 + tolerance) * exact.abs() + 2**-9 * rows.scales[:, None] + tolerance
        assert (error <= limit).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "features", "rank"), [(1, 16, 1), (70, 272, 5), (33, 300, 64), (70, 144, 150)]
)
def test_bounds_beside_the_low_rank_part(tokens: int, features: int, rank: int, dtype: torch.dtype) -> None:
    low = low_rank(tokens, features, rank, dtype, 3)
    assert low is not None
    bound = random(tokens, 1)[:, 0].abs()
    bound[0] = 0
    into = random(rank, 48, seed=9, dtype=dtype)
    scale = torch.tensor(3e-4, device=bound.device)
    for one, arguments in (
        (fp8.bound_scales, (bound, low, 1.13)),
        (fp8.bound_scales, (bound, None, 1.13)),
        (fp8.bound_scales, (bound[-1:].expand(tokens), low)),
        (balance, (into, low.right, scale)),
        (balance, (into, low.right, 1e4 * scale)),  # where the rows' size decides
        (balance, (into.T.contiguous().T, low.right.contiguous(), scale)),
        (balance, (torch.zeros_like(into), torch.zeros_like(low.right), scale)),
        (least, (random(rank, 1, seed=4)[:, 0].abs() + 0.1, low)),
    ):
        ours, theirs = both(one, *arguments)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("multipliers", [(), (0.3, 1.7)], ids=["plain", "with multipliers"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (4, 304)], ids=str)
def test_swiglu_gives_the_bits_of_separate_passes(
    shape: tuple[int, int],
    dtype: torch.dtype,
    multipliers: tuple[float, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokens, features = shape
    gate_up = 3 * random(tokens, 2 * features, dtype=dtype)
    grad = random(tokens, features, dtype=dtype)
    gate_up[0], grad[0] = 0, 0
    monkeypatch.setattr(fp8_swiglu, "_BLOCK", 128)
    with ops.using("triton"):
        y = ops.swiglu(gate_up, None, *multipliers)
        dx, _ = ops.swiglu_backward(grad.clone(), gate_up, None, *multipliers)
        expected, of_gradient = (fp8.quantize_rows(each)[0] for each in (y, dx))
        wide = torch.full((tokens, features + 8), torch.nan, dtype=dtype, device=y.device)
        rows = fp8.swiglu(gate_up, wide[:, 8:], *multipliers)
        assert torch.equal(wide[:, 8:], y)
        own = torch.nn.functional.pad(gate_up, (8, 8), value=torch.nan)[:, 8:-8]
        of_own, again = fp8.swiglu_backward(grad.clone(), own, own, *multipliers)  # the gradient in its place
        assert torch.equal(again, y)
        assert torch.equal(own, dx)
    for one, other in ((rows, expected), (of_own, of_gradient)):
        assert torch.equal(one.values.view(torch.uint8), other.values.view(torch.uint8))
        assert torch.equal(one.scales, other.scales)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 16, 100])
@pytest.mark.parametrize("shape", [(1, 16), (70, 272), (200, 144)], ids=str)
def test_products_of_the_low_rank_with_fp8(
    shape: tuple[int, int], rank: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8_low_rank, "_SUM_PROGRAMS", 5)
    tokens, features = shape
    wide = random(tokens, features + 16, dtype=DTYPE)
    rows = Rows(wide[:, 16:], random(tokens, 1, seed=1)[:, 0].exp())
    a, b = random(rank, features, seed=2, dtype=dtype), random(features, rank, seed=3, dtype=dtype).T
    left = random(tokens, rank + 5, seed=4, dtype=dtype)[:, 2:-3]
    for matrix in (a, b):
        exact = rows.float() @ matrix.float().T
        for found in both(fp8.into_low_rank, matrix, rows):
            assert (found.dtype, found.shape) == (dtype, (tokens, rank))
            assert (found.float() - exact).norm() < 2**-7 * exact.norm()
    rtol = 2**-8 if dtype == torch.bfloat16 else 1e-5
    ours, theirs = both(fp8.gathered, left, rows)
    assert (ours.dtype, ours.shape) == (torch.float32, (rank, features))
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol * float(theirs.abs().max()))
    again, _ = both(fp8.gathered, left, rows)
    assert torch.equal(ours, again)


def test_no_tokens(device: torch.device) -> None:
    x = torch.empty(0, 64, device=device)
    with ops.using("triton"):
        assert fp8.quantize_rows(x)[0].values.shape == (0, 64)
        bound = torch.empty(0, device=device)
        assert fp8.gelu(x, None, bound).values.shape == (0, 64)
        assert fp8.gelu_backward(x, None, bound, x, None, bound)[0].values.shape == (0, 64)
        rows = fp8.quantize_rows(x)[0]
        assert fp8.into_low_rank(torch.ones(3, 64, device=device), rows).shape == (0, 3)
        assert not fp8.gathered(x.new_empty(0, 3), rows).any()
        assert fp8.bound_scales(bound, LowRank(x, x.T.new_ones(64, 32))).shape == (0,)
        assert fp8.add(x, None, (x,)).shape == (0, 64)
        assert fp8.swiglu(x, x.new_empty(0, 32)).values.shape == (0, 32)
        assert fp8.swiglu_backward(x[:, :32], x, torch.empty_like(x))[0].values.shape == (0, 64)
