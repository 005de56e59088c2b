"""A block's products in the dtype of its activations, with weights dequantized into it.

Products are few and large, see `frozen_linear`. With one norm, query_key_value and h_to_4h are one product;
dense and 4h_to_h always are, with the block's input as addend. Weights are dequantized for every product,
unless they are kept. With `GeluProducts`, h_to_4h's product forward and 4h_to_h's backward are
separate ones that compute GELU in their epilogues.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from falcon_qlora.kernels import ops
from falcon_qlora.kernels.block import Block, normalize
from falcon_qlora.kernels.frozen_linear import Adapter, SharedInput, SharedOutput, room_behind
from falcon_qlora.kernels.gelu_products import GeluProducts


class DequantizedProducts:
    """The products of one call, see `Products`."""

    def __init__(
        self, block: Block, adapters: Sequence[Adapter], gelu_products: GeluProducts | None = None
    ) -> None:
        self.block, self.adapters, self.gelu_products = block, adapters, gelu_products
        groups = [(0, 2)] if len(block.norms) == 1 and block.rows is None else [(0, 1), (1, 2)]
        self.into = [
            SharedInput(block.projections[first:last], adapters[first:last], block.workspace)
            for first, last in groups
        ]
        self.out_of = SharedOutput(block.projections[2:], adapters[2:], block.workspace)
        self.outputs = self.inputs = len(self.into)
        self._joined: Tensor | None = None  # from `enter`, if its product has written GELU's output there
        self._free: list[Tensor] | None = None  # outputs with room for LoRA, which gradients may overwrite

    def enter(self, hidden: Tensor, again: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        projected, low_rank = [], []
        normals = [
            hidden.new_empty(count, group.features + group.columns)
            for count, group in zip(self.block.counts(hidden), self.into, strict=False)
        ]
        self.block.normalize(hidden, [normal[:, : hidden.shape[1]] for normal in normals])
        for group in self.into:
            normal = normals.pop(0)
            output = hidden.new_empty(normal.shape[0], group.width + (group.columns if again else 0))
            if group is self.into[-1] and self.gelu_products is not None:
                low = self._enter_with_gelu(group, normal, output[:, : group.width], self.gelu_products)
            else:
                low = group.forward(normal, output[:, : group.width])
            projected.append(output)
            low_rank.append(low)
        self._free = projected if again else None
        return projected, low_rank

    def _enter_with_gelu(
        self, group: SharedInput, normal: Tensor, output: Tensor, gelu_products: GeluProducts
    ) -> Tensor:
        low, operands = group.one_by_one(normal)
        self._joined = self._room_for_joined(normal)
        after_gelu = self._joined[:, : self.block.dense_4h_to_h.in_features]
        for (x, weight), columns in zip(operands, group.outputs, strict=True):
            if columns is group.outputs[-1]:
                gelu_products.forward(x, weight.T, output[:, columns], after_gelu)
            else:
                torch.mm(x, weight.T, out=output[:, columns])
        return low

    def parts(self, projected: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        width = self.block.query_key_value.out_features
        wide = self.block.dense_h_to_4h.out_features
        start = width if len(projected) == 1 else 0
        return projected[0][:, :width], projected[-1][:, start : start + wide]

    def project_h_to_4h(self, hidden: Tensor) -> Tensor:
        block = self.block
        group = SharedInput([block.dense_h_to_4h], self.adapters[1:2], block.workspace)
        hidden = block.wanted(hidden)
        normal = hidden.new_empty(hidden.shape[0], group.features + group.columns)
        normalize(hidden, block.norms[-1:], [normal[:, : group.features]])
        output = hidden.new_empty(hidden.shape[0], group.width)
        group.forward(normal, output)
        return output

    def leave(
        self, before_gelu: Tensor, attended: Tensor, low_in: Sequence[Tensor], hidden: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.out_of.forward(self._join(before_gelu, attended), hidden)

    def low_rank(
        self, before_gelu: Tensor, attended: Callable[[], Tensor], low_in: Sequence[Tensor]
    ) -> Tensor:
        if not self.out_of.columns:
            self._joined = None
            return before_gelu.new_empty(before_gelu.shape[0], 0)
        return self.out_of.low_rank(self._join(before_gelu, attended()))

    def leave_backward(
        self,
        grad: Tensor,
        before_gelu: Tensor,
        attended: Callable[[], Tensor],
        low_in: Sequence[Tensor],
        low_out: Tensor,
    ) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor | None]]:
        grads, may_overwrite = self.gradients(grad, low_in[0].shape[0])
        of_fused, of_before_gelu = self.parts(grads)
        split = self.block.dense_4h_to_h.in_features
        # With dropout LoRA's part is added after the product, and GELU's gradient needs the sum.
        if self.gelu_products is not None and not self.out_of.drops:
            low_grad, operands = self.out_of.gradient_one_by_one(grad)
            after_gelu = grad.new_empty(grad.shape[0], split)
            self.gelu_products.backward(*next(operands), before_gelu, of_before_gelu, after_gelu)
            of_attended = torch.mm(*next(operands))
            del operands
        else:
            of_joined, low_grad = self.out_of.input_gradient(grad)
            _, after_gelu = ops.gelu_backward(of_joined[:, :split], before_gelu, of_before_gelu)
            of_attended = of_joined[:, split:]
            if may_overwrite:  # to save memory: a slice would keep the whole joined tensor alive
                of_attended = of_attended.contiguous()
                del of_joined
        inputs = [after_gelu, attended().flatten(1)] if self.out_of.columns else []
        adapter_grads = self.out_of.adapter_gradients(grad, low_grad, low_out, inputs)
        return of_attended, of_fused, grads, adapter_grads

    def gradients(self, like: Tensor, tokens: int) -> tuple[list[Tensor], bool]:
        """Tensors for the outputs' gradients, and whether they overwrite recomputed outputs.

        Args:
            like: ``[N, H]``.
            tokens: T.
        """
        grads, self._free = self._free, None
        if grads is not None:
            return grads, True
        counts = (tokens, like.shape[0])
        return [
            like.new_empty(count, group.width + group.columns)
            for count, group in zip(counts, self.into, strict=False)
        ], False

    def enter_backward(
        self,
        hidden: Tensor,
        of_fused: Tensor,
        others: list[Tensor],
        low_in: Sequence[Tensor],
        addend: Tensor | None,
        fused: Callable[[], Tensor],
    ) -> tuple[Tensor | None, list[Tensor | None], list[Tensor]]:
        adapter_grads: list[Tensor | None] = []
        # The block before this one puts its LoRA's columns behind the gradient of its output.
        out = None if addend is None else room_behind(hidden, self.out_of.columns)
        normals, *statistics = self.block.normalize(hidden)
        of_normals = []
        for group, grad, low in zip(self.into, others, low_in, strict=True):
            adapter_grads += group.adapter_gradients(grad, low, normals.pop(0))
            if addend is not None:
                of_normals.append(group.input_gradient(grad))
        if addend is not None:
            addend = self.block.normalize_backward(hidden, of_normals, statistics, addend, out)
        return addend, adapter_grads, []

    def _join(self, before_gelu: Tensor, attended: Tensor) -> Tensor:
        """The last product's input: GELU's output, attention's output, and space for t."""
        split = self.block.dense_4h_to_h.in_features
        joined, self._joined = self._joined, None
        if joined is None:
            joined = self._room_for_joined(before_gelu)
            ops.gelu(before_gelu, joined[:, :split])
        ops.copy_rows(attended.flatten(1), joined[:, split : self.out_of.features])
        return joined

    def _room_for_joined(self, like: Tensor) -> Tensor:
        return like.new_empty(like.shape[0], self.out_of.features + self.out_of.columns)
