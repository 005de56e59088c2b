"""A block of residual branches one after the other, forward and backward, as one autograd function.

Each branch, a *sublayer*, is ``y = x + W_out · mix(W_in · rms(x))``. W_in are linears that share their input,
W_out linears whose outputs are added up, both frozen, with LoRA within their products and the residual as the
second one's addend. What is between them is a `Mixer`: attention, SwiGLU, or several side by side.

Kept for the backward pass of each sublayer: x, W_in's output, LoRA's t, and what the mixer asks for; less if
`Sublayers.keep` says so. Norms, and what mixers give to W_out, are always computed again. The last product is
not: no gradient needs its output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from falcon_qlora.kernels import ops
from falcon_qlora.kernels.block import Keep
from falcon_qlora.kernels.fp8_block import Weight
from falcon_qlora.kernels.fp8_groups import Fp8Group, Fp8SharedInput, Fp8SharedOutput
from falcon_qlora.kernels.fp8_rows import Rows
from falcon_qlora.kernels.frozen_linear import (
    Adapter,
    Projection,
    SharedInput,
    SharedOutput,
    aligned,
    room_behind,
)
from falcon_qlora.kernels.workspace import Workspace


class Mixer(Protocol):
    """What a sublayer computes between its two products.

    Its input ``[T, W]`` holds the outputs of W_in's linears side by side, its output ``[T, F]`` the inputs of
    W_out's; both may be slices with longer rows.

    Attributes:
        tensors: its own tensors that get gradients.
        large: whether its input is what a block does not keep with ``attention``.
    """

    @property
    def tensors(self) -> tuple[Tensor, ...]: ...

    @property
    def large(self) -> bool: ...

    def forward(self, projected: Tensor) -> tuple[Tensor, ...]:
        """``[T, W]``, which may be changed in-place → what else `output` and `backward` need."""

    def output(self, projected: Tensor, kept: tuple[Tensor, ...], out: Tensor) -> Rows | None:
        """Write the output ``[T, F]`` into `out`.

        Returns:
            it in FP8 too, where the mixer makes that in the same pass.
        """

    def backward(
        self, grad: Tensor, projected: Tensor, kept: tuple[Tensor, ...], out: Tensor, *, again: bool
    ) -> tuple[list[Tensor], tuple[Tensor, ...], Rows | None]:
        """Back through all of it.

        Args:
            grad: ``[T, F]``, of the output; may be overwritten.
            projected: ``[T, W]``, as `forward` left it.
            kept: from `forward`.
            out: ``[T, W]`` to write the gradient of the input into; may be `projected`.
            again: whether the output is asked for again.

        Returns:
            the output again, as each of W_out's linears takes its part; the gradients of `tensors`; and the
            input's gradient in FP8, where the mixer makes it in the same pass.
        """


@dataclass(frozen=True, eq=False)
class RmsNorm:
    """An RMS norm: weight ``[H]``."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return ops.rms_norm(x, self.weight, self.eps, out)


@dataclass(frozen=True, eq=False)
class Sublayer:
    """The frozen part of a residual branch.

    Attributes:
        norm: of its input.
        into: W_in.
        out_of: W_out.
    """

    norm: RmsNorm
    into: tuple[Projection, ...]
    out_of: tuple[Projection, ...]


@dataclass(frozen=True, eq=False)
class Sublayers:
    """The frozen part of a block, for `run_sublayers`.

    Attributes:
        parts: its sublayers in order.
        workspace: shared by all blocks of a model.
        keep: what is kept for the backward pass: all it needs; all but the inputs of `large` mixers; or only
            the block's input. The rest is recomputed.
        fp8: what their products in FP8 need; None for products in the activations' dtype.
    """

    parts: tuple[Sublayer, ...]
    workspace: Workspace
    keep: Keep = "all"
    fp8: Fp8Sublayers | None = None

    @property
    def projections(self) -> list[Projection]:
        """In the order of `run_sublayers`' adapters."""
        return [each for part in self.parts for each in (*part.into, *part.out_of)]


@dataclass(frozen=True, eq=False)
class Fp8Sublayers:
    """A block's frozen weights for products in FP8: of W_in and W_out, for each sublayer."""

    groups: tuple[tuple[Fp8Group, Fp8Group], ...]

    @property
    def weights(self) -> tuple[Weight, ...]:
        return tuple(group.weight for pair in self.groups for group in pair)

    @classmethod
    def measure(cls, block: Sublayers) -> Fp8Sublayers:
        """See `Fp8Group.measure`."""
        return cls(
            tuple(
                (
                    Fp8Group.measure(part.into, side_by_side=True),
                    Fp8Group.measure(part.out_of, side_by_side=False),
                )
                for part in block.parts
            )
        )

    def kept_bytes(self, block: Sublayers) -> int:
        """Bytes that `keep` takes: two per weight."""
        return sum(2 * len(weight.of_rows) * len(weight.of_columns) for weight in self.weights)

    def keep(self, block: Sublayers) -> None:
        """See `Fp8Group.keep`."""
        for part, (into, out_of) in zip(block.parts, self.groups, strict=True):
            into.keep(part.into)
            out_of.keep(part.out_of)


def run_sublayers(
    hidden: Tensor, block: Sublayers, mixers: Sequence[Mixer], adapters: Sequence[Adapter]
) -> Tensor:
    """Run a block.

    Args:
        hidden: ``[T, H]``, in the dtype to compute in.
        block: the frozen part.
        mixers: one for each sublayer.
        adapters: LoRA's A and B for each of ``block.projections``, (None, None) without LoRA.

    Returns:
        ``[T, H]``, connected to `hidden`, the adapters and the mixers' own tensors.
    """
    flat = [matrix for adapter in adapters for matrix in adapter]
    own = [tensor for mixer in mixers for tensor in mixer.tensors]
    return _SublayersFunction.apply(hidden, block, mixers, *flat, *own)


class _Kept(NamedTuple):
    """What the backward pass of a sublayer needs of its forward pass.

    Attributes:
        x: ``[T, H]``, its input.
        projected: ``[T, W]``, W_in's output as the mixer left it; None if it is to be recomputed, as the two
            after it.
        low_in: t of W_in's LoRA.
        of_mixer: what the mixer asked for.
        low_out: t of W_out's LoRA; None if it is to be recomputed.
    """

    x: Tensor
    projected: Tensor | None
    low_in: Tensor | None
    of_mixer: tuple[Tensor, ...]
    low_out: Tensor | None

    @property
    def flat(self) -> list[Tensor | None]:
        return [self.x, self.projected, self.low_in, self.low_out, *self.of_mixer]

    @classmethod
    def from_flat(cls, flat: Sequence[Any]) -> _Kept:
        x, projected, low_in, low_out, *of_mixer = flat
        return cls(x, projected, low_in, tuple(of_mixer), low_out)


class _SublayersFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, block: Sublayers, mixers: Sequence[Mixer], *trained: Tensor | None
    ) -> Tensor:
        adapters = trained[: 2 * len(block.projections)]
        flat: list[Tensor | None] = []
        ctx.sizes = []
        x = hidden
        with torch.autocast(hidden.device.type, enabled=False):
            for call in _calls(block, mixers, adapters):
                kept, x = call.forward(x)
                if block.keep == "attention" and call.mixer.large:
                    kept = _Kept(kept.x, None, None, (), kept.low_out)
                if block.keep != "input":
                    flat += kept.flat
                    ctx.sizes.append(len(kept.flat))
                del kept
        ctx.block, ctx.mixers = block, mixers
        ctx.save_for_backward(hidden, *adapters, *flat)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        block, mixers = ctx.block, ctx.mixers
        hidden, *rest = ctx.saved_tensors
        count = 2 * len(block.projections)
        adapters, flat = rest[:count], rest[count:]
        del rest
        with torch.autocast(hidden.device.type, enabled=False):
            calls = _calls(block, mixers, adapters)
            if block.keep == "input":
                steps, x = [], hidden
                for call in calls[:-1]:
                    kept, x = call.forward(x, again=True)
                    steps.append(kept)
                steps.append(_Kept(x, None, None, (), None))
                del kept, x
            else:
                steps = [_Kept.from_flat(part) for part in _split(flat, ctx.sizes)]
            del flat
            of_x: Tensor | None = grad
            adapter_grads: list[list[Tensor | None]] = []
            own_grads: list[list[Tensor | None]] = []
            for index in reversed(range(len(calls))):
                call = calls[index]
                if of_x is None:  # nothing from here on is trained
                    adapter_grads.append([None] * call.matrices)
                    own_grads.append([None] * len(call.mixer.tensors))
                    continue
                wanted = ctx.needs_input_grad[0] or any(each.trains for each in calls[:index])
                # The sublayer before, or the last of the block before, puts its LoRA's columns behind.
                room = calls[index - 1].out_of.columns if wanted else None
                of_x, of_adapters, own = call.backward(of_x, steps.pop(), block.keep == "input", room)
                adapter_grads.append(of_adapters)
                own_grads.append(own)
        grads = [each for part in (*reversed(adapter_grads), *reversed(own_grads)) for each in part]
        return (of_x if ctx.needs_input_grad[0] else None, None, None, *grads)


def _calls(block: Sublayers, mixers: Sequence[Mixer], flat: Sequence[Tensor | None]) -> list[_Call]:
    adapters = list(zip(flat[::2], flat[1::2], strict=True))
    sizes = [len(part.into) + len(part.out_of) for part in block.parts]
    groups: Sequence[Any] = [None] * len(sizes) if block.fp8 is None else block.fp8.groups
    return [
        _Call(part, mixer, own, block.workspace, pair)
        for part, mixer, own, pair in zip(block.parts, mixers, _split(adapters, sizes), groups, strict=True)
    ]


def _split(items: Sequence[Any], sizes: Sequence[int]) -> list[Sequence[Any]]:
    parts, start = [], 0
    for size in sizes:
        parts.append(items[start : start + size])
        start += size
    return parts


class _Call:
    """One call of a sublayer.

    Attributes:
        matrices: how many of its adapters' matrices there are, None counted.
        trains: whether any of them, or a tensor of the mixer, gets a gradient.
    """

    def __init__(
        self,
        sublayer: Sublayer,
        mixer: Mixer,
        adapters: Sequence[Adapter],
        workspace: Workspace,
        groups: tuple[Fp8Group, Fp8Group] | None,
    ) -> None:
        first, second = adapters[: len(sublayer.into)], adapters[len(sublayer.into) :]
        self.norm, self.mixer = sublayer.norm, mixer
        self.into: SharedInput
        self.out_of: SharedOutput
        if groups is None:
            self.into = SharedInput(sublayer.into, first, workspace)
            self.out_of = SharedOutput(sublayer.out_of, second, workspace)
        else:
            self.into = Fp8SharedInput(sublayer.into, first, workspace, groups[0])
            self.out_of = Fp8SharedOutput(sublayer.out_of, second, workspace, groups[1])
        self.matrices = 2 * len(adapters)
        self.trains = bool(mixer.tensors) or any(a is not None for a, _ in adapters)

    def forward(self, x: Tensor, again: bool = False) -> tuple[_Kept, Tensor]:
        """Its output ``[T, H]``, and what `backward` needs; `again` as in `_enter`."""
        projected, low_in, of_mixer = self._enter(x, again)
        joined = x.new_empty(x.shape[0], self.out_of.features + self.out_of.columns)
        columns = projected[:, : self.into.width], of_mixer, joined[:, : self.out_of.features]
        output, low_out = self.out_of.forward(joined, x, self.mixer.output(*columns))
        return _Kept(x, projected, low_in, of_mixer, low_out), output

    def _enter(self, x: Tensor, again: bool) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Through norm, W_in and mixer, but not to its output.

        `again`: a recomputation in the backward pass, where the gradient may overwrite W_in's output, and
        needs room for LoRA's columns.
        """
        normal = x.new_empty(x.shape[0], self.into.features + self.into.columns)
        self.norm(x, normal[:, : self.into.features])
        projected, low_in = self.into.project(normal, again)
        del normal
        return projected, low_in, self.mixer.forward(projected[:, : self.into.width])

    def backward(
        self, grad: Tensor, kept: _Kept, recomputed: bool, room: int | None
    ) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
        """Back through all of it.

        Args:
            grad: ``[T, H]``, of the output.
            kept: from `forward`.
            recomputed: whether `kept` was made in the backward pass, with `again`.
            room: columns of space behind the result; None if it is not wanted.

        Returns:
            the gradient of the input ``[T, H]``, those of the adapters' matrices, and of the mixer's tensors.
        """
        x, projected, low_in, of_mixer, low_out = kept
        if projected is None or low_in is None:
            projected, low_in, of_mixer = self._enter(x, again=True)
            recomputed = True
        del kept
        of_joined, low_grad = self.out_of.input_gradient(grad)
        width = self.into.width
        of_projected = projected if recomputed else aligned(x, self.into.gradient_width)
        inputs, own, rows = self.mixer.backward(
            of_joined,
            projected[:, :width],
            of_mixer,
            of_projected[:, :width],
            again=self.out_of.used > 0,
        )
        del projected, of_mixer, of_joined
        if low_out is None:
            low_out = self.out_of.low_rank_of(inputs) if self.out_of.used else low_grad
        out_grads = self.out_of.adapter_gradients(grad, low_grad, low_out, inputs)
        del inputs
        normal, rstd = self.norm(x)
        in_grads = self.into.adapter_gradients(of_projected, low_in, normal)
        del normal
        of_x = None
        if room is not None:
            of_normal = self.into.input_gradient(of_projected, rows)
            del of_projected, rows
            out = room_behind(x, room)
            of_x = ops.rms_norm_backward(of_normal, x, rstd, self.norm.weight, grad, out)
        return of_x, [*in_grads, *out_grads], list(own)
