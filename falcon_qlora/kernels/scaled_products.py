"""A block's products where learned vectors scale and shift each linear's output, and norms are trained.

A linear's output is ``s (z + b)``, with z its product. dense and 4h_to_h have scales of their own, so they
are two products here, added to the block's input in one pass. The vectors are applied in float32.

A scale's gradient is Σ dy (z + b) over tokens. Where the next operation needs ``y = s (z + b)``, y is kept,
and the gradient is Σ dy y / s. Rounding of y is relative to its size, so the gradient is accurate however
small s is. Where s is 0, y holds nothing of z, and the scale's gradient is set to 0. For dense and 4h_to_h,
z is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from falcon_qlora.kernels.block import Block
from falcon_qlora.kernels.dequantized import DequantizedProducts
from falcon_qlora.kernels.frozen_linear import Adapter, Projection, dequantized
from falcon_qlora.kernels.scale_shift import add_scaled, norm_gradients, scale_backward, scale_shift

Vectors = tuple[Tensor, Tensor]  # scale and bias, float32 [O] each


class ScaledProducts:
    """The products of one call, see `Products`; t is replaced by z of 4h_to_h and dense, ``[2, T, H]``.

    Args:
        block: without LoRA.
        trained: scale and bias of each of the block's projections, then weight and bias of each norm.
    """

    inputs = 0

    def __init__(self, block: Block, trained: Sequence[Adapter]) -> None:
        self.block = block
        vectors = cast(Sequence[Vectors], trained[:4])
        self.of_fused, self.of_h_to_4h, self.of_4h_to_h, self.of_dense = vectors
        self.frozen = DequantizedProducts(block, [(None, None)] * 4)
        self.outputs = self.frozen.outputs
        self._after_gelu: Tensor | None = None  # from `enter`
        self._again = False

    def enter(self, hidden: Tensor, again: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        projected, _ = self.frozen.enter(hidden, again)
        fused, before_gelu = self.parts(projected)
        scale_shift(fused, *self.of_fused, fused)
        self._after_gelu = before_gelu.new_empty(before_gelu.shape)
        scale_shift(before_gelu, *self.of_h_to_4h, before_gelu, self._after_gelu)
        self._again = again
        return projected, []

    def parts(self, projected: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return self.frozen.parts(projected)

    def project_h_to_4h(self, hidden: Tensor) -> Tensor:
        output = self.frozen.project_h_to_4h(hidden)
        return scale_shift(output, *self.of_h_to_4h, output)

    def leave(
        self, before_gelu: Tensor, attended: Tensor, low_in: Sequence[Tensor], hidden: Tensor
    ) -> tuple[Tensor, Tensor]:
        of_4h_to_h, of_dense = outputs = self._multiply(attended)
        return add_scaled(hidden, (of_4h_to_h, *self.of_4h_to_h), (of_dense, *self.of_dense)), outputs

    def low_rank(
        self, before_gelu: Tensor, attended: Callable[[], Tensor], low_in: Sequence[Tensor]
    ) -> Tensor:
        return self._multiply(attended())

    def _multiply(self, attended: Tensor) -> Tensor:
        """``[2, T, H]``: 4h_to_h of GELU's output, and dense of attention's."""
        after_gelu, self._after_gelu = self._after_gelu, None
        assert after_gelu is not None
        outputs = after_gelu.new_empty(2, after_gelu.shape[0], self.block.dense.out_features)
        torch.mm(after_gelu, self._weight(self.block.dense_4h_to_h, attended).T, out=outputs[0])
        torch.mm(attended.flatten(1), self._weight(self.block.dense, attended).T, out=outputs[1])
        return outputs

    def leave_backward(
        self,
        grad: Tensor,
        before_gelu: Tensor,
        attended: Callable[[], Tensor],
        low_in: Sequence[Tensor],
        low_out: Tensor,
    ) -> tuple[Tensor, Tensor, tuple[list[Tensor], list[Tensor]], list[Tensor | None]]:
        grads, _ = self.frozen.gradients(grad, grad.shape[0])
        _, of_before_gelu = self.parts(grads)
        results: list[Tensor | None] = []
        # In a recomputed block, h_to_4h's output is in the memory that its gradient will take.
        of_after = torch.empty_like(of_before_gelu) if self._again else of_before_gelu
        of_output = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
        results += self._through(grad, low_out[0], self.of_4h_to_h, of_output)
        torch.mm(of_output, self._weight(self.block.dense_4h_to_h, grad), out=of_after)
        scale, _ = self.of_h_to_4h
        sums = scale_backward(of_after, before_gelu, scale, of_before_gelu, through_gelu=True)
        del of_after
        results += self._through(grad, low_out[1], self.of_dense, of_output)
        of_attended = torch.mm(of_output, self._weight(self.block.dense, grad))
        of_fused = grad.new_empty(grad.shape[0], self.block.query_key_value.out_features)
        return of_attended, of_fused, (grads, _of_result(sums, scale)), results

    @staticmethod
    def _through(grad: Tensor, product: Tensor, vectors: Vectors, out: Tensor) -> list[Tensor]:
        """The vectors' gradients; writes the product's into `out`."""
        scale, bias = vectors
        along, total = scale_backward(grad, product, scale, out, through_gelu=False)
        return [torch.addcmul(along, bias, total), scale * total]

    def enter_backward(
        self,
        hidden: Tensor,
        of_fused: Tensor,
        others: tuple[list[Tensor], list[Tensor]],
        low_in: Sequence[Tensor],
        addend: Tensor | None,
        fused: Callable[[], Tensor],
    ) -> tuple[Tensor | None, list[Tensor | None], list[Tensor]]:
        grads, of_h_to_4h = others
        scale, _ = self.of_fused
        sums = scale_backward(of_fused, fused(), scale, self.parts(grads)[0], through_gelu=False)
        _, *statistics = self.block.normalize(hidden)
        of_normals = [group.input_gradient(grad) for group, grad in zip(self.frozen.into, grads, strict=True)]
        of_norms = [
            each for of_normal in of_normals for each in norm_gradients(of_normal, hidden, *statistics)
        ]
        if addend is not None:
            addend = self.block.normalize_backward(hidden, of_normals, statistics, addend)
        return addend, [*_of_result(sums, scale), *of_h_to_4h], of_norms

    def _weight(self, projection: Projection, like: Tensor) -> Tensor:
        return dequantized(projection, self.block.workspace, like)


def _of_result(sums: Tensor, scale: Tensor) -> list[Tensor]:
    """The gradients of scale and bias, from sums over the result ``s (z + b)`` instead of the product."""
    along, total = sums
    return [(along / scale).masked_fill(scale == 0, 0.0), scale * total]
