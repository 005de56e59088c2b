"""Products with exact GELU in their epilogue, from quack-kernels, if that optional library is installed.

A separate GELU reads and writes the largest activations once more in each direction. In the epilogue of the
product next to it, it is free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from falcon_qlora.kernels import libraries


@dataclass(frozen=True, eq=False)
class GeluProducts:
    """The products of both directions, for bfloat16 on Hopper and later GPUs."""

    _forward: Callable[..., Any]
    _backward: Callable[..., Any]
    _options: dict[str, Any] = field(default_factory=lambda: {"tuned": False})

    def forward(self, x: Tensor, weight: Tensor, before: Tensor, after: Tensor) -> None:
        """Write ``x @ weight`` and its GELU.

        Args:
            x: ``[T, C]``.
            weight: ``[C, F]``, contiguous along either dimension.
            before: ``[T, F]`` to write the product into; any row stride, as for all tensors here.
            after: ``[T, F]`` to write its GELU into.
        """
        self._forward(x, weight, out={"D": before, "after": after}, **self._options)

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
        self._backward(grad, weight, before, out={"D": of_before, "after": after}, **self._options)


@lru_cache
def gelu_products(device: torch.device) -> libraries.Loaded[GeluProducts]:
    """The library's products, once both have run on small matrices on `device`."""
    if not libraries.usable(libraries.QUACK):
        return libraries.Loaded()
    return libraries.load(libraries.QUACK, partial(_tried, device))


def _tried(device: torch.device) -> GeluProducts:
    products = _define(device)
    tokens, narrow, wide = 128, 64, 256
    x, weight = (torch.zeros(rows, narrow, dtype=torch.bfloat16, device=device) for rows in (tokens, wide))
    before, after, of_before = (x.new_empty(tokens, wide) for _ in range(3))
    products.forward(x, weight.T, before, after)
    products.backward(x, x.new_zeros(narrow, wide), before, of_before, after)
    of_before.sum().item()  # an error of the GPU's shows when it is waited for
    return products


def _define(device: torch.device) -> GeluProducts:
    from quack import activation
    from quack.epilogue.frontend import gemm_epilogue

    gelu = Activation(activation.gelu_erf)
    gelu_and_gradient = Activation(activation.dgelu_erf)

    @gemm_epilogue(outputs=("after",))
    def forward(acc):  # type: ignore[no-untyped-def]
        return {"D": acc, "after": gelu(acc)}

    @gemm_epilogue(outputs=("after",))
    def backward(acc, c):  # type: ignore[no-untyped-def]
        gradient, output = gelu_and_gradient(c, acc)
        return {"D": gradient, "after": output}

    # Programs that fetch their next tile: on an H200 2 % faster forward and 12 % backward.
    fetch = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return GeluProducts(forward, backward, {"tuned": False, "dynamic_scheduler": fetch})


class Activation:
    """A function of the library with a key for its cache, which it cannot derive for these by itself."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __quack_semantic_key__(self) -> object:
        return ("falcon_qlora", self._function.__name__)
