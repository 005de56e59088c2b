"""The operations between a block's large products, behind one seam.

Each operation has a plain PyTorch form, its reference. `using` chooses a form by name; by default the
tensors' device decides. Outputs may be slices of larger tensors, which a product then reads without a copy.
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, wraps
from typing import Any, Literal, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from falcon_qlora.kernels import libraries
from falcon_qlora.processes.devices import has_bfloat16

Implementation = Literal["torch", "triton"]
_P = ParamSpec("_P")
_R = TypeVar("_R")

_forced: Implementation | None = None
beside: Callable[..., Any] | None = None
"""Called in place of an operation's Triton form, with its plain form, that form and what they take."""


@contextmanager
def using(implementation: Implementation | None) -> Iterator[None]:
    """Run every operation in one form; None leaves the choice to the tensors' device."""
    global _forced
    before, _forced = _forced, implementation
    try:
        yield
    finally:
        _forced = before


def triton_runs_on(device: torch.device) -> bool:
    """Whether Triton's forms are used for tensors on `device`."""
    if _forced is not None:
        return _forced == "triton"
    return device.type == "cuda" and triton(device).part is not None


@lru_cache
def triton(device: torch.device) -> libraries.Loaded[bool]:
    """Triton, once a small kernel of ours has run on `device`: it needs a C compiler, for one.

    Not on GPUs without bfloat16, for which no kernel of ours is compiled.
    """
    if importlib.util.find_spec("triton") is None or not has_bfloat16(device):
        return libraries.Loaded()

    def copy() -> bool:
        from falcon_qlora.kernels import rows

        rows.copy_rows(torch.zeros(1, 16, device=device), torch.empty(1, 16, device=device))
        return True

    return libraries.load("triton", copy)


def hash_triton() -> None:
    """Have a thread hash Triton's library: kernels kept on disk are named after it, and it takes a while."""
    if not torch.cuda.is_available():
        return
    with suppress(ImportError):  # where another release has it elsewhere, the first kernel hashes
        from triton.runtime.cache import triton_key

        threading.Thread(target=triton_key, name="hash_triton", daemon=True).start()


def or_triton(
    module: str, where: Callable[..., bool] = lambda *_: True
) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Decorate an operation's plain form; Triton's form is the function of the same name in `module`.

    Triton's form is called if it is used on the device of the first argument, a tensor or a layer, and if
    `where` returns True for the positional arguments.
    """

    def decorate(plain: Callable[_P, _R]) -> Callable[_P, _R]:
        @lru_cache
        def in_triton() -> Callable[_P, _R]:
            return getattr(importlib.import_module(f"{__package__}.{module}"), plain.__name__)

        @wraps(plain)
        def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            first: Any = args[0]
            tensor = first if isinstance(first, Tensor) else first.weight
            in_its_form = triton_runs_on(tensor.device) and where(*args)
            if in_its_form and beside is not None:
                return beside(plain, in_triton(), args, kwargs)
            return (in_triton() if in_its_form else plain)(*args, **kwargs)

        return run

    return decorate


@or_triton("dequantize_triton")
def dequantize(layer: Any, out: Tensor | None = None) -> Tensor:
    """The frozen weight of `layer`, dequantized.

    Args:
        layer: bitsandbytes' ``Linear4bit`` or ``Linear8bitLt``, or any layer with a floating-point weight.
        out: ``[out, in]`` to write into, possibly a slice with longer rows; None for a new tensor.

    Returns:
        ``[out, in]``, in `out`'s dtype, or else in the dtype it was quantized from (int8: bfloat16).
    """
    weight = layer.weight
    if weight.dtype == torch.int8:
        if out is None:
            out = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.device)
        return torch.mul(weight.data, (int8_scales(layer).float() / 127.0)[:, None], out=out)
    plain = weight.data
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        plain = dequantize_4bit(plain, weight.quant_state)
    return plain if out is None else out.copy_(plain)


@or_triton("layer_norm")
def layer_norms(
    x: Tensor,
    norms: Sequence[tuple[Tensor, Tensor]],
    eps: float,
    outs: Sequence[Tensor | None] = (None, None),
) -> tuple[list[Tensor], Tensor, Tensor]:
    """One layer norm or two of the same rows, computed in float32.

    Args:
        x: ``[T, H]``.
        norms: weight and bias of each, ``[H]``.
        eps: added to the variance.
        outs: ``[T, H]`` to write each into, possibly a slice with longer rows; None for a new tensor.

    Returns:
        each norm's output ``[T, H]`` in `x`'s dtype, and what they share: the mean and the reciprocal of the
        standard deviation, float32 ``[T]`` each.
    """
    found = []
    for (weight, bias), out in zip(norms, outs, strict=False):
        if weight.dtype == x.dtype:
            y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
        else:
            wide = x.float()
            y, mean, rstd = torch.native_layer_norm(wide, x.shape[-1:], weight.float(), bias.float(), eps)
        found.append(y.to(x.dtype) if out is None else out.copy_(y))
    return found, mean.flatten().float(), rstd.flatten().float()


@or_triton("layer_norm")
def layer_norms_backward(
    x: Tensor,
    grads: Sequence[Tensor],
    mean: Tensor,
    rstd: Tensor,
    weights: Sequence[Tensor],
    addend: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient of `layer_norms`' input: the sum through all norms.

    Args:
        x: ``[T, H]``, the input.
        grads: ``[T, H]``, of each output.
        mean: float32 ``[T]``, from the forward pass.
        rstd: float32 ``[T]``, likewise.
        weights: ``[H]`` of each norm.
        addend: ``[T, H]``, added to the result, or None.
        out: ``[T, H]`` to write into, possibly a slice with longer rows; None for a new tensor.

    Returns:
        ``[T, H]`` in `x`'s dtype.
    """
    if x.is_cuda and len(grads) == 1 and weights[0].dtype == x.dtype:
        result = torch.ops.aten.native_layer_norm_backward(
            grads[0], x, x.shape[-1:], mean[:, None], rstd[:, None], weights[0], None, [True, False, False]
        )[0]
    else:
        normal = (x.float() - mean[:, None]) * rstd[:, None]
        scaled = torch.zeros_like(normal)
        for grad, weight in zip(grads, weights, strict=True):
            scaled.addcmul_(grad.float(), weight.float())
        along = (scaled * normal).mean(-1, keepdim=True)
        result = (scaled - scaled.mean(-1, keepdim=True) - normal * along) * rstd[:, None]
    if addend is not None:
        result += addend
    return result.to(x.dtype) if out is None else out.copy_(result)


@or_triton("rms_norm")
def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """RMS norm, computed in float32 and rounded once.

    Args:
        x: ``[T, H]``.
        weight: ``[H]``.
        eps: added to the mean of the squares.
        out: ``[T, H]`` to write into, possibly a slice with longer rows; None for a new tensor.

    Returns:
        the output ``[T, H]`` in `x`'s dtype, and the reciprocal of the root mean square, float32 ``[T]``.
    """
    rstd = torch.rsqrt(x.float().square().mean(-1) + eps)
    y = (x.float() * rstd[:, None] * weight.float()).to(x.dtype)
    return y if out is None else out.copy_(y), rstd


@or_triton("rms_norm")
def rms_norm_backward(
    grad: Tensor,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor,
    addend: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient of `rms_norm`'s input.

    Args:
        grad: ``[T, H]``, of the output.
        x: ``[T, H]``, the input.
        rstd: float32 ``[T]``, from the forward pass.
        weight: ``[H]``.
        addend: ``[T, H]``, added to the result, or None.
        out: ``[T, H]`` to write into, possibly a slice with longer rows; None for a new tensor.

    Returns:
        ``[T, H]`` in `x`'s dtype.
    """
    normal, scaled = x.float() * rstd[:, None], grad.float() * weight.float()
    result = (scaled - normal * (scaled * normal).mean(-1, keepdim=True)) * rstd[:, None]
    if addend is not None:
        result += addend
    return result.to(x.dtype) if out is None else out.copy_(result)


@or_triton("rows")
def copy_rows(x: Tensor, out: Tensor, scale: float = 1.0) -> Tensor:
    """Copy `scale` times ``[T, C]`` into `out` of its dtype; both may be slices with longer rows."""
    return out.copy_(x if scale == 1 else x.float() * scale)


@or_triton("rotary")
def rotate_(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding in-place: the first and second halves of each head are the coordinates of D/2 planes.

    Args:
        heads: ``[T, groups, heads, D]``, any strides with the last one 1; all of them are rotated.
        cosine: ``[T, D]``, both halves equal.
        sine: ``[T, D]``.

    Returns:
        `heads`.
    """
    half = heads.shape[-1] // 2
    first, second = heads[..., :half].float(), heads[..., half:].float()
    cosine = cosine[:, None, None, :half].float()
    sine = sine[:, None, None, :half].float()
    rotated = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    return heads.copy_(rotated)


@or_triton("rotary")
def rotate_join(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cosine: Tensor,
    sine: Tensor,
    out: Tensor,
    scale: float = 1.0,
) -> Tensor:
    """Rotate the gradients of queries and keys back, and join them with the values'.

    Args:
        query: ``[T, Q, D]``, the gradient of the rotated queries.
        key: ``[T, G, D]``, of the rotated keys.
        value: ``[T, G, D]``.
        cosine: ``[T, D]``, both halves equal.
        sine: ``[T, D]``.
        out: ``[T, G, Q/G + 2, D]`` to write into, any strides with the last one 1; where queries, keys and
            values lie apart, ``[T, 1, Q + 2G, D]``.
        scale: factor of all of them.

    Returns:
        `out`.
    """
    groups = out.shape[1]
    keys = key.shape[1] // groups
    out[:, :, : -2 * keys] = query.unflatten(1, (groups, -1))
    out[:, :, -2 * keys : -keys] = key.unflatten(1, (groups, keys))
    out[:, :, -keys:] = scale * value.float().unflatten(1, (groups, keys))
    rotate_(out[:, :, :-keys], scale * cosine.float(), -scale * sine.float())
    return out


@or_triton("gelu")
def gelu(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Exact GELU of ``[T, F]``, into `out` if given (possibly a slice with longer rows)."""
    y = F.gelu(x)
    return y if out is None else out.copy_(y)


@or_triton("gelu")
def gelu_backward(grad: Tensor, x: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The gradient of `gelu`'s input, and its output again.

    Args:
        grad: ``[T, F]``, of the output; may be overwritten.
        x: ``[T, F]``, the input.
        out: ``[T, F]`` to write the gradient into, possibly a slice with longer rows; may be `x`.

    Returns:
        the gradient ``[T, F]`` and gelu(x) ``[T, F]``, both in `x`'s dtype.
    """
    result, output = torch.ops.aten.gelu_backward(grad, x), F.gelu(x)
    return (result if out is None else out.copy_(result)), output


@or_triton("swiglu")
def swiglu(
    gate_up: Tensor, out: Tensor | None = None, gate_multiplier: float = 1.0, multiplier: float = 1.0
) -> Tensor:
    """SwiGLU, computed in float32 and rounded once: ``multiplier · up · silu(gate_multiplier · gate)``.

    Args:
        gate_up: ``[T, 2F]``, gate and up side by side, possibly a slice with longer rows.
        out: ``[T, F]`` to write into, likewise; None for a new tensor.
        gate_multiplier: of the gate.
        multiplier: of the result.

    Returns:
        ``[T, F]`` in `gate_up`'s dtype.
    """
    gate, up = gate_up.float().chunk(2, dim=1)
    y = (multiplier * up * F.silu(gate_multiplier * gate)).to(gate_up.dtype)
    return y if out is None else out.copy_(y)


@or_triton("swiglu")
def swiglu_backward(
    grad: Tensor,
    gate_up: Tensor,
    out: Tensor | None = None,
    gate_multiplier: float = 1.0,
    multiplier: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The gradient of `swiglu`'s input, and its output again.

    Args:
        grad: ``[T, F]``, of the output; may be overwritten.
        gate_up: ``[T, 2F]``, the input.
        out: ``[T, 2F]`` to write the gradient into, possibly a slice with longer rows; may be `gate_up`.
        gate_multiplier: as in `swiglu`.
        multiplier: likewise.

    Returns:
        the gradient ``[T, 2F]`` and the output ``[T, F]``, both in `gate_up`'s dtype.
    """
    gate, up = gate_up.float().chunk(2, dim=1)
    of_y, gate = multiplier * grad.float(), gate_multiplier * gate
    of_gate = gate_multiplier * torch.ops.aten.silu_backward(of_y * up, gate)
    silu = F.silu(gate)
    result, output = torch.cat([of_gate, of_y * silu], dim=1), (multiplier * up * silu).to(gate_up.dtype)
    return result.to(gate_up.dtype) if out is None else out.copy_(result), output


@or_triton("softmax")
def cross_entropy_(logits: Tensor, targets: Tensor, with_gradient: bool, scale: float = 1.0) -> Tensor:
    """Cross entropies of rows of logits, computed in float32.

    Args:
        logits: ``[N, V]``; overwritten by the gradients of each row's loss if `with_gradient`.
        targets: int64 ``[N]``.
        with_gradient: whether to write the gradients.
        scale: by which the logits are multiplied in float32; gradients are of them before.

    Returns:
        float32 ``[N]``.
    """
    x, target = logits.float(), targets[:, None]
    if scale != 1:
        x = x * scale
    log_normalizer = torch.logsumexp(x, dim=-1, keepdim=True)
    losses = (log_normalizer - x.gather(-1, target))[:, 0]
    if with_gradient:
        # In-place, to save memory.
        x.sub_(log_normalizer).exp_().scatter_add_(-1, target, torch.full_like(log_normalizer, -1.0))
        if scale != 1:
            x.mul_(scale)
        if x is not logits:
            logits.copy_(x)
    return losses


def int8_scales(layer: Any) -> Tensor:
    # bitsandbytes moves the scales from the weight to the layer's state when the layer first runs.
    scales: Tensor = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return scales
