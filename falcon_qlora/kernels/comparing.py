"""Runs Triton's kernels beside their plain references, on what a model gives them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from falcon_qlora.kernels import ops

# Of the largest value: what another order of the same operations may change.
_ALLOWED = {torch.float32: 5e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}
_ALLOWED_FP8 = 0.15  # two neighbouring values are up to an eighth apart


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far a kernel is from its reference.

    Attributes:
        relative: largest difference of two values, of the largest value.
        excess: that over what rounding may change; above 1 it is another result.
    """

    relative: float
    excess: float


@contextmanager
def comparing() -> Iterator[dict[str, Difference]]:
    """Within the block, each operation in Triton is also computed in its plain form; yields the differences.

    What the block computes is what Triton computes. The dict has the largest difference by operation.
    """
    found: dict[str, Difference] = {}

    def both(plain: Callable[..., Any], triton: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        copies: dict[Any, Tensor] = {}  # one of each tensor: an output may be an input as well
        copied = _copy(args, copies), _copy(kwargs, copies)
        expected = _tensors(plain(*copied[0], **copied[1]))
        result = triton(*args, **kwargs)
        for ours, right in zip(_tensors(result), expected, strict=True):
            difference = _difference(ours, right)
            worst = found.get(plain.__name__)
            if worst is None or difference.excess > worst.excess:
                found[plain.__name__] = difference
        return result

    before, ops.beside = ops.beside, both
    try:
        yield found
    finally:
        ops.beside = before


def _copy(value: Any, copies: dict[Any, Tensor]) -> Any:
    if isinstance(value, Tensor):
        key = value.data_ptr(), value.shape, value.stride(), value.dtype
        if key not in copies:
            copies[key] = value.detach().clone()
        return copies[key]
    if isinstance(value, list | tuple):
        copied = [_copy(each, copies) for each in value]
        return type(value)(*copied) if hasattr(value, "_fields") else type(value)(copied)
    if isinstance(value, dict):
        return {name: _copy(each, copies) for name, each in value.items()}
    return value


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in what an operation returns, in order."""
    if isinstance(value, Tensor):
        return [value.detach()]
    if isinstance(value, list | tuple):
        return [tensor for each in value for tensor in _tensors(each)]
    if dataclasses.is_dataclass(value):
        return [
            tensor for each in dataclasses.fields(value) for tensor in _tensors(getattr(value, each.name))
        ]
    return []


def _difference(ours: Tensor, right: Tensor) -> Difference:
    allowed = _ALLOWED.get(ours.dtype, _ALLOWED_FP8 if ours.is_floating_point() else 0.0)
    a, b = ours.float(), right.float()
    largest = float(b.abs().max()) if b.numel() else 0.0
    off = float((a - b).abs().max()) if b.numel() else 0.0
    if not (off == off and off != float("inf")):  # NaN is no result that both may have
        return Difference(float("inf"), float("inf"))
    relative = off / largest if largest else off
    return Difference(relative, relative / allowed if allowed else (0.0 if off == 0 else float("inf")))
