"""Faults put into the fast path on purpose: the gate must reject each.

A mutant is a context manager around calls of a model from `build`; it needs nothing of the product's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.falcon.modeling_falcon import FalconDecoderLayer

from falcon_qlora.models.packed_attention import Sequences

_aten = torch.ops.aten
# Which argument is the left factor, the activations.
_PRODUCTS = {_aten.mm: 0, _aten.addmm: 1, _aten._scaled_mm: 0}


@contextmanager
def packing_leak(model: nn.Module) -> Iterator[None]:
    """Attention crosses the documents' boundaries; positions stay as they are."""

    def one_document(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        sequences = kwargs["attention_mask"]
        if isinstance(sequences, Sequences):
            tokens = sum(sequences.lengths)
            ends = sequences.cu_seqlens.new_tensor([0, tokens])
            joined = replace(sequences, cu_seqlens=ends, lengths=(tokens,), max_length=tokens)
            kwargs = kwargs | {"attention_mask": joined}
        return args, kwargs

    hooks = [block.register_forward_pre_hook(one_document, with_kwargs=True) for block in _blocks(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def half_scale(model: nn.Module) -> Iterator[None]:
    """LoRA's product counts half."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scaling.update({name: scale / 2 for name, scale in layer.scaling.items()})
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)


@contextmanager
def missing_adapter(model: nn.Module) -> Iterator[None]:
    """The middle block runs without its LoRA."""
    blocks = _blocks(model)
    layers = [m for m in blocks[len(blocks) // 2].modules() if isinstance(m, LoraLayer)]
    try:
        for layer in layers:
            layer._disable_adapters = True  # PEFT's own switch would freeze the matrices too
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@contextmanager
def coarse_float(model: nn.Module) -> Iterator[None]:
    """Activations, and in the backward pass gradients, have two bits of mantissa when they are multiplied."""
    with RoundedProducts(torch.float8_e5m2) as mode:
        yield
    assert mode.count, "no product was rounded: this mutant changes nothing"


MUTANTS: dict[str, Callable[[nn.Module], AbstractContextManager[None]]] = {
    "packing leak": packing_leak,
    "half the LoRA scale": half_scale,
    "one block without its adapter": missing_adapter,
    "e5m2 activations": coarse_float,
}


class RoundedProducts(TorchDispatchMode):
    """Round the left factor of every matrix product, or both, to `dtype`, row by row within its range.

    Args:
        dtype: an 8-bit floating point.
        both: whether the right factor, the weights, is rounded too.
    """

    def __init__(self, dtype: torch.dtype, both: bool = False) -> None:
        super().__init__()
        self.dtype, self.both, self.count = dtype, both, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = _PRODUCTS.get(func.overloadpacket)
        if first is not None:
            self.count += 1
            factors = list(args)
            factors[first] = self._rounded(factors[first])
            if self.both:
                factors[first + 1] = self._rounded(factors[first + 1].T).T
            args = tuple(factors)
        return func(*args, **(kwargs or {}))

    def _rounded(self, x: Tensor) -> Tensor:
        """``[rows, columns]``; each row is scaled by a power of two, which rounds nothing by itself."""
        wide = x.float()
        largest = wide.abs().amax(-1, keepdim=True).clamp(min=1e-30)
        scale = torch.exp2(torch.floor(torch.log2(torch.finfo(self.dtype).max / largest)))
        return ((wide * scale).to(self.dtype).float() / scale).to(x.dtype)


def _blocks(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, FalconDecoderLayer)]
