"""The products of `sublayer` in FP8, with LoRA beside them in the dtype of the activations.

Linears that share an input or an output are one product, as in `frozen_linear`, and have one scale. Unless
kept, their weights are quantized for every product, in the layout that it reads, each time into the same
memory. LoRA's part is added to a product's output in a pass of its own.

Behind weights that share an input are rows of zeros, up to the next multiple of `fp8.UNIT`: Falcon-H1-7B's
queries, keys, values and ``in_proj`` have 8,728 outputs. So there are as many columns behind the outputs, and
behind their gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from falcon_qlora.kernels import fp8, ops
from falcon_qlora.kernels.fp8_block import MARGIN, Weight
from falcon_qlora.kernels.fp8_rows import DTYPE, LARGEST, Rows
from falcon_qlora.kernels.frozen_linear import (
    Adapter,
    Group,
    Projection,
    SharedInput,
    SharedOutput,
)
from falcon_qlora.kernels.low_rank import LowRank
from falcon_qlora.kernels.workspace import Workspace


@dataclass(frozen=True, eq=False)
class Fp8Group:
    """How linears that share an input or an output are multiplied in FP8.

    Attributes:
        side_by_side: whether their outputs are side by side, or their inputs.
        weight: the scale that they share, and the weights if they are kept, as those of one linear; outputs
            that are side by side are padded to a multiple of `fp8.UNIT`.
    """

    side_by_side: bool
    weight: Weight

    @classmethod
    def measure(cls, projections: Sequence[Projection], *, side_by_side: bool) -> Fp8Group:
        """Measure the weights, dequantizing one at a time."""
        with torch.no_grad():
            largest = [ops.dequantize(each.layer).abs().amax().float() for each in projections]
        scale = MARGIN * torch.stack(largest).amax().clamp(min=1e-30) / LARGEST
        rows = [each.out_features for each in projections]
        columns = [each.in_features for each in projections]
        sizes = (
            (-(-sum(rows) // fp8.UNIT) * fp8.UNIT, columns[0]) if side_by_side else (rows[0], sum(columns))
        )
        return cls(side_by_side, Weight.of_scale(scale, sizes))

    def keep(self, projections: Sequence[Projection]) -> None:
        """Quantize the weights once and keep them in both layouts, one byte per weight each."""
        for transpose in (False, True):
            values = torch.empty(self._shape(transpose), dtype=DTYPE, device=self.weight.scale.device)
            self.weight.kept[transpose] = self._quantize(projections, values, transpose)

    def product(
        self,
        x: Tensor,
        rows: Rows | None,
        projections: Sequence[Projection],
        workspace: Workspace,
        *,
        transpose: bool,
    ) -> Tensor:
        """``[T, in]`` → ``[T, out]``, or back with the transposed weights; without LoRA, and with padding.

        `rows` are `x` in FP8, where they have been made.
        """
        if rows is None or rows.values.shape != x.shape:
            rows, _ = fp8.quantize_rows(x)
        values = self.weight.kept.get(transpose)
        if values is None:
            values = workspace.take(*self._shape(transpose), rows.values)
            self._quantize(projections, values, transpose)
        scales = self.weight.of_columns if transpose else self.weight.of_rows
        return fp8.product(rows, Rows(values, scales), x.dtype)

    def _shape(self, transpose: bool) -> tuple[int, int]:
        sizes = len(self.weight.of_rows), len(self.weight.of_columns)
        return sizes[::-1] if transpose else sizes

    def _quantize(self, projections: Sequence[Projection], values: Tensor, transpose: bool) -> Tensor:
        sizes = [each.out_features if self.side_by_side else each.in_features for each in projections]
        # Outputs are rows of the weights, and columns of the transposed ones.
        dim = int(self.side_by_side == transpose)
        *parts, padding = values.split([*sizes, values.shape[dim] - sum(sizes)], dim)
        for projection, part in zip(projections, parts, strict=True):
            fp8.quantize_weight(projection.layer, self.weight.scale, part, transpose)
        padding.zero_()
        return values


class _InFp8(Group):
    """What both kinds of groups share: the products."""

    def __init__(
        self,
        projections: Sequence[Projection],
        adapters: Sequence[Adapter],
        workspace: Workspace,
        group: Fp8Group,
    ) -> None:
        super().__init__(projections, adapters, workspace)
        self.group = group
        self.columns = 0

    def _product(self, x: Tensor, rows: Rows | None = None, *, transpose: bool = False) -> Tensor:
        """See `Fp8Group.product`."""
        return self.group.product(x, rows, self.projections, self.workspace, transpose=transpose)


class Fp8SharedInput(_InFp8, SharedInput):
    """`SharedInput` in FP8. What it is given and returns has no columns of LoRA; outputs have padding."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gradient_width = len(self.group.weight.of_rows)

    def project(self, extended: Tensor, again: bool) -> tuple[Tensor, Tensor]:
        projected = self._product(extended)
        low = extended @ self._all_a(extended).T
        for index, (rank, outputs) in enumerate(zip(self.ranks, self.outputs, strict=True)):
            if self.projections[index].rank:
                fp8.add(projected[:, outputs], LowRank(low[:, rank], self._scaled_b(index, extended).T))
        return projected, low

    def adapter_gradients(self, extended: Tensor, low: Tensor, x: Tensor) -> list[Tensor | None]:
        self._low_grad = extended.new_empty(extended.shape[0], self.used)
        return self._adapter_gradients(extended, self._low_grad, low, x)

    def input_gradient(self, extended: Tensor, in_fp8: Rows | None = None) -> Tensor:
        extended[:, self.width :] = 0
        of_x = self._product(extended, in_fp8, transpose=True)
        if self.used:
            fp8.add(of_x, LowRank(self._low_grad, self._all_a(of_x)))
        return of_x

    def _all_a(self, like: Tensor) -> Tensor:
        """Every A, ``[R, H]``."""
        parts = [a for a, _ in self.adapters if a is not None]
        return torch.cat(parts).to(like.dtype) if parts else like.new_empty(0, self.features)


class Fp8SharedOutput(_InFp8, SharedOutput):
    """`SharedOutput` in FP8. What it is given and returns has no columns of LoRA."""

    def forward(self, extended: Tensor, addend: Tensor, in_fp8: Rows | None = None) -> tuple[Tensor, Tensor]:
        output = self._product(extended, in_fp8)
        low = self.low_rank_of([extended[:, columns] for columns in self.inputs])
        added = LowRank(low, self._all_b(extended).T) if self.used else None
        return fp8.add(output, added, (addend,)), low

    def low_rank_of(self, inputs: Sequence[Tensor]) -> Tensor:
        return self._put_all_t(inputs, inputs[0].new_empty(inputs[0].shape[0], self.used))

    def input_gradient(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        of_joined = self._product(grad, transpose=True)
        low_grad = grad @ self._all_b(grad)
        for (a, _), rank, inputs in zip(self.adapters, self.ranks, self.inputs, strict=True):
            if a is not None:
                fp8.add(of_joined[:, inputs], LowRank(low_grad[:, rank], a.to(grad.dtype)))
        return of_joined, low_grad

    def _all_b(self, like: Tensor) -> Tensor:
        """Every B times its scaling, ``[H, R]``."""
        trained = [index for index, projection in enumerate(self.projections) if projection.rank]
        parts = [self._scaled_b(index, like) for index in trained]
        return torch.cat(parts, dim=1) if parts else like.new_empty(self.width, 0)
