"""FP8 products with GELU and the next operand's quantization in their epilogue, by quack-kernels.

LoRA's part has to be in the sum before GELU is taken, so it rides as more columns of both operands, in front
of theirs. They have the operands' scales: with a row's scale s and the weight's w, the columns of LoRA's
``left @ right`` are ``left / (s k)`` and ``right k / w``. Each is split in two FP8 values, high and low, as
exact as bfloat16 together, and of the four products of these the three that matter are made. k makes the
largest values of both about alike for every rank, so that neither is above FP8's largest nor, unless LoRA's
part is next to nothing, below its smallest. Where a row's part is larger it gets a larger scale, see `least`.
k comes of LoRA's matrices alone: what a row becomes may not depend on others, which are other documents'.

The plain forms are the library's references, for tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from falcon_qlora.kernels import fp8, libraries, ops
from falcon_qlora.kernels.fp8_rows import LARGEST, Rows
from falcon_qlora.kernels.gelu_products import Activation
from falcon_qlora.kernels.low_rank import LowRank

_HOPPER = 9  # its compute capability
_NOTHING = 1e-20  # beside LoRA's largest values; its square is a float32 that is not 0

# Accumulating in the matrix units alone, as torch._scaled_mm does with use_fast_accum. The library's default
# for FP8 adds up in more registers than there are; the last two are what it gives kernels that need fewer.
_FAST = (("fp8_slow_accum", False), ("num_regs_load", 40), ("num_regs_mma", 232))


class Tile(NamedTuple):
    """A tile of the output that two groups of warps compute in turn: its rows and columns."""

    rows: int
    columns: int


FORWARD, BACKWARD = Tile(128, 192), Tile(128, 128)  # the fastest on an H200


@dataclass(frozen=True, eq=False)
class Fp8GeluProducts:
    """The products of both directions.

    Attributes:
        forward: from x ``[T, C]``, a weight in FP8 ``[F, C]`` and its scale, float32 ``[]``, and the scales
            of the rows that GELU's output is to have, float32 ``[T]``: ``x @ weightᵀ`` in the dtype of
            activations, and its GELU in FP8, each ``[T, F]``.
        backward: from the gradient of GELU's output likewise, the scales that the two results are to have,
            and GELU's input ``[T, F]``: the gradient of this input, and GELU's output, both in FP8.
    """

    forward: Callable[[Rows, Tensor, Tensor, Tensor, torch.dtype], tuple[Tensor, Rows]]
    backward: Callable[[Rows, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Rows, Rows]]


def columns_of(rank: int) -> int:
    """Columns that `put` takes for LoRA of this rank."""
    return -(-3 * rank // fp8.UNIT) * fp8.UNIT


@ops.or_triton("fp8_bounds")
def balance(into: Tensor, right: Tensor, scale: Tensor) -> Tensor:
    """k for every rank, float32 ``[R]``.

    Args:
        into: ``[R, C]``, of which the rows' values in the ranks are products with the rows.
        right: ``[R, F]``, of `LowRank`.
        scale: of the weight, float32 ``[]``.
    """
    largest = _largest(right, 1) / scale + _NOTHING
    # About the largest of rows that, divided by their scales, have FP8's largest among their values; less
    # than without outliers, more than with them.
    of_rows = LARGEST / 4 * torch.linalg.vector_norm(into, dim=1, dtype=torch.float32) + _NOTHING
    return torch.minimum((of_rows / largest).sqrt(), LARGEST / largest)


@ops.or_triton("fp8_bounds")
def least(balance: Tensor, low: LowRank) -> Tensor:
    """What the largest absolute value of each row has to be at least for `put`, float32 ``[T]``."""
    return _largest(low.left / balance, 1)


def put(low: LowRank, scales: Tensor, scale: Tensor, balance: Tensor, left: Tensor, right: Tensor) -> None:
    """Write LoRA's part as columns of the operands.

    Args:
        low: LoRA's part, ``[T, R]`` and ``[R, F]``.
        scales: of the rows, float32 ``[T]``.
        scale: of the weight, float32 ``[]``.
        balance: see the function.
        left: the rows' columns in FP8 ``[T, columns_of(R)]``, to write into.
        right: the weight's ``[F, columns_of(R)]``, likewise.
    """
    fp8.split_columns(low.left, scales, balance, left, of_weight=False)
    fp8.split_columns(low.right.T, scale.expand(len(right)), balance, right, of_weight=True)


def _largest(x: Tensor, dim: int) -> Tensor:
    """The largest absolute values along `dim`, float32."""
    return torch.linalg.vector_norm(x, math.inf, dim=dim, dtype=torch.float32)


def _forward(
    x: Rows, weight: Tensor, scale: Tensor, scales: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Rows]:
    before = x.values.float() @ weight.float().T * (x.scales * scale)[:, None]
    return before.to(dtype), fp8.to_rows(F.gelu(before), scales)


def _backward(
    grad: Rows, weight: Tensor, scale: Tensor, scales: Tensor, of_after_scales: Tensor, before: Tensor
) -> tuple[Rows, Rows]:
    of_after = grad.values.float() @ weight.float().T * (grad.scales * scale)[:, None]
    of_before = torch.ops.aten.gelu_backward(of_after, before.float())
    return fp8.to_rows(of_before, scales), fp8.to_rows(F.gelu(before.float()), of_after_scales)


PLAIN = Fp8GeluProducts(_forward, _backward)


def supports(device: torch.device) -> bool:
    """Whether the library's products can run on `device`, a GPU."""
    return torch.cuda.get_device_capability(device)[0] == _HOPPER


@lru_cache
def fp8_gelu_products(device: torch.device) -> libraries.Loaded[Fp8GeluProducts]:
    """The library's products, once both are right on small matrices on `device`, a Hopper GPU."""
    if not libraries.usable(libraries.QUACK) or not supports(device):
        return libraries.Loaded()
    return libraries.load(libraries.QUACK, partial(_tried, device))


def _tried(device: torch.device) -> Fp8GeluProducts:
    products = _define()
    generator = torch.Generator().manual_seed(0)
    # Beside other columns, as a block has them: the product before reads rows of the same memory.
    x, weight, before = (
        torch.randn(shape, generator=generator).to(device) for shape in ((130, 208), (272, 208), (130, 272))
    )
    left, right = (
        torch.randn(size, 64, generator=generator).to(device, torch.bfloat16) for size in (130, 272)
    )
    low = LowRank(left, right.T)
    before = before.to(torch.bfloat16)
    rows, _ = fp8.quantize_rows(x.to(torch.bfloat16))
    scale = weight.abs().amax() / LARGEST
    values = (weight / scale).to(fp8.DTYPE)
    scales = x.norm(dim=1) * weight.norm(dim=1).amax() / LARGEST
    forward = [each.forward(rows, values, scale, scales, before.dtype) for each in (products, PLAIN)]
    backward = [each.backward(rows, values, scale, scales, scales, before) for each in (products, PLAIN)]
    part = Rows(rows.values[:, 48:], rows.scales)
    of_part = fp8.product(part, Rows(values[:, 48:].contiguous(), scale.repeat(272)), before.dtype)
    exact = part.float() @ (values[:, 48:].float() * scale).T
    pairs = [
        (of_part, exact),
        (_in_columns(low, scale), low.left.float() @ low.right.float()),
        *zip(*forward, strict=True),
        *zip(*backward, strict=True),
    ]
    for found, expected in pairs:
        wide, reference = found.float(), expected.float()
        distance = float((wide - reference).norm() / reference.norm())
        if not distance < 0.02:  # NaN too
            raise ArithmeticError(f"an FP8 product with GELU is wrong by {distance:.2%}")
    return products


def _in_columns(low: LowRank, scale: Tensor) -> Tensor:
    """LoRA's part from the columns that `put` writes, beside rows of zeros."""
    (tokens, rank), features = low.left.shape, low.right.shape[1]
    into = torch.eye(rank, device=low.left.device)
    by = balance(into, low.right, scale)
    left, right = (
        torch.empty(size, columns_of(rank), dtype=fp8.DTYPE, device=scale.device)
        for size in (tokens, features)
    )
    scales = least(by, low) / LARGEST
    put(low, scales, scale, by, left, right)
    return left.float() @ right.float().T * (scales * scale)[:, None]


def _define() -> Fp8GeluProducts:
    from quack import activation
    from quack.epilogue.frontend import gemm_epilogue
    from quack.epilogue.ops import ColVecLoad

    gelu = Activation(activation.gelu_erf)
    gelu_and_gradient = Activation(activation.dgelu_erf)

    def of_rows(*names: str) -> dict[str, Any]:
        return {name: ColVecLoad(name) for name in names}

    @gemm_epilogue(outputs=("after8",), ops=of_rows("v", "inverse"))
    def forward(acc, v, inverse):  # type: ignore[no-untyped-def]
        before = acc * v
        return {"D": before, "after8": gelu(before) * inverse}

    @gemm_epilogue(outputs=("after8",), ops=of_rows("v", "inverse", "of_after"))
    def backward(acc, c, v, inverse, of_after):  # type: ignore[no-untyped-def]
        of_before, after = gelu_and_gradient(c, acc * v)
        return {"D": of_before * inverse, "after8": after * of_after}

    def run(
        epilogue: Any, tile: Tile, rows: Rows, weight: Tensor, scale: Tensor, scales: Tensor, *more: Any
    ) -> None:
        """Launch a product; `more`: its D, its C, and what else its epilogue takes."""
        d, c, others = more
        vectors = {"v": rows.scales * scale, "inverse": scales.reciprocal()}
        epilogue.gemm(
            rows.values, weight.t(), d, c, epi_args=vectors | others, b_kn=True,
            tile_M=tile.rows, tile_N=tile.columns, cluster_M=2, cluster_N=1, pingpong=True,
            post_init_attrs=_FAST,
        )  # fmt: skip

    def run_forward(
        x: Rows, weight: Tensor, scale: Tensor, scales: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Rows]:
        before = scales.new_empty(len(x.values), len(weight), dtype=dtype)
        values = torch.empty_like(before, dtype=fp8.DTYPE)
        if len(before):
            run(forward, FORWARD, x, weight, scale, scales, before, None, {"after8": values})
        return before, Rows(values, scales)

    def run_backward(
        grad: Rows, weight: Tensor, scale: Tensor, scales: Tensor, of_after_scales: Tensor, before: Tensor
    ) -> tuple[Rows, Rows]:
        of_before, after = (torch.empty_like(before, dtype=fp8.DTYPE) for _ in range(2))
        if len(before):
            others = {"after8": after, "of_after": of_after_scales.reciprocal()}
            run(backward, BACKWARD, grad, weight, scale, scales, of_before, before, others)
        return Rows(of_before, scales), Rows(after, of_after_scales)

    return Fp8GeluProducts(run_forward, run_backward)
