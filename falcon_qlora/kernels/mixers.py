"""What sublayers compute between their products, see `sublayer.Mixer`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from falcon_qlora.kernels import fp8, ops, ssd_ops
from falcon_qlora.kernels.block import Attention
from falcon_qlora.kernels.fp8_rows import Rows
from falcon_qlora.kernels.ssd import StateSpace


@dataclass(frozen=True, eq=False)
class SwiGlu:
    """``multiplier · up · silu(gate_multiplier · gate)``, from gate and up side by side.

    Attributes:
        gate_multiplier: of the gate.
        multiplier: of the output.
        in_fp8: whether the products on both sides take what it gives in FP8.
    """

    gate_multiplier: float = 1.0
    multiplier: float = 1.0
    in_fp8: bool = False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return ()

    @property
    def large(self) -> bool:
        return True

    def forward(self, projected: Tensor) -> tuple[Tensor, ...]:
        return ()

    def output(self, projected: Tensor, kept: tuple[Tensor, ...], out: Tensor) -> Rows | None:
        multipliers = self.gate_multiplier, self.multiplier
        if self.in_fp8:
            return fp8.swiglu(projected, out, *multipliers)
        ops.swiglu(projected, out, *multipliers)
        return None

    def backward(
        self, grad: Tensor, projected: Tensor, kept: tuple[Tensor, ...], out: Tensor, *, again: bool
    ) -> tuple[list[Tensor], tuple[Tensor, ...], Rows | None]:
        multipliers = self.gate_multiplier, self.multiplier
        if self.in_fp8:
            rows, output = fp8.swiglu_backward(grad, projected, out, *multipliers)
            return [output], (), rows
        _, output = ops.swiglu_backward(grad, projected, out, *multipliers)
        return [output], (), None


@dataclass(frozen=True, eq=False)
class RotatedAttention:
    """Attention over rotated heads, from queries, keys and values side by side.

    Attributes:
        attention: what queries see.
        cosine: ``[T, D]``, of the rotary embedding.
        sine: ``[T, D]``, likewise.
        kv_heads: G.
        scale: of the output; 1 where attention has tensors of its own.
    """

    attention: Attention
    cosine: Tensor
    sine: Tensor
    kv_heads: int
    scale: float = 1.0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.attention.tensors

    @property
    def large(self) -> bool:
        return False

    def forward(self, projected: Tensor) -> tuple[Tensor, ...]:
        ops.rotate_(self._heads(projected)[:, :, : -self.kv_heads], self.cosine, self.sine)
        return self.attention.forward(*self._parts(projected))

    def output(self, projected: Tensor, kept: tuple[Tensor, ...], out: Tensor) -> None:
        ops.copy_rows(self._output(projected, kept), out, self.scale)

    def backward(
        self, grad: Tensor, projected: Tensor, kept: tuple[Tensor, ...], out: Tensor, *, again: bool
    ) -> tuple[list[Tensor], tuple[Tensor, ...], None]:
        inputs = [self._output(projected, kept)] if again else []
        of_output = grad.unflatten(1, (-1, self.cosine.shape[-1]))
        of_parts, own = self.attention.backward(of_output, *self._parts(projected), kept)
        # Attention's gradients are linear in the output's: scaled here, they need no pass of their own.
        ops.rotate_join(*of_parts, self.cosine, self.sine, self._heads(out), self.scale)
        if self.scale != 1:
            inputs = [ops.copy_rows(each, grad, self.scale) for each in inputs]
        return inputs, own, None

    def _heads(self, projected: Tensor) -> Tensor:
        """``[T, W]`` → ``[T, 1, Q + 2G, D]``, a view."""
        return projected.unflatten(1, (1, -1, self.cosine.shape[-1]))

    def _parts(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views: query ``[T, Q, D]``, key and value ``[T, G, D]``."""
        heads, keys = self._heads(projected)[:, 0], self.kv_heads
        return heads[:, : -2 * keys], heads[:, -2 * keys : -keys], heads[:, -keys:]

    def _output(self, projected: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        """``[T, Q D]``."""
        query = self._parts(projected)[0].unflatten(1, (self.kv_heads, -1))
        return self.attention.output(query, kept).flatten(1)


@dataclass(frozen=True, eq=False)
class AttentionBesideStateSpace:
    """Attention and a state space side by side: queries, keys and values, and what `space` describes.

    Attributes:
        attention: over the first columns.
        space: parameters of the state space.
        positions: int64 ``[T]``, of each token in its document.
        starts: int32 ``[documents + 1]``, where each document begins, and T.
        scale: of the state space's output.
    """

    attention: RotatedAttention
    space: StateSpace
    positions: Tensor
    starts: Tensor
    scale: float = 1.0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.attention.tensors

    @property
    def large(self) -> bool:
        return False

    def forward(self, projected: Tensor) -> tuple[Tensor, ...]:
        heads, columns = self._inputs(projected)
        y = ssd_ops.mix_forward(columns, self.space, self.positions, self.starts)
        return y, *self.attention.forward(heads)

    def output(self, projected: Tensor, kept: tuple[Tensor, ...], out: Tensor) -> None:
        (heads, columns), (attended, gated) = self._inputs(projected), self._outputs(out)
        y, *of_attention = kept
        self.attention.output(heads, tuple(of_attention), attended)
        ssd_ops.mix_output(columns, y, self.space, gated, self.scale)

    def backward(
        self, grad: Tensor, projected: Tensor, kept: tuple[Tensor, ...], out: Tensor, *, again: bool
    ) -> tuple[list[Tensor], tuple[Tensor, ...], None]:
        (heads, columns), (of_heads, of_columns) = self._inputs(projected), self._inputs(out)
        of_attended, of_gated = self._outputs(grad)
        y, *of_attention = kept
        beside = of_attended, heads, tuple(of_attention), of_heads
        inputs, own, _ = self.attention.backward(*beside, again=again)
        documents = self.positions, self.starts
        # The output takes its gradient's place.
        ssd_ops.mix_backward(of_gated, columns, y, self.space, *documents, of_columns, of_gated, self.scale)
        return [*inputs, of_gated], own, None

    def _inputs(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """The columns of heads, and those of the state space."""
        heads = projected.shape[1] - len(self.space.multipliers)
        return projected[:, :heads], projected[:, heads:]

    def _outputs(self, joined: Tensor) -> tuple[Tensor, Tensor]:
        """The columns of attention, and those of the state space."""
        heads = joined.shape[1] - self.space.width
        return joined[:, :heads], joined[:, heads:]
