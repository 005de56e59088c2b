"""What sublayers compute between their products, see `sublayer.Mixer`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from falcon_qlora.kernels import ops
from falcon_qlora.kernels.block import Attention


@dataclass(frozen=True, eq=False)
class SwiGlu:
    """``up · silu(gate)``, from gate and up side by side."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return ()

    @property
    def large(self) -> bool:
        return True

    def forward(self, projected: Tensor) -> tuple[Tensor, ...]:
        return ()

    def output(self, projected: Tensor, kept: tuple[Tensor, ...], out: Tensor) -> None:
        ops.swiglu(projected, out)

    def backward(
        self, grad: Tensor, projected: Tensor, kept: tuple[Tensor, ...], out: Tensor, *, again: bool
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        _, output = ops.swiglu_backward(grad, projected, out)
        return [output], ()


@dataclass(frozen=True, eq=False)
class RotatedAttention:
    """Attention over rotated heads, from queries, keys and values side by side.

    Attributes:
        attention: what queries see.
        cosine: ``[T, D]``, of the rotary embedding.
        sine: ``[T, D]``, likewise.
        kv_heads: G.
    """

    attention: Attention
    cosine: Tensor
    sine: Tensor
    kv_heads: int

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
        ops.copy_rows(self._output(projected, kept), out)

    def backward(
        self, grad: Tensor, projected: Tensor, kept: tuple[Tensor, ...], out: Tensor, *, again: bool
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        inputs = [self._output(projected, kept)] if again else []
        of_output = grad.unflatten(1, (-1, self.cosine.shape[-1]))
        of_parts, own = self.attention.backward(of_output, *self._parts(projected), kept)
        ops.rotate_join(*of_parts, self.cosine, self.sine, self._heads(out))
        return inputs, own

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
