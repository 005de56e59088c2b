"""Products with exact GELU in their epilogue, from quack-kernels, if that optional library is installed.

A separate GELU reads and writes the largest activations once more in each direction. In the epilogue of the
product next to it, it is free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

from falcon_qlora.kernels import libraries


@dataclass(frozen=True, eq=False)
class GeluProducts:
    """The products of both directions, for bfloat16 on Hopper and later GPUs."""

    _forward: Callable[..., Any]
    _backward: Callable[..., Any]

    def forward(self, x: Tensor, weight: Tensor, before: Tensor, after: Tensor) -> None:
        """Write ``x @ weight`` and its GELU.

        Args:
            x: ``[T, C]``.
            weight: ``[C, F]``, contiguous along either dimension.
            before: ``[T, F]`` to write the product into; any row stride, as for all tensors here.
            after: ``[T, F]`` to write its GELU into.
        """
        self._forward(x, weight, out={"D": before, "after": after}, tuned=False)

    def backward(
        self, grad: Tensor, weight: Tensor, before: Tensor, of_before: Tensor, after: Tensor
    ) -> None:
        """Write the gradient of GELU's input, and GELU's output again.

        Args:
            grad: ``[T, C]``, of the output of the linear after GELU.
            weight: ``[C, F]``, of that linear.
            before: ``[T, F]``, GELU's input.
            of_before: ``[T, F]`` to write its gradient into.
            after: ``[T, F]`` to write GELU's output into.
        """
        self._backward(grad, weight, before, out={"D": of_before, "after": after}, tuned=False)


@lru_cache
def gelu_products() -> GeluProducts | None:
    """The library's products; None if it is missing or does not load, or if the GPU is older than Hopper."""
    if not libraries.usable("quack"):
        return None
    try:
        return _define()
    except (ImportError, TypeError, AttributeError):  # another version of it or of a dependency
        return None


def _define() -> GeluProducts:
    from quack import activation
    from quack.epilogue.frontend import gemm_epilogue

    gelu = _Activation(activation.gelu_erf)
    gelu_and_gradient = _Activation(activation.dgelu_erf)

    @gemm_epilogue(outputs=("after",))
    def forward(acc):  # type: ignore[no-untyped-def]
        return {"D": acc, "after": gelu(acc)}

    @gemm_epilogue(outputs=("after",))
    def backward(acc, c):  # type: ignore[no-untyped-def]
        gradient, output = gelu_and_gradient(c, acc)
        return {"D": gradient, "after": output}

    return GeluProducts(forward, backward)


class _Activation:
    """A function of the library with a key for its cache, which it cannot derive for these by itself."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __quack_semantic_key__(self) -> object:
        return ("falcon_qlora", self._function.__name__)
