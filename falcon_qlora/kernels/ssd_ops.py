"""Falcon-H1's state space on the fast path: convolution, scan and gate, each forward and backward.

The parameters are frozen: gradients are of activations alone. Inputs are the columns of ``in_proj``'s output
as they lie in it, before their multipliers, of any row stride; gradients are written into columns of a buffer
like it. Everything is computed in float32 and rounded to the activations' dtype where it is returned. In
Triton's form the products' operands are rounded too. Letters of shapes are `ssd`'s, and C is MP + 2GN, the
channels of the convolution.

Between forward and backward only y, the scan's output, is kept. Bytes a token in bfloat16 at
Falcon-H1-7B's sizes, in chunks of 64 tokens (`ssd_triton` counts the scan's):

| | forward | backward, with what is recomputed |
|---|---|---|
| convolution | 14,336 | 14,336 + 21,504 |
| scan | 71,000 | 189,000 |
| gate | 18,432 | 36,864 |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from falcon_qlora.kernels import ops, ssd
from falcon_qlora.kernels.ssd import StateSpace


def _few_taps(*args: Any) -> bool:
    """Whether Triton's convolution has them all."""
    return _space_of(args).weight.shape[1] <= 4


@ops.or_triton("convolution_triton", where=_few_taps)
def convolve(channels: Tensor, space: StateSpace, positions: Tensor) -> Tensor:
    """Causal convolution of x, B and C within each document, then SiLU.

    Args:
        channels: ``[T, C]``.
        space: the parameters.
        positions: int64 ``[T]``, of each token in its document.

    Returns:
        ``[T, C]`` in `channels`' dtype.
    """
    return _convolution(space, positions)(channels.float()).to(channels.dtype)


@ops.or_triton("convolution_triton", where=_few_taps)
def convolve_backward(
    grad: Tensor, channels: Tensor, space: StateSpace, positions: Tensor, out: Tensor
) -> Tensor:
    """The gradient of `convolve`'s input.

    Args:
        grad: ``[T, C]``, of the output.
        channels: ``[T, C]``, the input.
        space: the parameters.
        positions: int64 ``[T]``.
        out: ``[T, C]`` to write into.

    Returns:
        `out`.
    """
    _, (gradient,) = _differentiate(_convolution(space, positions), grad, channels)
    return out.copy_(gradient)


def heads_fit(head_size: int, state: int) -> bool:
    """Whether Triton's form of the scan has tiles for heads of P channels and N numbers of state each."""
    return head_size in (16, 32, 64, 128) and state in (16, 32, 64, 128, 256)


def _in_tiles(*args: Any) -> bool:
    """Whether Triton's programs can hold the heads."""
    return heads_fit(_space_of(args).head_size, _space_of(args).state)


@ops.or_triton("ssd_triton", where=_in_tiles)
def scan(channels: Tensor, steps: Tensor, space: StateSpace, positions: Tensor, starts: Tensor) -> Tensor:
    """The state space with its skip.

    Args:
        channels: ``[T, C]``, `convolve`'s output.
        steps: ``[T, M]``, ``in_proj``'s columns of Δ.
        space: the parameters.
        positions: int64 ``[T]``, of each token in its document.
        starts: int32 ``[documents + 1]``, where each document begins, and T.

    Returns:
        ``[T, MP]`` in `channels`' dtype.
    """
    return _scan(space, positions)(channels.float(), steps.float()).to(channels.dtype)


@ops.or_triton("ssd_triton", where=_in_tiles)
def scan_backward(
    grad: Tensor,
    channels: Tensor,
    steps: Tensor,
    space: StateSpace,
    positions: Tensor,
    starts: Tensor,
    of_steps: Tensor,
) -> Tensor:
    """The gradients of `scan`'s inputs.

    Args:
        grad: ``[T, MP]``, of the output.
        channels: as in `scan`; likewise the next four.
        steps: ``[T, M]``.
        space: the parameters.
        positions: int64 ``[T]``.
        starts: int32 ``[documents + 1]``.
        of_steps: ``[T, M]`` to write the gradient of `steps` into.

    Returns:
        the gradient of `channels`, ``[T, C]`` in its dtype.
    """
    _, (of_channels, gradient) = _differentiate(_scan(space, positions), grad, channels, steps)
    of_steps.copy_(gradient)
    return of_channels.to(channels.dtype)


@ops.or_triton("gate_triton")
def gate(y: Tensor, z: Tensor, space: StateSpace, out: Tensor, scale: float = 1.0) -> Tensor:
    """``scale * y * silu(z)``, with the RMS norm if there is one.

    Args:
        y: ``[T, MP]``, `scan`'s output.
        z: ``[T, MP]``.
        space: the parameters.
        out: ``[T, MP]`` to write into.
        scale: of the output.

    Returns:
        `out`.
    """
    return out.copy_(_gate(space, scale)(y.float(), z.float()))


@ops.or_triton("gate_triton")
def gate_backward(
    grad: Tensor, y: Tensor, z: Tensor, space: StateSpace, of_z: Tensor, out: Tensor, scale: float = 1.0
) -> Tensor:
    """The gradients of `gate`'s inputs, and its output again.

    Args:
        grad: ``[T, MP]``, of the output.
        y: as in `gate`; likewise the next two.
        z: ``[T, MP]``.
        space: the parameters.
        of_z: ``[T, MP]`` to write the gradient of `z` into.
        out: ``[T, MP]`` to write the output into; may be `grad`.
        scale: of the output.

    Returns:
        the gradient of `y`, ``[T, MP]`` in its dtype.
    """
    output, (of_y, gradient) = _differentiate(_gate(space, scale), grad, y, z)
    of_z.copy_(gradient)
    out.copy_(output)
    return of_y.to(y.dtype)


def mix_forward(projected: Tensor, space: StateSpace, positions: Tensor, starts: Tensor) -> Tensor:
    """From ``in_proj``'s output to what is gated.

    Args:
        projected: ``[T, 2MP + 2GN + M]``.
        space: the parameters.
        positions: int64 ``[T]``, of each token in its document.
        starts: int32 ``[documents + 1]``, where each document begins, and T.

    Returns:
        y, ``[T, MP]``, which `mix_output` and `mix_backward` need beside `projected`.
    """
    _, channels, steps = space.split(projected)
    return scan(convolve(channels, space, positions), steps, space, positions, starts)


def mix_output(projected: Tensor, y: Tensor, space: StateSpace, out: Tensor, scale: float = 1.0) -> None:
    """Write ``out_proj``'s input, ``[T, MP]`` times `scale`, into `out`; arguments as in `mix_forward`."""
    gate(y, space.split(projected)[0], space, out, scale)


def mix_backward(
    grad: Tensor,
    projected: Tensor,
    y: Tensor,
    space: StateSpace,
    positions: Tensor,
    starts: Tensor,
    of_projected: Tensor,
    out: Tensor,
    scale: float = 1.0,
) -> None:
    """The gradient of `mix_forward`'s input, and `mix_output`'s output again.

    Args:
        grad: ``[T, MP]``, of the output.
        projected: as in `mix_forward`; likewise what is not described.
        y: ``[T, MP]``, from `mix_forward`.
        space: the parameters.
        positions: int64 ``[T]``.
        starts: int32 ``[documents + 1]``.
        of_projected: ``[T, 2MP + 2GN + M]`` to write the gradient into; may be `projected`.
        out: ``[T, MP]`` to write the output into; may be `grad`.
        scale: of the output.
    """
    z, channels, steps = space.split(projected)
    of_z, of_channels, of_steps = space.split(of_projected)
    of_y = gate_backward(grad, y, z, space, of_z, out, scale)
    convolved = convolve(channels, space, positions)
    of_convolved = scan_backward(of_y, convolved, steps, space, positions, starts, of_steps)
    if of_channels.data_ptr() != channels.data_ptr():
        convolve_backward(of_convolved, channels, space, positions, of_channels)
    else:  # which one program overwrites, and another reads
        ops.copy_rows(convolve_backward(of_convolved, channels, space, positions, convolved), of_channels)


def _convolution(space: StateSpace, positions: Tensor) -> Callable[[Tensor], Tensor]:
    multipliers = space.split(space.multipliers)[1]
    return lambda inputs: ssd.convolve(inputs * multipliers, space.weight, space.bias, positions)


def _scan(space: StateSpace, positions: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    multipliers = space.split(space.multipliers)[2]
    return lambda channels, steps: ssd.scan(channels, steps * multipliers, space, positions)


def _gate(space: StateSpace, scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    multipliers = space.split(space.multipliers)[0]
    return lambda y, z: scale * ssd.gated(y, z * multipliers, space)


def _space_of(args: tuple[Any, ...]) -> StateSpace:
    return next(each for each in args if isinstance(each, StateSpace))


def _differentiate(
    function: Callable[..., Tensor], grad: Tensor, *inputs: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output and the inputs' gradients, float32."""
    with torch.enable_grad():
        leaves = [each.detach().float().requires_grad_() for each in inputs]
        output = function(*leaves)
    return output.detach(), torch.autograd.grad(output, leaves, grad.float())
