"""A block's products in FP8, with LoRA beside them.

Every linear is a product of its own: operands have one scale per row, which matrices quantized together
would share. Unless kept, a frozen weight is quantized for every product, in the layout that it reads, each
time into the same memory. LoRA's part is added where the product's output is read next, see `fp8_gelu`. So
what is kept of h_to_4h's output is the frozen part. With `Fp8.gelu` the products on either side of GELU have
LoRA's part in them, and GELU in their epilogue: what is kept is GELU's input. GELU's output and its input's
gradient are in FP8 alone, and LoRA's products on either side read them so; its others are in the dtype of the
activations.

Rows for the products on either side of GELU are quantized by Cauchy-Schwarz bounds. A norm's output before
weight and bias is no longer than the root of H, which bounds h_to_4h's output once and for all. The gradient
of GELU's output is bounded by the length of the row that it is computed from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from falcon_qlora.kernels import fp8, fp8_gelu_products, ops
from falcon_qlora.kernels.block import Block, normalize
from falcon_qlora.kernels.fp8_gelu_products import PLAIN, Fp8GeluProducts
from falcon_qlora.kernels.fp8_rows import LARGEST, Rows, largest_row
from falcon_qlora.kernels.frozen_linear import Adapter, Projection, mm_float32
from falcon_qlora.kernels.low_rank import LowRank

# Headroom of scales: quantized factors may round up, and an adapter may be merged into the weight.
MARGIN = 2.0


@dataclass(frozen=True, eq=False)
class Weight:
    """A frozen weight's one scale, in the forms that products take; and the weight in FP8 if it is kept.

    Attributes:
        scale: float32 ``[]``.
        of_rows: float32 ``[out]``, the same for every row.
        of_columns: float32 ``[in]``, the same for every column.
        kept: the weight in FP8, ``[out, in]`` under False and transposed under True, with room for LoRA in
            front of every row where a product has it; empty if it is quantized for every product.
    """

    scale: Tensor
    of_rows: Tensor
    of_columns: Tensor
    kept: dict[bool, Tensor] = field(default_factory=dict)

    @classmethod
    def of_scale(cls, scale: Tensor, sizes: Sequence[int]) -> Weight:
        """Of ``[out, in]`` with a scale, float32 ``[]``."""
        of_rows, of_columns = (scale.expand(size).contiguous() for size in sizes)
        return cls(scale, of_rows, of_columns)


@dataclass(frozen=True, eq=False)
class Fp8:
    """The scales and bounds of a block's frozen weights; called, it makes the block's products.

    Attributes:
        weights: in the order of ``Block.projections``.
        before_gelu: float32 ``[]``, an upper bound of h_to_4h's outputs without LoRA.
        after_gelu: float32 ``[]``, the length of the longest column of 4h_to_h's weight, with headroom.
        gelu: the products with GELU in them, or None.
    """

    weights: tuple[Weight, Weight, Weight, Weight]
    before_gelu: Tensor
    after_gelu: Tensor
    gelu: Fp8GeluProducts | None = None

    @classmethod
    def measure(cls, block: Block, gelu: Fp8GeluProducts | None = None) -> Fp8:
        """Measure the block's weights, dequantizing one at a time."""
        weights = []
        with torch.no_grad():
            for projection in block.projections:
                plain = ops.dequantize(projection.layer)
                scale = MARGIN * plain.abs().amax().float().clamp(min=1e-30) / LARGEST
                weights.append(Weight.of_scale(scale, _sizes(projection, transpose=False)))
                if projection is block.dense_h_to_4h:
                    before_gelu = _largest_output(block, plain)
                elif projection is block.dense_4h_to_h:
                    after_gelu = MARGIN * largest_row(plain.T)
                del plain
        return cls((weights[0], weights[1], weights[2], weights[3]), before_gelu, after_gelu, gelu)

    def keep(self, block: Block) -> None:
        """Quantize the weights once and keep them in both layouts, one byte per weight each."""
        for index, (projection, weight) in enumerate(zip(block.projections, self.weights, strict=True)):
            for transpose in (False, True):
                rows, width = _sizes(projection, transpose)
                columns = self.columns(block, index, transpose)
                values = torch.empty(rows, columns + width, dtype=fp8.DTYPE, device=weight.scale.device)
                fp8.quantize_weight(projection.layer, weight.scale, values[:, columns:], transpose)
                weight.kept[transpose] = values

    def kept_bytes(self, block: Block) -> int:
        """Bytes that `keep` takes."""
        found = 0
        for index, projection in enumerate(block.projections):
            for transpose in (False, True):
                rows, width = _sizes(projection, transpose)
                found += rows * (width + self.columns(block, index, transpose))
        return found

    def columns(self, block: Block, linear: int, transpose: bool) -> int:
        """Columns for LoRA in front of a weight: of those whose output goes into GELU or its gradient."""
        if self.gelu is None or (linear, transpose) not in ((1, False), (2, True)):
            return 0
        return fp8_gelu_products.columns_of(block.projections[linear].rank)

    def __call__(self, block: Block, adapters: Sequence[Adapter]) -> Fp8Products:
        return Fp8Products(block, adapters, self)


def _sizes(projection: Projection, transpose: bool) -> tuple[int, int]:
    """Shape of its weight, ``[out, in]`` or transposed."""
    sizes = projection.out_features, projection.in_features
    return sizes[::-1] if transpose else sizes


def _largest_output(block: Block, weight: Tensor) -> Tensor:
    """An upper bound of the outputs of ``[F, H]`` for any output of the feed-forward's norm."""
    norm = block.norms[-1]
    longest = largest_row(weight * norm.weight.to(weight.dtype))
    of_bias = (weight.float() @ norm.bias.float()).abs().amax()
    return MARGIN * (math.sqrt(block.dense_h_to_4h.in_features) * longest + of_bias)


def _joined(matrices: Sequence[Tensor], dim: int) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(list(matrices), dim)


class _Beside(NamedTuple):
    """Rows with room for LoRA in front of them, LoRA's part, and its `fp8_gelu_products.balance`."""

    rows: Rows
    low: LowRank | None
    balance: Tensor | None


class Fp8Products:
    """The products of one call, see `Products`."""

    outputs = inputs = 2

    def __init__(self, block: Block, adapters: Sequence[Adapter], frozen: Fp8) -> None:
        self.block, self.adapters, self.frozen = block, adapters, frozen
        self.gelu = PLAIN if frozen.gelu is not None and fp8.is_emulated() else frozen.gelu
        self.after_gelu: tuple[Rows, Tensor] | None = None  # of `enter`, for `leave` or `low_rank`
        self._matrices: dict[tuple[int, str], Tensor] = {}
        self.into = ((0, 1),) if len(block.norms) == 1 and block.rows is None else ((0,), (1,))

    def enter(self, hidden: Tensor, again: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        projected: list[Tensor] = []
        low_rank: list[Tensor] = []
        normals, _, _ = self.block.normalize(hidden)
        for linears in self.into:
            normal = normals.pop(0)
            low = self._into_low_rank(linears, [normal] * len(linears))
            low_rank += low
            if self.gelu is None or 1 not in linears:
                rows, _ = fp8.quantize_rows(normal)
                projected += [self._product(linear, rows, hidden.dtype) for linear in linears]
                continue
            added = self._added((1,), low[-1])
            beside, rows, _ = self._beside(1, normal, added)
            projected += [self._product(linear, rows, hidden.dtype) for linear in linears[:-1]]
            before_gelu, after = self._before_gelu(self.gelu, beside, hidden.dtype)
            projected.append(before_gelu)
            self.after_gelu = self._with_low_rank(after, hidden.dtype)
        fp8.add(projected[0], self._added((0,), low_rank[0]))
        return projected, low_rank

    def parts(self, projected: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return projected[0], projected[1]

    def project_h_to_4h(self, hidden: Tensor) -> Tensor:
        normals, _, _ = normalize(self.block.wanted(hidden), self.block.norms[-1:])
        if self.gelu is None:
            return self._product(1, fp8.quantize_rows(normals[0])[0], hidden.dtype)
        # The t of all linears that `enter` made together, as other products may round differently.
        linears = self.into[-1]
        added = self._added((1,), self._into_low_rank(linears, normals * len(linears))[-1])
        beside, _, _ = self._beside(1, normals[0], added)
        return self._before_gelu(self.gelu, beside, hidden.dtype)[0]

    def leave(
        self, before_gelu: Tensor, attended: Tensor, low_in: Sequence[Tensor], hidden: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows, low_of_gelu = self._gelu(before_gelu, low_in)
        attended = attended.flatten(1)
        low = torch.cat([low_of_gelu, *self._into_low_rank((3,), [attended])], dim=1)
        output = self._product(2, rows, hidden.dtype)
        of_attended = self._product(3, fp8.quantize_rows(attended)[0], hidden.dtype)
        return fp8.add(output, self._added((2, 3), low), (of_attended, hidden)), low

    def low_rank(
        self, before_gelu: Tensor, attended: Callable[[], Tensor], low_in: Sequence[Tensor]
    ) -> Tensor:
        low_of_gelu = self._gelu(before_gelu, low_in)[1]
        return torch.cat([low_of_gelu, *self._into_low_rank((3,), [attended().flatten(1)])], dim=1)

    def leave_backward(
        self,
        grad: Tensor,
        before_gelu: Tensor,
        attended: Callable[[], Tensor],
        low_in: Sequence[Tensor],
        low_out: Tensor,
    ) -> tuple[Tensor, Tensor, tuple[Rows, Tensor | None], list[Tensor | None]]:
        low_grad = self._out_of_low_rank((2, 3), [grad, grad], grad.dtype)
        added = self._added_backward((2,), low_grad[0])
        if self.gelu is None:
            rows, lengths = fp8.quantize_rows(grad)
        else:
            beside, rows, lengths = self._beside(2, grad, added)
        of_attended = self._product(3, rows, grad.dtype, transpose=True)
        fp8.add(of_attended, self._added_backward((3,), low_grad[1]))
        bounds = lengths * self.frozen.after_gelu, self.frozen.before_gelu.expand(len(grad))
        low = self._added((1,), low_in[1])
        if self.gelu is None:
            of_after = self._product(2, rows, grad.dtype, transpose=True)
            of_before, of_a, of_b = fp8.gelu_backward(of_after, added, bounds[0], before_gelu, low, bounds[1])
            del of_after
        else:
            weight = self._weight_beside(2, beside, transpose=True)
            of_before, after = self.gelu.backward(
                beside.rows,
                weight,
                self.frozen.weights[2].scale,
                fp8.bound_scales(bounds[0], added, fp8.STEEPEST),
                fp8.bound_scales(bounds[1], low),
                before_gelu,
            )
            of_a, of_b = (
                None if part is None else fp8.gathered(part.left, other)
                for part, other in ((added, after), (low, of_before))
            )
            del after
        split = low_grad[0].shape[1]
        both_b = mm_float32(grad.T, low_out)  # [H, R] of both
        of_dense = mm_float32(low_grad[1].T, attended().flatten(1))
        adapter_grads = self._scaled(2, of_a, both_b[:, :split]) + self._scaled(
            3, of_dense, both_b[:, split:]
        )
        of_fused = grad.new_empty(low_in[0].shape[0], self.block.query_key_value.out_features)
        return of_attended, of_fused, (of_before, of_b), adapter_grads

    def enter_backward(
        self,
        hidden: Tensor,
        of_fused: Tensor,
        others: tuple[Rows, Tensor | None],
        low_in: Sequence[Tensor],
        addend: Tensor | None,
        fused: Callable[[], Tensor],
    ) -> tuple[Tensor | None, list[Tensor | None], list[Tensor]]:
        of_before, of_b = others
        grads: tuple[Tensor, Rows] = of_fused, of_before
        adapter_grads: list[Tensor | None] = []
        of_normals = []
        normals, *statistics = self.block.normalize(hidden)
        for linears in self.into:
            normal = normals.pop(0)
            low_grads = self._out_of_low_rank(linears, [grads[linear] for linear in linears], of_fused.dtype)
            both = torch.cat(low_grads, dim=1)
            both_a = mm_float32(both.T, normal).split([each.shape[1] for each in low_grads])
            del normal
            for linear, of_a in zip(linears, both_a, strict=True):
                found = mm_float32(of_fused.T, low_in[0]) if linear == 0 else None if of_b is None else of_b.T
                adapter_grads += self._scaled(linear, of_a, found)
            if addend is None:
                continue
            first, *others_of_it = [
                self._product(
                    linear,
                    fp8.quantize_rows(of_fused)[0] if linear == 0 else of_before,
                    hidden.dtype,
                    transpose=True,
                )
                for linear in linears
            ]
            low = self._added_backward(linears, both)
            of_normals.append(fp8.add(first, low, tuple(others_of_it)))
            del first, others_of_it
        if addend is not None:
            addend = self.block.normalize_backward(hidden, of_normals, statistics, addend)
        return addend, adapter_grads, []

    def _gelu(self, before_gelu: Tensor, low_in: Sequence[Tensor]) -> tuple[Rows, Tensor]:
        """GELU's output, and 4h_to_h's t."""
        if self.after_gelu is not None:
            found, self.after_gelu = self.after_gelu, None
            return found
        bound = self.frozen.before_gelu.expand(len(before_gelu))
        after = fp8.gelu(before_gelu, self._added((1,), low_in[1]), bound)
        return self._with_low_rank(after, before_gelu.dtype)

    def _with_low_rank(self, after: Rows, dtype: torch.dtype) -> tuple[Rows, Tensor]:
        return after, fp8.into_low_rank(self._a(2, dtype), after)

    def _beside(self, linear: int, x: Tensor, low: LowRank | None) -> tuple[_Beside, Rows, Tensor]:
        """`x` ``[T, in]`` quantized, with room for LoRA in front of it, and without; its rows' lengths."""
        columns, balance, least = 0, None, None
        if low is not None:
            columns = fp8_gelu_products.columns_of(low.left.shape[1])
            into = self._a(1, x.dtype) if linear == 1 else self._scaled_b(2, x.dtype).T
            balance = fp8_gelu_products.balance(into, low.right, self.frozen.weights[linear].scale)
            least = fp8_gelu_products.least(balance, low)
        values = torch.empty(len(x), columns + x.shape[1], dtype=fp8.DTYPE, device=x.device)
        rows, lengths = fp8.quantize_rows(x, values[:, columns:], least)
        return _Beside(Rows(values, rows.scales), low, balance), rows, lengths

    def _weight_beside(self, linear: int, beside: _Beside, transpose: bool = False) -> Tensor:
        """The weight for `_beside`'s rows, and LoRA in front of both."""
        rows, low, balance = beside
        columns = rows.values.shape[1] - _sizes(self.block.projections[linear], transpose)[1]
        weight = self._weight(linear, rows, transpose, columns)
        if low is not None and balance is not None:
            scale = self.frozen.weights[linear].scale
            sides = rows.values[:, :columns], weight[:, :columns]
            fp8_gelu_products.put(low, rows.scales, scale, balance, *sides)
        return weight

    def _before_gelu(self, gelu: Fp8GeluProducts, beside: _Beside, dtype: torch.dtype) -> tuple[Tensor, Rows]:
        """h_to_4h's output with LoRA, and its GELU, see `Fp8GeluProducts.forward`."""
        weight = self._weight_beside(1, beside)
        scales = fp8.bound_scales(self.frozen.before_gelu.expand(len(beside.rows.scales)), beside.low)
        return gelu.forward(beside.rows, weight, self.frozen.weights[1].scale, scales, dtype)

    def _product(self, linear: int, rows: Rows, dtype: torch.dtype, transpose: bool = False) -> Tensor:
        """``[T, in]`` → ``[T, out]``, or back with the transposed weight; without LoRA."""
        weight = self.frozen.weights[linear]
        scales = weight.of_columns if transpose else weight.of_rows
        return fp8.product(rows, Rows(self._weight(linear, rows, transpose), scales), dtype)

    def _weight(self, linear: int, rows: Rows, transpose: bool, columns: int = 0) -> Tensor:
        """The kept FP8 weight, or one quantized into the workspace; with room for `columns` in front."""
        projection, weight = self.block.projections[linear], self.frozen.weights[linear]
        size, width = _sizes(projection, transpose)
        kept = weight.kept.get(transpose)
        if kept is not None and kept.shape[1] == columns + width:  # else of an adapter of another rank
            return kept
        values = self.block.workspace.take(size, columns + width, rows.values)
        fp8.quantize_weight(projection.layer, weight.scale, values[:, columns:], transpose)
        return values

    def _a(self, linear: int, dtype: torch.dtype) -> Tensor:
        """``[r, in]``; no rows without LoRA."""
        a = self.adapters[linear][0]
        if a is None:
            weight = self.frozen.weights[linear].scale
            return weight.new_empty(0, self.block.projections[linear].in_features, dtype=dtype)
        return self._once((linear, "a"), lambda: a.to(dtype))

    def _scaled_b(self, linear: int, dtype: torch.dtype) -> Tensor:
        """B times its scaling, ``[out, r]``; no columns without LoRA."""
        b = self.adapters[linear][1]
        projection: Projection = self.block.projections[linear]
        if b is None:
            return self.frozen.weights[linear].scale.new_empty(projection.out_features, 0, dtype=dtype)
        return self._once(
            (linear, "b"), lambda: torch.mul(b, projection.scaling, out=b.new_empty(b.shape, dtype=dtype))
        )

    def _once(self, name: tuple[int, str], make: Callable[[], Tensor]) -> Tensor:
        """A matrix of LoRA in the dtype of activations, made once a call."""
        if name not in self._matrices:
            self._matrices[name] = make()
        return self._matrices[name]

    def _into_low_rank(self, linears: Sequence[int], inputs: Sequence[Tensor]) -> list[Tensor]:
        """Each linear's t ``[T, r]``; one product if they share the input."""
        matrices = [self._a(linear, inputs[0].dtype) for linear in linears]
        if len(inputs) == 2 and inputs[0] is inputs[1]:
            return list((inputs[0] @ torch.cat(matrices).T).split([len(a) for a in matrices], dim=1))
        return [x @ a.T for x, a in zip(inputs, matrices, strict=True)]

    def _out_of_low_rank(
        self, linears: Sequence[int], grads: Sequence[Tensor | Rows], dtype: torch.dtype
    ) -> list[Tensor]:
        """Each linear's u ``[T, r]``; one product if they share the gradient."""
        matrices = [self._scaled_b(linear, dtype) for linear in linears]
        first = grads[0]
        if len(grads) == 2 and first is grads[1] and isinstance(first, Tensor):
            return list((first @ torch.cat(matrices, dim=1)).split([b.shape[1] for b in matrices], dim=1))
        return [
            grad @ b if isinstance(grad, Tensor) else fp8.into_low_rank(b.T, grad)
            for grad, b in zip(grads, matrices, strict=True)
        ]

    def _added(self, linears: Sequence[int], low: Tensor) -> LowRank | None:
        """What LoRA adds to the sum of these linears' outputs."""
        if not low.shape[1]:
            return None
        return LowRank(low, _joined([self._scaled_b(linear, low.dtype) for linear in linears], dim=1).T)

    def _added_backward(self, linears: Sequence[int], low: Tensor) -> LowRank | None:
        """What LoRA adds to the sum of the gradients that come through these linears."""
        if not low.shape[1]:
            return None
        return LowRank(low, _joined([self._a(linear, low.dtype) for linear in linears], dim=0))

    def _scaled(self, linear: int, of_a: Tensor | None, of_b: Tensor | None) -> list[Tensor | None]:
        """The gradients of A and B, from that of A and that of B times its scaling, if there is LoRA."""
        projection = self.block.projections[linear]
        if not projection.rank or of_b is None:
            return [None, None]
        return [of_a, torch.mul(of_b, projection.scaling, out=of_b.new_empty(of_b.shape))]
